"""The base's encoders as functions: captions to text states, pixels to VAE moments, moments to the UNet's latents.

Letters: N captions or images, L text positions (`types.text_length`), D text width, P pooled width; H, W in pixels,
h, w = H/8, W/8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from t2i_adapter.devices import FittingParts, send
from t2i_adapter.errors import flag
from t2i_adapter.types import CHUNK, CHUNK_TOKENS, count_chunks, text_length

GPU_BATCH_PIXELS = 4 * 1024**2
"""Pixels that are encoded at a time on a GPU."""
CPU_BATCH_PIXELS = 8 * 128**2
"""Pixels that a CPU encodes at a time: larger batches exceed its caches (benchmarks/results/speed_options_*.json)."""
FIRST_SCALE = 0.18215
"""Factor of the first VAE of Stable Diffusion, whose config does not name it (2112.10752, appendix G)."""
ENCODING_REMEDY = f"use a lower {flag('data.resolution')}, or a device with more memory"
CAPTION_REMEDY = f"use a lower {flag('data.max_tokens')}, or a device with more memory"
_TOKENIZER_LOCK = Lock()
"""Tokenizers store the padding and truncation of a call in themselves, so only one thread at a time may call one."""


@dataclass
class TextEncoder:
    """A base's tokenizers and text encoders as one function: two of each in SDXL, one in Stable Diffusion 1 and 2."""

    tokenizers: tuple[Any, ...]
    encoders: tuple[Any, ...]
    device: torch.device
    _parts: FittingParts[tuple[Tensor, Tensor]] = field(
        default_factory=lambda: FittingParts("captions", CAPTION_REMEDY), repr=False
    )

    @classmethod
    def of(cls, pipeline: Any) -> TextEncoder:
        """Takes the tokenizers and text encoders of a pipeline of diffusers."""
        tokenizers, encoders = (
            tuple(getattr(pipeline, f"{part}{end}") for end in ("", "_2") if hasattr(pipeline, f"{part}{end}"))
            for part in ("tokenizer", "text_encoder")
        )
        return cls(tokenizers, encoders, pipeline._execution_device)

    def count_tokens(self, caption: str) -> int:
        """Returns the caption's tokens, start and end excluded."""
        return count_tokens(self.tokenizers[0], caption)

    @torch.no_grad()
    def encode(self, captions: Sequence[str], max_tokens: int = CHUNK_TOKENS) -> tuple[Tensor, Tensor]:
        """N captions -> states (N,L,D) and pooled (N,P), in the encoders' dtype. L is `text_length(max_tokens)`.

        Of SDXL's two encoders, the states are the last but one hidden layers, concatenated; the pooled vector is the
        second encoder's projection of its end token (SDXL report, 2307.01952, section 2.1). Of a single encoder, as
        Stable Diffusion 1 and 2 have it, the states are its last layer after the final norm, and P is 0.

        A caption of more than 75 tokens is split after every 75th. Each chunk is encoded alone, with its own start and
        end; the states of all chunks follow one another, and the pooled vector is the first chunk's. The chunks are
        then repeated to L positions. Attention is a mean over the positions with weights that sum to 1, so repeating
        all of them an equal number of times does not change it: a caption means the same to the UNet whatever
        `max_tokens` is. Empty chunks as padding would change it.

        If memory runs out, the captions are encoded in smaller parts. Raises UserError if a single one does not fit.
        """

        def encoded(start: int, stop: int) -> tuple[Tensor, Tensor]:
            return self._encode(captions[start:stop], max_tokens)

        states, pooled = zip(*self._parts(encoded, len(captions), len(captions), self.device), strict=True)
        return (states[0], pooled[0]) if len(states) == 1 else (torch.cat(states), torch.cat(pooled))

    def _encode(self, captions: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
        hidden, pooled = [], None
        counts: list[int] = []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            chunks = [_split(tokenizer, caption, max_tokens) for caption in captions]
            counts = [len(one) for one in chunks]
            ids = send(torch.tensor([chunk for one in chunks for chunk in one]), self.device)
            output = encoder(ids, output_hidden_states=True)
            if len(self.encoders) == 1:
                hidden.append(output.last_hidden_state)
                pooled = output.last_hidden_state[:, 0, :0]
            else:
                hidden.append(output.hidden_states[-2])
                pooled = output[0]
        assert pooled is not None
        states = torch.cat(hidden, dim=-1)
        if max_tokens == CHUNK_TOKENS:
            return states, pooled
        length = text_length(max_tokens)
        joined = [some.flatten(0, 1).repeat(length // (CHUNK * len(some)), 1) for some in states.split(counts)]
        firsts = [sum(counts[:index]) for index in range(len(counts))]
        return torch.stack(joined), torch.stack([pooled[first] for first in firsts])


def _split(tokenizer: Any, caption: str, max_tokens: int) -> list[list[int]]:
    """Returns the token ids of the caption's chunks, each with start, end and padding to 77 positions."""
    with _TOKENIZER_LOCK:
        start, *tokens, end = tokenizer(caption, truncation=False, verbose=False).input_ids
    parts = [
        tokens[CHUNK_TOKENS * index : min(CHUNK_TOKENS * (index + 1), max_tokens)]
        for index in range(count_chunks(len(tokens), max_tokens))
    ]
    return [[start, *part, end, *[tokenizer.pad_token_id] * (CHUNK_TOKENS - len(part))] for part in parts]


def count_tokens(tokenizer: Any, caption: str) -> int:
    """Returns the caption's tokens, start and end excluded."""
    with _TOKENIZER_LOCK:
        return len(tokenizer(caption, truncation=False, verbose=False).input_ids) - 2


def text_beyond(tokenizer: Any, caption: str, max_tokens: int) -> str:
    """Returns the part of the caption that lies beyond `max_tokens` tokens."""
    with _TOKENIZER_LOCK:
        offsets = tokenizer(caption, truncation=False, verbose=False, return_offsets_mapping=True).offset_mapping
    return "" if len(offsets) <= max_tokens + 2 else caption[offsets[max_tokens + 1][0] :]


@dataclass
class LatentEncoder:
    """The VAE's encoder. It runs in float32, because SDXL's own VAE overflows in fp16."""

    vae: Any
    device: torch.device
    factor: int = 8
    parts: FittingParts[Tensor] = field(
        default_factory=lambda: FittingParts("pictures to encode", ENCODING_REMEDY), repr=False
    )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images (N,3,H,W) in [0,1] -> moments (N,8,h,w) float32: mean and standard deviation, before scaling."""
        posterior = self.vae.encode(images.to(self.device, torch.float32) * 2 - 1).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1)


def encode_pixels(encoder: LatentEncoder, pixels: Tensor) -> Tensor:
    """pixels (N,3,H,W) uint8 on the encoder's device -> moments (N,8,h,w) float16, `batch_size` images at a time.

    If memory runs out, fewer at a time. Raises UserError if a single one does not fit.
    """

    def encoded(start: int, stop: int) -> Tensor:
        return encoder.encode(pixels[start:stop].float() / 255).half()

    size = batch_size(pixels.shape[-2] * pixels.shape[-1], pixels.device)
    return torch.cat(list(encoder.parts(encoded, len(pixels), size, pixels.device)))


def batch_size(pixels: int, device: torch.device | str) -> int:
    """Returns how many images of `pixels` pixels each are encoded at a time, 1 to 32."""
    most = CPU_BATCH_PIXELS if torch.device(device).type == "cpu" else GPU_BATCH_PIXELS
    return max(1, min(32, most // pixels))


@dataclass(frozen=True)
class LatentScale:
    """From the VAE's latents z to the UNet's: (z - shift) * scale, per channel."""

    shift: tuple[float, ...]
    scale: tuple[float, ...]

    @classmethod
    def of(cls, vae_config: dict[str, Any]) -> LatentScale:
        """Reads a diffusers VAE's config; only some SDXL descendants have `latents_mean` and `latents_std`."""
        channels = vae_config["latent_channels"]
        mean = vae_config.get("latents_mean") or [0.0] * channels
        std = vae_config.get("latents_std") or [1.0] * channels
        factor = vae_config.get("scaling_factor", FIRST_SCALE)
        return cls(tuple(mean), tuple(factor / s for s in std))

    def sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Samples UNet latents (B,4,h,w) from moments (B,8,h,w) with standard normal noise (B,4,h,w)."""
        mean, std = moments.chunk(2, dim=1)
        shift, scale = (_constant(values, moments.device, moments.dtype) for values in (self.shift, self.scale))
        return (mean + std * noise - shift) * scale


@lru_cache(maxsize=16)
def _constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor | float:
    """One number if all channels have the same, else (1,C,1,1), copied to the device once."""
    if len(set(values)) == 1:
        return values[0]
    with torch.inference_mode(False):
        return send(torch.tensor(values, dtype=dtype), device).view(1, -1, 1, 1)
