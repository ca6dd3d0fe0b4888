"""Captions to the states SDXL attends to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor

_TOKENIZING = Lock()
"""A tokenizer keeps the padding and truncation of a call in itself, so that threads take turns."""


@dataclass
class TextEncoder:
    """SDXL's two tokenizers and text encoders as one function. L = 77 tokens, D text width, P pooled width."""

    tokenizers: tuple[Any, Any]
    encoders: tuple[Any, Any]
    device: torch.device
    max_tokens: int = 77

    def count_tokens(self, caption: str) -> int:
        """Tokens of a caption, start and end included; what lies beyond `max_tokens` is not seen by the model."""
        return count_tokens(self.tokenizers[0], caption)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """N captions -> states (N,L,D) and pooled (N,P), in the encoders' dtype.

        The states are both encoders' last-but-one hidden layers side by side, the pooled vector is the second
        encoder's projection of its end token (SDXL report, 2307.01952, section 2.1).
        """
        hidden, pooled = [], None
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            output = encoder(self._ids(tokenizer, captions).to(self.device), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled = output[0]
        assert pooled is not None
        return torch.cat(hidden, dim=-1), pooled

    def _ids(self, tokenizer: Any, captions: Sequence[str]) -> Tensor:
        length = self.max_tokens
        with _TOKENIZING:
            found = tokenizer(
                list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
        return found.input_ids


def count_tokens(tokenizer: Any, caption: str) -> int:
    """Tokens of a caption, start and end included."""
    with _TOKENIZING:
        return len(tokenizer(caption, truncation=False, verbose=False).input_ids)


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


IMAGE_BATCH_PIXELS = 4 * 1024**2
"""Encoded at once, on a GPU."""


CPU_BATCH_PIXELS = 8 * 128**2
"""Encoded at once, on a CPU: more than its caches hold takes longer a pixel (benchmarks/speed_options.json)."""


def encode_pixels(encoder: LatentEncoder, pixels: Tensor) -> Tensor:
    """pixels (B,3,H,W) u8 on the encoder's device -> moments (B,8,h,w) float16, a bounded number of pixels at once."""
    size = batch_size(pixels.shape[-2] * pixels.shape[-1], pixels.device)
    return torch.cat([encoder.encode(some.float() / 255).half() for some in pixels.split(size)])


def batch_size(pixels: int, device: torch.device | str) -> int:
    """How many crops of that many pixels are encoded at once."""
    most = CPU_BATCH_PIXELS if torch.device(device).type == "cpu" else IMAGE_BATCH_PIXELS
    return max(1, min(32, most // pixels))
