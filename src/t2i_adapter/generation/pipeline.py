"""Finds and checks the adapter and the base that `generate` and `evaluate` use; loads the base's weights later."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import T2IAdapter

from t2i_adapter.config.tree import BaseOptions
from t2i_adapter.errors import UserError, flag
from t2i_adapter.generation.options import ModelOptions
from t2i_adapter.models.adapter import check_fits, load_adapter
from t2i_adapter.models.base import Base
from t2i_adapter.models.family import AdapterPipeline
from t2i_adapter.models.open import open_base
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

    def pipeline(self) -> AdapterPipeline:
        """Loads the base and builds the pipeline on the device."""
        dtype = _DTYPES[self.precision]
        pipeline = self.base.pipeline(self.adapter, self.device, dtype, offload=self.offload)
        if self.xformers:
            try:
                pipeline.enable_xformers_memory_efficient_attention()
            except (ValueError, NotImplementedError, ModuleNotFoundError) as fault:
                raise UserError(f"does not work here ({fault}); omit it.", option="xformers") from fault
        return pipeline


def open_models(options: ModelOptions) -> Models:
    """Finds the adapter and its base. Raises UserError if one is missing or they do not fit."""
    device = _find_device(options.device, options.offload)
    precision = options.precision
    if precision == "auto":
        precision = "fp16" if device.startswith("cuda") else "fp32"
    if options.xformers and importlib.util.find_spec("xformers") is None:
        raise UserError("the package is not installed; `pip install xformers`, or omit it.", option="xformers")
    metadata = read_metadata(options.adapter)
    adapter = load_adapter(options.adapter)
    base = open_base(_base_options(options, metadata))
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


def _find_device(name: str, offload: str) -> str:
    """Resolves "auto" and checks that the device exists and that `offload` works on it. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as fault:
        raise UserError(
            f"{name}: no such device; allowed are auto, cpu, cuda, cuda:1, mps, ...", option="device"
        ) from fault
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{name}: no CUDA GPU found; use {flag('device')} cpu or auto.", option="device")
    if kind == "cpu" and offload != "none":
        raise UserError(f"{offload}: needs a GPU, and the device is {name}; use none.", option="offload")
    return name
