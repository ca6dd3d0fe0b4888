"""A batch of random content, for what only needs a step's shapes: estimates, benchmarks, tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from t2i_adapter.types import TOKENS, Batch, text_widths


def example_batch(
    unet_config: Mapping[str, Any],
    size: int,
    *,
    height: int,
    width: int,
    channels: int = 3,
    draws: int = 1,
    device: Any = "cpu",
) -> Batch:
    """`size` samples of random content for a UNet, their pictures height x width pixels, with `draws` of noise each."""
    h, w = height // 8, width // 8
    text, pooled = text_widths(unet_config)
    place = torch.device(device)
    return Batch(
        moments=torch.rand(size, 8, h, w, device=place),
        condition=torch.rand(size, channels, height, width, device=place),
        text=torch.randn(size, TOKENS, text, device=place),
        pooled=torch.randn(size, pooled, device=place),
        time_ids=torch.tensor([[height, width, 0, 0, height, width]] * size, device=place),
        timesteps=torch.randint(0, 1000, (size * draws,), device=place),
        noise=torch.randn(size * draws, 4, h, w, device=place),
        latent_noise=torch.randn(size * draws, 4, h, w, device=place),
        keys=tuple(map(str, range(size))),
    )
