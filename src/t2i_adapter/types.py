"""What crosses a boundary of the system. Importing this module loads no torch.

Letters used everywhere: B batch; H,W pixels; h,w = H/8,W/8 latent cells; C condition channels (1 or 3);
L = 77 tokens; D text width (SDXL 2048); P pooled width (SDXL 1280).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

TOKENS = 77
"""L: tokens of a caption that SDXL's text encoders read, start and end included."""


def text_widths(unet_config: Mapping[str, Any]) -> tuple[int, int]:
    """(D, P): width of the text states and of the pooled vector that a UNet takes, from its config."""
    time_ids = 6 * unet_config["addition_time_embed_dim"]
    return unet_config["cross_attention_dim"], unet_config["projection_class_embeddings_input_dim"] - time_ids


@dataclass(frozen=True)
class Sample:
    """One training pair as its source gives it, pictures decoded and upright.

    Attributes:
        key: names the row for people ("train/00017.png", or "row 17"); unique within its source.
        image: the target picture, RGB.
        condition: the condition picture (RGB or L), or None where the source has none.
        captions: one or more; the batch draws one of them.
        digest: sha256 (hex) of the stored bytes of both pictures: what the cache is keyed by.
        meta: further plain columns of the row, e.g. {"scene": "<json>"}.
    """

    key: str
    image: Image
    condition: Image | None
    captions: tuple[str, ...]
    digest: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Geometry:
    """Where a training crop lies on its original picture; all in pixels, each pair (height, width).

    `original` is the picture as stored (upright), `resized` the size it was scaled to, `top_left` the crop's corner
    on the resized picture, `target` the crop's size. `flipped` mirrors left and right after the crop.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    top_left: tuple[int, int]
    target: tuple[int, int]
    flipped: bool = False

    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """SDXL's micro-conditioning, in its order: original size, crop corner, target size (SDXL report, 2.2).

        The corner of a mirrored crop is the one it has on the mirrored picture, which is what the model sees.
        """
        top, left = self.top_left
        if self.flipped:
            left = self.resized[1] - self.target[1] - left
        return (*self.original, top, left, *self.target)


@dataclass(frozen=True)
class PartialBatch:
    """A batch as the loader builds it: all its choices made, and what no cache holds still to be encoded.

    Attributes:
        moments: (B,8,h,w) float16, or None where `pixels` are to be encoded.
        pixels: (B,3,H,W) uint8, or None.
        condition: (B,C,H,W) uint8; channels that are alike may be views of one.
        text, pooled: (B,L,D) and (B,P) float16, or None where `captions` are to be encoded.
        captions: what each sample is told, dropped ones empty.
        time_ids, timesteps, noise, latent_noise, keys: as in `Batch`.
        bad: (number, reason) of each sample that could not be read and whose place another has taken.
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
    keys: tuple[str, ...]
    bad: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Batch:
    """Everything one micro-step needs; a batch fully determines a step.

    Each sample has K draws of noise, one after another: K is 1 unless `train.noise_draws` says otherwise.

    Attributes:
        moments: (B,8,h,w) float, mean and standard deviation of the VAE's posterior, before scaling.
        condition: (B,C,H,W) float in [0,1].
        text: (B,L,D) float, both text encoders' penultimate states side by side.
        pooled: (B,P) float, the second text encoder's projection.
        time_ids: (B,6) int64.
        timesteps: (B K,) int64 in [0, T).
        noise: (B K,4,h,w) float32, what is added to the latent.
        latent_noise: (B K,4,h,w) float32, the draw from the VAE's posterior.
        keys: the samples' keys, for messages.
    """

    moments: Tensor
    condition: Tensor
    text: Tensor
    pooled: Tensor
    time_ids: Tensor
    timesteps: Tensor
    noise: Tensor
    latent_noise: Tensor
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def draws(self) -> int:
        """K, how many draws of noise each sample has."""
        return len(self.timesteps) // len(self.keys)


@dataclass(frozen=True)
class ImageRecord:
    """The facts of one training pair.

    Attributes:
        key: names the row for people.
        moments: (8,h,w) float16, mean and standard deviation of the VAE's posterior, before scaling;
            None where the picture is still to be encoded.
        condition: (C,H,W) uint8; on disk, where each draw makes its own, the crop (3,H,W).
        geometry: where the crop lies on the original picture.
        pixels: (3,H,W) uint8, the crop itself, where there are no moments.
    """

    key: str
    moments: np.ndarray | None
    condition: np.ndarray
    geometry: Geometry
    pixels: np.ndarray | None = None


@dataclass(frozen=True)
class TextRecord:
    """The facts of one caption: states (L,D) float16 and pooled (P,) float16."""

    states: np.ndarray
    pooled: np.ndarray
