"""Pictures to the facts about their latents, and facts to latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class LatentEncoder:
    """The VAE's encoder. It runs in float32: SDXL's own VAE overflows in fp16."""

    vae: Any
    device: torch.device
    factor: int = 8

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images (N,3,H,W) in [0,1] -> moments (N,8,h,w) float32: mean and standard deviation, before scaling."""
        posterior = self.vae.encode(images.to(self.device, torch.float32) * 2 - 1).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1)


@dataclass(frozen=True)
class LatentScale:
    """Between the VAE's latents and the UNet's: (z - shift) * scale, per channel."""

    shift: tuple[float, ...]
    scale: tuple[float, ...]

    @classmethod
    def of(cls, vae_config: dict[str, Any]) -> LatentScale:
        """Reads a diffusers VAE's config; `latents_mean` and `latents_std` are there in some SDXL descendants only."""
        channels = vae_config["latent_channels"]
        mean = vae_config.get("latents_mean") or [0.0] * channels
        std = vae_config.get("latents_std") or [1.0] * channels
        factor = vae_config["scaling_factor"]
        return cls(tuple(mean), tuple(factor / s for s in std))

    def sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Draws UNet latents (B,4,h,w) from moments (B,8,h,w) with standard normal noise (B,4,h,w)."""
        mean, std = moments.chunk(2, dim=1)
        shift = moments.new_tensor(self.shift).view(1, -1, 1, 1)
        scale = moments.new_tensor(self.scale).view(1, -1, 1, 1)
        return (mean + std * noise - shift) * scale
