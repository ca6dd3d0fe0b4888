"""The base: a text-to-image model whose weights stay frozen. `Base` reads one from a diffusers folder, part by part.

Its family (family.py) says which parts it has.

`open_base` (open.py) finds the folder by the base's name; `SingleFileBase` (single_file.py) reads the weights from one
.safetensors file instead.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from t2i_adapter.config.tree import BaseOptions
from t2i_adapter.errors import UserError, first_line
from t2i_adapter.files import parse_json, sha256
from t2i_adapter.models.encoders import LatentEncoder, LatentScale, TextEncoder
from t2i_adapter.models.family import AdapterPipeline, Family, find_family
from t2i_adapter.models.scheduler import check_class, check_config
from t2i_adapter.models.weights import WeightsError, load_weights

if TYPE_CHECKING:
    from diffusers import T2IAdapter

transformers_logging.disable_progress_bar()  # a bar for each local file would hide our own output

_SCHEDULER = "scheduler/scheduler_config.json"
_TEXT_ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


class Base:
    """A base in diffusers layout: an SDXL, or a Stable Diffusion 1 or 2.

    Each call of `unet`, `vae` or `text_encoder` loads that part anew, in eval mode and without gradients. The part
    belongs to the caller; the base holds no reference to it, so its memory is free when the caller drops it.
    """

    def __init__(self, options: BaseOptions, folder: Path) -> None:
        self.options = options
        self.name = options.name
        self.folder = folder
        self._check_parts("unet")
        self.family: Family = find_family(self.unet_config, self.name)
        self._check_parts(*self.family.parts)
        self._check_scheduler()

    def _check_parts(self, *parts: str) -> None:
        """Raises UserError if a part's folder is missing."""
        for part in parts:
            if not (self.folder / part).is_dir():
                found = ", ".join(sorted(path.name for path in self.folder.iterdir())) or "nothing"
                raise UserError(
                    f"{self.options.config or self.name} is not a base in diffusers layout: the folder {part}/ is "
                    f"missing (found: {found}). Name an SDXL, or a Stable Diffusion 1 or 2, in this layout."
                )

    # Configs: read without weights ---------------------------------------------------------------------------------

    @cached_property
    def unet_config(self) -> dict[str, Any]:
        return _read_json(self.folder / "unet" / "config.json")

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        if self.options.vae:
            config: Any = AutoencoderKL.load_config(self.options.vae, **_vae_source(self.options))
            return config
        return _read_json(self.folder / "vae" / "config.json")

    @cached_property
    def zeros_for_empty_prompt(self) -> bool:
        """Whether this base's pipelines use zeros for a negative prompt that is not given, as SDXL's own does."""
        if not self.family.can_use_zeros:
            return False
        index = self.folder / "model_index.json"
        return bool(_read_json(index).get("force_zeros_for_empty_prompt", True)) if index.is_file() else True

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        return _read_json(self.folder / _SCHEDULER)

    def _check_scheduler(self) -> None:
        """Raises UserError unless the base was trained with a noise schedule that training follows."""
        check_config(self.scheduler_config, str(self.folder / _SCHEDULER))
        index = self.folder / "model_index.json"
        named = _read_json(index).get("scheduler") if index.is_file() else None
        if isinstance(named, list) and named:  # [library, class]; pipelines of diffusers read the file with this class
            check_class(named[-1], str(index))

    @property
    def native_size(self) -> int:
        """Side in pixels of the pictures that the base makes by default."""
        return self.unet_config["sample_size"] * 8

    @property
    def latent_scale(self) -> LatentScale:
        return LatentScale.of(self.vae_config)

    def scheduler(self) -> EulerDiscreteScheduler:
        """Returns the base's noise schedule."""
        set_keys = {key: value for key, value in self.scheduler_config.items() if value is not None}
        scheduler: Any = EulerDiscreteScheduler.from_config(set_keys)
        return scheduler

    def tokenizers(self) -> tuple[CLIPTokenizer, ...]:
        parts = [part for part in self.family.text_parts if part not in _TEXT_ENCODERS]
        return tuple(CLIPTokenizer.from_pretrained(self.folder / part) for part in parts)

    # Fingerprints: the cache's keys --------------------------------------------------------------------------------

    @cached_property
    def text_fingerprint(self) -> str:
        """sha256 of everything that determines a caption's states: configs, vocabularies and weights."""
        return self._fingerprint(self.family.text_parts)

    @cached_property
    def vae_fingerprint(self) -> str:
        """sha256 of everything that determines a picture's moments: config and weights."""
        vae = _load_named_vae(self.options, "cpu", torch.float32)
        if vae is None:
            return self._fingerprint(["vae"])
        # By the weights' values, which are the same in a folder and on the hub.
        digest = hashlib.sha256(json.dumps(dict(vae.config), sort_keys=True, default=str).encode())
        for name, tensor in sorted(vae.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _fingerprint(self, parts: Iterable[str]) -> str:
        return self._hash_files(parts, weights=True)

    def _hash_files(self, parts: Iterable[str], *, weights: bool) -> str:
        """sha256 over the parts' configs and vocabularies and, if `weights`, their weights of the chosen variant."""
        digest = hashlib.sha256()
        for part in parts:
            for path in sorted((self.folder / part).iterdir()):
                chosen = weights and path.suffix == ".safetensors" and _variant_of(path) == self.options.variant
                if chosen or path.suffix in (".json", ".txt"):
                    digest.update(f"{part}/{path.name}\0{sha256(path)}\n".encode())
        return digest.hexdigest()

    # Parts: loaded at each call ------------------------------------------------------------------------------------

    def unet(self, device: torch.device | str, dtype: torch.dtype) -> UNet2DConditionModel:
        return self._load(UNet2DConditionModel, "unet", device, dtype)

    def vae(self, device: torch.device | str, dtype: torch.dtype) -> AutoencoderKL:
        """Loads the VAE of `options.vae`, or else the base's own."""
        return _load_named_vae(self.options, device, dtype) or self._load(AutoencoderKL, "vae", device, dtype)

    def latent_encoder(self, device: torch.device | str) -> LatentEncoder:
        """Loads the VAE's encoder in float32, channels last.

        Channels last is faster on a CPU (benchmarks/results/speed_options_*.json).
        """
        vae: Any = self.vae(device, torch.float32)
        return LatentEncoder(vae.to(memory_format=torch.channels_last), torch.device(device))

    def text_encoder(self, device: torch.device | str, dtype: torch.dtype) -> TextEncoder:
        """Loads all tokenizers and text encoders."""
        parts = [part for part in self.family.text_parts if part in _TEXT_ENCODERS]
        encoders = tuple(self._load(_TEXT_ENCODERS[part], part, device, dtype) for part in parts)
        return TextEncoder(self.tokenizers(), encoders, torch.device(device))

    def _load(self, kind: Any, part: str, device: torch.device | str, dtype: torch.dtype) -> Any:
        try:
            model = load_weights(kind, str(self.folder), dtype, subfolder=part, variant=self.options.variant)
        except WeightsError as fault:
            variant = f" of variant {self.options.variant}" if self.options.variant else ""
            raise UserError(
                f"{self.name}: no complete safetensors weights{variant} for {part} ({fault}). "
                "Pickled weights (.bin, .ckpt) are not read."
            ) from fault
        return freeze(model, device)

    def pipeline(
        self,
        adapter: T2IAdapter,
        device: torch.device | str,
        dtype: torch.dtype,
        *,
        unet: UNet2DConditionModel | None = None,
        text: TextEncoder | None = None,
        with_text: bool = True,
        offload: str = "none",
    ) -> AdapterPipeline:
        """Builds diffusers' own pipeline from this base and an adapter, with Euler ancestral steps as in its guide.

        The VAE stays in float32, because SDXL's own overflows in fp16.

        Args:
            unet, text: parts that are already loaded, to share their memory; None loads them.
            with_text: False leaves the text encoders out; the pipeline then takes text states instead of prompts.
            offload: "none", "model" or "sequential" (the last two need a GPU).
        """
        place = torch.device("cpu" if offload != "none" else device)
        if with_text and text is None:
            text = self.text_encoder(place, dtype)
        placed: Any = torch.nn.Module.to(adapter, place, dtype)
        loaded = (*text.tokenizers, *text.encoders) if text else [None] * len(self.family.text_parts)
        scheduler: Any = EulerAncestralDiscreteScheduler.from_config(self.scheduler().config)
        zeros = {"force_zeros_for_empty_prompt": self.zeros_for_empty_prompt} if self.family.can_use_zeros else {}
        pipeline = self.family.pipeline(
            vae=self.vae(place, torch.float32),
            **dict(zip(self.family.text_parts, loaded, strict=True)),
            unet=unet if unet is not None else self.unet(place, dtype),
            adapter=placed,
            scheduler=scheduler,
            **zeros,
            **self.family.fixed,
        )
        pipeline.set_progress_bar_config(disable=True)
        if offload == "model":
            pipeline.enable_model_cpu_offload(device=device)
        elif offload == "sequential":
            pipeline.enable_sequential_cpu_offload(device=device)
        return pipeline


def enable_gradient_checkpointing(unet: Any, blocks: Literal["all", "large"]) -> None:
    """Makes the UNet recompute activations in the backward pass: those of all blocks, or of the two largest
    resolutions only.

    The gradients stay the same to the bit, because the UNet draws no random numbers.
    """
    unet.enable_gradient_checkpointing()
    if blocks == "all":
        return
    last = len(unet.config["block_out_channels"]) - 1
    large = ("down_blocks.0.", "down_blocks.1.", f"up_blocks.{last - 1}.", f"up_blocks.{last}.")
    for name, module in unet.named_modules():
        if hasattr(module, "gradient_checkpointing") and not f"{name}.".startswith(large):
            module.gradient_checkpointing = False


def freeze(model: Any, device: torch.device | str) -> Any:
    """Puts a model on the device, in eval mode and without gradients; returns it."""
    return model.to(device).eval().requires_grad_(False)


def _load_named_vae(options: BaseOptions, device: torch.device | str, dtype: torch.dtype) -> AutoencoderKL | None:
    """Loads the VAE that `options.vae` names, if it names one."""
    if options.vae is None:
        return None
    try:
        vae = load_weights(AutoencoderKL, options.vae, dtype, **_vae_source(options))
    except WeightsError as fault:
        raise UserError(
            f"{options.vae}: no VAE found ({fault}). "
            "Name a folder with config.json and safetensors weights, or a hub id of such files.",
            option="base.vae",
        ) from fault
    return freeze(vae, device)


def _vae_source(options: BaseOptions) -> dict[str, Any]:
    """Where diffusers looks for `options.vae`: a local folder needs no hub."""
    return {"cache_dir": options.cache_dir, "local_files_only": Path(options.vae or "").exists()}


def _variant_of(path: Path) -> str | None:
    """`model.fp16.safetensors` and `model.fp16-00001-of-00002.safetensors` -> fp16; plain names -> None."""
    parts = path.name.split(".")
    return parts[1].split("-")[0] if len(parts) > 2 else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise UserError(f"{path}: {first_line(fault)}; a JSON file of a diffusers model is needed.") from fault
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}; a JSON object of a diffusers model is needed.")
    return content
