"""Finds and checks the adapter and the base that `generate` and `evaluate` use; loads the base's weights later."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers import MultiAdapter, T2IAdapter

from t2i_adapter.config.tree import BaseOptions
from t2i_adapter.devices import choose_device, hardware_of
from t2i_adapter.errors import UserError
from t2i_adapter.generation.options import ModelOptions
from t2i_adapter.generation.several import SeveralAdapters
from t2i_adapter.models.adapter import check_fits, load_adapter
from t2i_adapter.models.base import Base
from t2i_adapter.models.family import AdapterPipeline
from t2i_adapter.models.lora import add_loras
from t2i_adapter.models.lora_file import Lora
from t2i_adapter.models.open import open_base
from t2i_adapter.models.quantize import Format, quantize
from t2i_adapter.models.record import BASE_FIELDS, FILE_NAME, Metadata, read_metadata
from t2i_adapter.types import CHUNK_TOKENS, MaxTokens

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Models:
    """An adapter and a base that it fits; the base's weights are not loaded yet.

    Attributes:
        digest: sha256 of the adapter's weights.
        metadata: the adapter's record, if it has one.
        max_tokens: tokens of a prompt that are read.
        device, precision: resolved, never "auto".
    """

    adapter: T2IAdapter
    base: Base
    digest: str
    metadata: Metadata | None
    max_tokens: MaxTokens
    device: str
    precision: str
    offload: str
    xformers: bool

    @property
    def adapter_config(self) -> dict[str, Any]:
        return dict(self.adapter.config)

    @property
    def channels(self) -> int:
        """Channels of the condition picture, 1 or 3."""
        return self.adapter_config["in_channels"]

    @property
    def resolution(self) -> int | None:
        """Side in pixels of the adapter's training crops, if known."""
        return self.metadata.resolution if self.metadata else None

    @property
    def recommended(self) -> Mapping[str, Any]:
        """Options of sampling that the adapter's record recommends; empty if it recommends none."""
        return self.metadata.sampling if self.metadata else {}

    def describe_text(self) -> str | None:
        """Returns a line for the log if prompts are read in several chunks."""
        if self.max_tokens == CHUNK_TOKENS:
            return None
        is_recorded = self.metadata is not None and self.max_tokens == self.metadata.max_tokens
        why = ", as in the adapter's training" if is_recorded else ""
        return f"prompts: up to {self.max_tokens} tokens are read, in chunks of {CHUNK_TOKENS}{why}"

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the base."""
        return _DTYPES[self.precision]

    def pipeline(
        self,
        others: Sequence[Models] = (),
        *,
        loras: Sequence[Lora] = (),
        quantized: Format | Literal["none"] = "none",
        scheduler: Any = None,
    ) -> AdapterPipeline:
        """Loads the base and builds the pipeline on the device.

        Args:
            others: further adapters, which act beside this one.
            loras: are added to the base's weights.
            quantized: format of the UNet's large matrices; LoRAs are added before.
            scheduler: another one than Euler ancestral.

        Raises UserError.
        """
        place = torch.device("cpu" if self.offload != "none" else self.device)
        parts: dict[str, Any] = {}
        if loras or quantized != "none":
            parts["unet"] = self.base.unet("cpu" if quantized != "none" else place, self.dtype)
        if loras:
            parts["text"] = self.base.text_encoder(place, self.dtype)
            names = ("text_encoder", "text_encoder_2")
            add_loras(loras, {"unet": parts["unet"], **dict(zip(names, parts["text"].encoders, strict=False))})
        if quantized != "none":
            parts["unet"] = quantize(parts["unet"], quantized, place).to(place)
        adapters = [self.adapter, *(other.adapter for other in others)]
        network: Any = MultiAdapter(adapters) if others else self.adapter
        pipeline = self.base.pipeline(network, self.device, self.dtype, offload=self.offload, **parts)
        if scheduler is not None:
            pipeline.scheduler = scheduler
        if self.xformers:
            try:
                pipeline.enable_xformers_memory_efficient_attention()
            except (ValueError, NotImplementedError, ModuleNotFoundError) as fault:
                raise UserError(f"does not work here ({fault}); omit it.", option="xformers") from fault
        return pipeline


def open_several(options: SeveralAdapters) -> list[Models]:
    """Finds the adapters and their common base: that of the options, or else the first adapter's.

    Raises UserError if one is missing, or they do not fit together.
    """
    first = open_models(options.model_options(0))
    found = [first, *(open_models(options.model_options(n), first.base) for n in range(1, len(options.adapter)))]
    factors = [model.adapter_config["downscale_factor"] for model in found]
    if len(set(factors)) > 1:
        raise UserError(
            f"their downscale_factor differs ({', '.join(map(str, factors))}), so their features have different sizes; "
            "use adapters of one kind.",
            option="adapter",
        )
    max_tokens = max(model.max_tokens for model in found)
    return [replace(model, max_tokens=max_tokens) for model in found]


def describe_differences(names: Sequence[str], models: Sequence[Models]) -> list[str]:
    """Returns lines for the log about adapters whose training differs from the first one's, or from the base."""
    lines = []
    sides = {name: model.resolution for name, model in zip(names, models, strict=True) if model.resolution}
    if len(set(sides.values())) > 1:
        sizes = ", ".join(f"{name} {side} px" for name, side in sides.items())
        lines.append(f"the adapters were trained at different sizes: {sizes}; set --width and --height to choose")
    base = models[0].base.name
    for name, model in list(zip(names, models, strict=True))[1:]:
        trained = model.metadata.base.get("name") if model.metadata else None
        if trained not in (None, base):
            lines.append(f"{name} was trained on {trained}; the base is {base}")
    return lines


def open_models(options: ModelOptions, base: Base | None = None) -> Models:
    """Finds the adapter and its base, unless that is given. Raises UserError if one is missing or they do not fit."""
    device = choose_device(options.device)
    if torch.device(device).type == "cpu" and options.offload != "none":
        raise UserError(f"{options.offload}: needs a GPU, and the device is {device}; use none.", option="offload")
    precision = options.precision
    hardware = hardware_of(device)
    if precision == "auto":
        precision = "fp16" if hardware.can("fp16") else "fp32"
    if precision == "bf16" and not hardware.can("bf16"):
        raise UserError(f"bf16: {hardware.lacks('bf16')}; use auto, fp16 or fp32.", option="precision")
    if options.xformers and importlib.util.find_spec("xformers") is None:
        raise UserError("the package is not installed; `pip install xformers`, or omit it.", option="xformers")
    metadata = read_metadata(options.adapter)
    adapter = load_adapter(options.adapter)
    base = base or open_base(_base_options(options, metadata))
    check_fits(dict(adapter.config), base.unet_config, options.adapter)
    digest = weights_digest(adapter)
    max_tokens = options.max_tokens or (metadata.max_tokens if metadata else CHUNK_TOKENS)
    return Models(adapter, base, digest, metadata, max_tokens, device, precision, options.offload, options.xformers)


def weights_digest(adapter: T2IAdapter) -> str:
    """Returns the sha256 (hex) of the names and float32 values of the adapter's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(adapter.state_dict().items()):
        digest.update(name.encode() + b"\0")
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _base_options(options: ModelOptions, metadata: Metadata | None) -> BaseOptions:
    if options.base is not None:
        return BaseOptions(
            name=options.base,
            config=options.base_config,
            revision=options.base_revision,
            variant=options.base_variant,
            vae=options.base_vae,
        )
    if metadata is None:
        raise UserError(
            f"is needed: {options.adapter} has no {FILE_NAME} with the base of its training. "
            "Name a hub id, a diffusers folder, a single .safetensors file, or nano.",
            option="base",
        )
    recorded: dict[str, Any] = {key: metadata.base.get(key) for key in BASE_FIELDS}
    if options.base_config is not None:
        recorded["config"] = options.base_config
    if options.base_vae is not None:
        recorded["vae"] = options.base_vae
    return BaseOptions(**recorded)
