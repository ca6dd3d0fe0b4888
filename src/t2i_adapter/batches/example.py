"""Makes a batch of random numbers, for estimates, benchmarks and tests that need only a step's shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from t2i_adapter.types import CHUNK, Batch, text_widths


def example_batch(
    unet_config: Mapping[str, Any],
    size: int,
    *,
    height: int,
    width: int,
    channels: int = 3,
    draws: int = 1,
    length: int = CHUNK,
    device: Any = "cpu",
) -> Batch:
    """`size` random samples for a UNet, of height x width pixels, with `draws` noise samples each and `length` text
    positions."""
    h, w = height // 8, width // 8
    text, pooled = text_widths(unet_config)
    place = torch.device(device)
    return Batch(
        moments=torch.rand(size, 8, h, w, device=place),
        condition=torch.rand(size, channels, height, width, device=place),
        text=torch.randn(size, length, text, device=place),
        pooled=torch.randn(size, pooled, device=place),
        time_ids=torch.tensor([[height, width, 0, 0, height, width]] * size, device=place),
        timesteps=torch.randint(0, 1000, (size * draws,), device=place),
        noise=torch.randn(size * draws, 4, h, w, device=place),
        latent_noise=torch.randn(size * draws, 4, h, w, device=place),
        keys=tuple(map(str, range(size))),
    )
