"""The forms in which a pair travels from its source to the training step (docs/design.md, "A sample's road").

Importing this module loads no torch.

Letters used everywhere: B batch; H,W pixels; h,w = H/8,W/8 latent cells; C condition channels (1 or 3);
L text positions, 77 unless captions are longer (`text_length`); D text width (SDXL 2048, Stable Diffusion 1 and 2 768
and 1024); P pooled width (SDXL 1280; 0 for Stable Diffusion, which has no pooled vector).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, overload

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

CHUNK = 77
"""Positions of a text encoder: start, up to 75 tokens, end and padding."""
CHUNK_TOKENS = CHUNK - 2
"""Tokens of a caption that fit into one chunk."""
MaxTokens = Literal[75, 150, 225]
"""Tokens of a caption that can be read: one, two or three chunks."""


def count_chunks(tokens: int, max_tokens: int) -> int:
    """Number of chunks that a caption of so many tokens, start and end excluded, takes. The first chunk always exists;
    tokens beyond `max_tokens` are cut off."""
    return max(1, math.ceil(min(tokens, max_tokens) / CHUNK_TOKENS))


def text_length(max_tokens: int) -> int:
    """L of a run whose captions may have up to `max_tokens` tokens: 77, 154 or 462 for 75, 150 or 225.

    Every caption's chunks are repeated to this length, so it is a multiple of one, two, ... max_tokens / 75 chunks.
    """
    return CHUNK * math.lcm(*range(1, max_tokens // CHUNK_TOKENS + 1))


def text_widths(unet_config: Mapping[str, Any]) -> tuple[int, int]:
    """(D, P): width of the text states and of the pooled vector that a UNet takes, from its config.

    P is 0 for a UNet without a pooled vector.
    """
    if unet_config.get("addition_embed_type") is None:
        return unet_config["cross_attention_dim"], 0
    time_ids = 6 * unet_config["addition_time_embed_dim"]
    return unet_config["cross_attention_dim"], unet_config["projection_class_embeddings_input_dim"] - time_ids


@dataclass(frozen=True)
class Photo:
    """A photo in place of a condition: the adapter's own annotator makes the condition of it. picture: or its file."""

    picture: Image | str | Path


@dataclass(frozen=True)
class Sample:
    """One training pair as its source returns it, pictures decoded and upright.

    Attributes:
        key: names the row in messages ("train/00017.png", or "row 17"); unique within its source.
        image: the target picture, RGB.
        condition: the condition picture (RGB or L), or None if the source has no condition pictures.
        captions: one or more; each draw uses one of them.
        digest: sha256 (hex) of the stored bytes of all pictures; the key in the cache is made of it.
        meta: further columns of the row, e.g. {"scene": "<json>"}.
        others: the further conditions, each as `condition`, if several adapters are trained together.
    """

    key: str
    image: Image
    condition: Image | None
    captions: tuple[str, ...]
    digest: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    others: tuple[Image | None, ...] = ()


@dataclass(frozen=True)
class Geometry:
    """Where a training crop lies on its original picture; all in pixels, each pair (height, width).

    `original` is the size of the stored picture (upright), `resized` the size it was scaled to, `top_left` the crop's
    corner on the resized picture, `target` the crop's size. `flipped` mirrors left and right after the crop.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    top_left: tuple[int, int]
    target: tuple[int, int]
    flipped: bool = False

    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """SDXL's micro-conditioning, in its order: original size, crop corner, target size (SDXL report, 2.2).

        The corner of a mirrored crop is its corner on the mirrored picture, because the model sees that picture.
        """
        top, left = self.top_left
        if self.flipped:
            left = self.resized[1] - self.target[1] - left
        return (*self.original, top, left, *self.target)


class SampleKeys(Sequence[str]):
    """The keys of some samples by their numbers. A key is looked up when it is used, because that may read the row."""

    def __init__(self, numbers: Sequence[int], key: Callable[[int], str]) -> None:
        self._numbers, self._key = numbers, key

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> SampleKeys: ...
    def __getitem__(self, index: int | slice) -> str | SampleKeys:
        if isinstance(index, slice):
            return SampleKeys(self._numbers[index], self._key)
        return self._key(self._numbers[index])


@dataclass(frozen=True)
class PartialBatch:
    """A batch as the loader builds it: all choices are made, and what is not in the cache is still to be encoded.

    Attributes:
        moments: (B,8,h,w) float16, or None if `pixels` are to be encoded.
        pixels: (B,3,H,W) uint8, or None.
        condition: (B,C,H,W) uint8; equal channels may share memory.
        text, pooled: (B,L,D) and (B,P) float16, or None if `captions` are to be encoded.
        captions: each sample's caption; "" if it is dropped.
        time_ids, timesteps, noise, latent_noise, keys, weights: as in `Batch`.
        bad: (number, reason) of each sample that could not be read and was replaced by another.
    """

    moments: Tensor | None
    pixels: Tensor | None
    condition: Tensor
    text: Tensor | None
    pooled: Tensor | None
    captions: tuple[str, ...]
    time_ids: Tensor
    timesteps: Tensor
    noise: Tensor
    latent_noise: Tensor
    keys: Sequence[str]
    bad: tuple[tuple[int, str], ...] = ()
    weights: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Everything that one micro-step needs: the loss is a function of the weights and the batch.

    Each sample has K noise samples (`train.noise_draws`), one after another.

    Attributes:
        moments: (B,8,h,w) float, mean and standard deviation of the VAE's posterior, before scaling.
        condition: (B,C,H,W) float in [0,1]; of several adapters, their conditions stacked along C.
        text: (B,L,D) float, states of the text encoders (`models.encoders.TextEncoder.encode`).
        pooled: (B,P) float, the second text encoder's projection.
        time_ids: (B,6) int64; a UNet with P = 0 does not take them.
        timesteps: (B K,) int64 in [0, T).
        noise: (B K,4,h,w) float32, added to the latent.
        latent_noise: (B K,4,h,w) float32, selects the sample from the VAE's posterior.
        keys: (B,) the samples' keys, for messages.
        weights: (B,n) float32, the factor of each of n adapters' features, 0 for one that the sample leaves out; None
            if one adapter is trained.
    """

    moments: Tensor
    condition: Tensor
    text: Tensor
    pooled: Tensor
    time_ids: Tensor
    timesteps: Tensor
    noise: Tensor
    latent_noise: Tensor
    keys: Sequence[str]
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def draws(self) -> int:
        """K, the number of noise samples of each sample."""
        return len(self.timesteps) // len(self.keys)


@dataclass(frozen=True)
class ImageRecord:
    """One view of a training pair, as the cache stores it.

    Attributes:
        moments: (8,h,w) float16, mean and standard deviation of the VAE's posterior, before scaling; None if the
            picture is still to be encoded.
        condition: (C,H,W) uint8; or the crop (3,H,W), if each draw makes a condition of its own. Several conditions
            are stacked along C.
        geometry: where the crop lies on the original picture.
        pixels: (3,H,W) uint8, the crop itself, if there are no moments.
    """

    moments: np.ndarray | None
    condition: np.ndarray
    geometry: Geometry
    pixels: np.ndarray | None = None


@dataclass(frozen=True)
class TextRecord:
    """One caption, as the cache stores it: states (L,D) float16 and pooled (P,) float16."""

    states: np.ndarray
    pooled: np.ndarray
