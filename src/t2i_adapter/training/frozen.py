"""The frozen base as a run uses it: placed, and made fast and small as the options say."""

from __future__ import annotations

from typing import Any

import torch

from t2i_adapter.config import Config
from t2i_adapter.diffusion.schedule import NoiseSchedule
from t2i_adapter.models.base import Base
from t2i_adapter.training.step import Frozen


def load_frozen(config: Config, base: Base, device: torch.device, dtype: torch.dtype) -> Frozen:
    """The base's UNet, schedule and latent scale on the device; dtype: the UNet's weights and arithmetic."""
    return Frozen(
        _unet(config, base, device, dtype), NoiseSchedule.of(base.scheduler()).to(device), base.latent_scale, dtype
    )


def _unet(config: Config, base: Base, device: torch.device, dtype: torch.dtype) -> Any:
    unet = base.unet(device, dtype)
    if config.train.xformers:
        unet.enable_xformers_memory_efficient_attention()
    if config.train.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet
