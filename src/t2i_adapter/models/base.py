"""The frozen base: located or downloaded once, its parts loaded only when they are wanted."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLAdapterPipeline,
    UNet2DConditionModel,
)
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from t2i_adapter.config.tree import BaseOptions
from t2i_adapter.errors import UserError, first_line
from t2i_adapter.files import parse_json, sha256
from t2i_adapter.models.encoders import LatentEncoder, LatentScale, TextEncoder

if TYPE_CHECKING:
    from diffusers import T2IAdapter

transformers_logging.disable_progress_bar()  # a bar for reading one file from the disk is no news

TEXT_PARTS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
PARTS = ("unet", "vae", "scheduler", *TEXT_PARTS)


class Base(ABC):
    """An SDXL, frozen. Parts are loaded by each call and belong to the caller, who drops them when done."""

    def __init__(self, options: BaseOptions) -> None:
        self.options = options
        self.name = options.name

    # What a kind of base must answer -------------------------------------------------------------------------------

    @cached_property
    @abstractmethod
    def unet_config(self) -> dict[str, Any]:
        """The UNet's config; no weights are read."""

    @cached_property
    @abstractmethod
    def vae_config(self) -> dict[str, Any]:
        """The VAE's config; no weights are read."""

    @cached_property
    @abstractmethod
    def zeros_for_empty_prompt(self) -> bool:
        """Whether pipelines of this base use zeros where no negative prompt is given (SDXL's own does)."""

    @cached_property
    @abstractmethod
    def text_fingerprint(self) -> str:
        """sha256 of all that decides a caption's states: configs, vocabularies, weights."""

    @cached_property
    @abstractmethod
    def vae_fingerprint(self) -> str:
        """sha256 of all that decides a picture's moments: config and weights."""

    @abstractmethod
    def scheduler(self) -> EulerDiscreteScheduler:
        """The base's noise schedule."""

    @abstractmethod
    def tokenizers(self) -> tuple[CLIPTokenizer, CLIPTokenizer]:
        """Both tokenizers; no weights are read."""

    @abstractmethod
    def text_encoder(self, device: torch.device | str, dtype: torch.dtype) -> TextEncoder:
        """Both tokenizers and text encoders, on the device."""

    @abstractmethod
    def unet(self, device: torch.device | str, dtype: torch.dtype) -> UNet2DConditionModel:
        """The UNet, frozen."""

    @abstractmethod
    def vae(self, device: torch.device | str, dtype: torch.dtype) -> AutoencoderKL:
        """The VAE, frozen; the one of `options.vae` if that is given."""

    # What follows from it ------------------------------------------------------------------------------------------

    @property
    def native_size(self) -> int:
        """Side in pixels that the base draws by default."""
        return self.unet_config["sample_size"] * 8

    @property
    def latent_scale(self) -> LatentScale:
        return LatentScale.of(self.vae_config)

    def latent_encoder(self, device: torch.device | str) -> LatentEncoder:
        """The VAE's encoder, on the device, float32, channels last: on a CPU that is faster
        (benchmarks/speed_options.json)."""
        vae: Any = self.vae(device, torch.float32)
        return LatentEncoder(vae.to(memory_format=torch.channels_last), torch.device(device))

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
    ) -> StableDiffusionXLAdapterPipeline:
        """diffusers' own pipeline around this base and an adapter, with Euler ancestral steps as in the guide.

        The VAE stays in float32, for SDXL's own overflows in fp16: latents are cast to its dtype to be decoded.

        `unet` shares one that is loaded already. `with_text=False` leaves the text encoders out: prompts are then
        given as states. offload: "none", "model" or "sequential" (the last two need a GPU).
        """
        place = torch.device("cpu" if offload != "none" else device)
        if with_text and text is None:
            text = self.text_encoder(place, dtype)
        placed: Any = torch.nn.Module.to(adapter, place, dtype)
        tokenizers: Any = text.tokenizers if text else (None, None)
        encoders: Any = text.encoders if text else (None, None)
        scheduler: Any = EulerAncestralDiscreteScheduler.from_config(self.scheduler().config)
        pipeline = StableDiffusionXLAdapterPipeline(
            vae=self.vae(place, torch.float32),
            text_encoder=encoders[0],
            text_encoder_2=encoders[1],
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=unet if unet is not None else self.unet(place, dtype),
            adapter=placed,
            scheduler=scheduler,
            force_zeros_for_empty_prompt=self.zeros_for_empty_prompt,
        )
        pipeline.set_progress_bar_config(disable=True)
        if offload == "model":
            pipeline.enable_model_cpu_offload(device=device)
        elif offload == "sequential":
            pipeline.enable_sequential_cpu_offload(device=device)
        return pipeline

    def _check_is_sdxl(self) -> None:
        config = self.unet_config
        blocks = len(config["block_out_channels"])
        if config.get("addition_embed_type") != "text_time" or blocks != 3:
            raise UserError(
                f"{self.name} is not an SDXL base: its UNet has {blocks} resolutions and "
                f"addition_embed_type {config.get('addition_embed_type')!r}; SDXL has 3 and 'text_time'."
            )


class FolderBase(Base):
    """A base in diffusers layout."""

    def __init__(self, options: BaseOptions, folder: Path) -> None:
        super().__init__(options)
        self.folder = folder
        for part in PARTS:
            if not (folder / part).is_dir():
                raise UserError(
                    f"{options.config or options.name} is not an SDXL base in diffusers layout: it has no folder "
                    f"{part}/ (there are: {', '.join(sorted(p.name for p in folder.iterdir())) or 'none'})."
                )
        self._check_is_sdxl()

    @cached_property
    def unet_config(self) -> dict[str, Any]:
        return _read_json(self.folder / "unet" / "config.json")

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        if self.options.vae:
            config: Any = AutoencoderKL.load_config(self.options.vae, **self._hub(self.options.vae))
            return config
        return _read_json(self.folder / "vae" / "config.json")

    @cached_property
    def zeros_for_empty_prompt(self) -> bool:
        index = self.folder / "model_index.json"
        return bool(_read_json(index).get("force_zeros_for_empty_prompt", True)) if index.is_file() else True

    @cached_property
    def text_fingerprint(self) -> str:
        return digest_of_folders([self.folder / part for part in TEXT_PARTS], self.options.variant)

    @cached_property
    def vae_fingerprint(self) -> str:
        return vae_digest(self.options) or digest_of_folders([self.folder / "vae"], self.options.variant)

    def scheduler(self) -> EulerDiscreteScheduler:
        scheduler: Any = EulerDiscreteScheduler.from_pretrained(self.folder, subfolder="scheduler")
        return scheduler

    def tokenizers(self) -> tuple[CLIPTokenizer, CLIPTokenizer]:
        first, second = (CLIPTokenizer.from_pretrained(self.folder / part) for part in TEXT_PARTS[:2])
        return first, second

    def text_encoder(self, device: torch.device | str, dtype: torch.dtype) -> TextEncoder:
        encoders = [
            self._load(kind, part, device, dtype)
            for kind, part in ((CLIPTextModel, "text_encoder"), (CLIPTextModelWithProjection, "text_encoder_2"))
        ]
        return TextEncoder(self.tokenizers(), (encoders[0], encoders[1]), torch.device(device))

    def unet(self, device: torch.device | str, dtype: torch.dtype) -> UNet2DConditionModel:
        return self._load(UNet2DConditionModel, "unet", device, dtype)

    def vae(self, device: torch.device | str, dtype: torch.dtype) -> AutoencoderKL:
        return _named_vae(self.options, device, dtype) or self._load(AutoencoderKL, "vae", device, dtype)

    def _load(self, kind: Any, part: str, device: torch.device | str, dtype: torch.dtype) -> Any:
        try:
            model = kind.from_pretrained(
                self.folder, subfolder=part, variant=self.options.variant, use_safetensors=True, torch_dtype=dtype
            )
        except (OSError, ValueError, SafetensorError) as fault:
            variant = f" of variant {self.options.variant}" if self.options.variant else ""
            raise UserError(
                f"{self.name}: no safetensors weights{variant} for {part} ({first_line(fault)}). "
                "Pickled weights (.bin, .ckpt) are not read."
            ) from fault
        return freeze(model, device)

    def _hub(self, name: str) -> dict[str, Any]:
        return {"cache_dir": self.options.cache_dir, "local_files_only": Path(name).exists()}


def _named_vae(options: BaseOptions, device: torch.device | str, dtype: torch.dtype) -> AutoencoderKL | None:
    if options.vae is None:
        return None
    try:
        vae = AutoencoderKL.from_pretrained(
            options.vae,
            cache_dir=options.cache_dir,
            use_safetensors=True,
            torch_dtype=dtype,
            local_files_only=Path(options.vae).exists(),
        )
    except (OSError, ValueError) as fault:
        raise UserError(
            f"--pretrained_vae_model_name_or_path {options.vae}: no VAE there ({first_line(fault)}). "
            "Name a folder with config.json and safetensors weights, or a hub id that has these."
        ) from fault
    return freeze(vae, device)


def vae_digest(options: BaseOptions) -> str | None:
    """Digest of the VAE named by the options: of its weights as loaded, wherever they come from."""
    vae = _named_vae(options, "cpu", torch.float32)
    if vae is None:
        return None
    digest = hashlib.sha256(json.dumps(dict(vae.config), sort_keys=True, default=str).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def digest_of_folders(folders: list[Path], variant: str | None, *, weights: bool = True) -> str:
    """sha256 over the folders' configs and vocabularies and, unless told not to, their weights of one variant."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.iterdir()):
            wanted = weights and path.suffix == ".safetensors" and _variant_of(path) == variant
            if wanted or path.suffix in (".json", ".txt"):
                digest.update(f"{folder.name}/{path.name}\0{sha256(path)}\n".encode())
    return digest.hexdigest()


def _variant_of(path: Path) -> str | None:
    """`model.fp16.safetensors` and `model.fp16-00001-of-00002.safetensors` -> fp16; plain names -> None."""
    parts = path.name.split(".")
    return parts[1].split("-")[0] if len(parts) > 2 else None


def freeze(model: Any, device: torch.device | str) -> Any:
    return model.to(device).eval().requires_grad_(False)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise UserError(f"{path}: {first_line(fault)}; a JSON file of a diffusers model is needed.") from fault
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}; a JSON object of a diffusers model is needed.")
    return content
