"""Loads the base for training: on the device, quantised, compiled or checkpointed as the options say."""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm

from t2i_adapter.config.tree import Config
from t2i_adapter.diffusion.schedule import NoiseSchedule
from t2i_adapter.models.base import Base, enable_gradient_checkpointing
from t2i_adapter.models.quantize import quantize
from t2i_adapter.training import compile as compiled
from t2i_adapter.training.step import FrozenModel


def load_frozen_model(
    config: Config, base: Base, device: torch.device, dtype: torch.dtype, *, steps: int | None = None
) -> FrozenModel:
    """The base's UNet, schedule and latent scale on the device.

    dtype: the UNet's weights and arithmetic. steps: updates of the run, for a warning if they are too few to compile.
    """
    unet = _unet(config, base, device, dtype)
    compiled.compile_unet(unet, device, config.train.compile, steps, tqdm.write)
    return FrozenModel(unet, NoiseSchedule.of(base.scheduler()).to(device), base.latent_scale, dtype)


def _unet(config: Config, base: Base, device: torch.device, dtype: torch.dtype) -> Any:
    kind = config.base.quantize
    unet: Any = (
        base.unet(device, dtype) if kind == "none" else quantize(base.unet("cpu", dtype), kind, device).to(device)
    )
    if config.train.channels_last:
        unet.to(memory_format=torch.channels_last)
    if config.train.xformers:
        unet.enable_xformers_memory_efficient_attention()
    if config.train.gradient_checkpointing:
        enable_gradient_checkpointing(unet, config.train.checkpoint_blocks)
    return unet
