"""A sample cut to size: image and condition of one view, by one map."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from t2i_adapter.conditions.mirror import Kind, exchange_sides
from t2i_adapter.conditions.table import Annotator, annotate
from t2i_adapter.errors import UserError
from t2i_adapter.sources.geometry import Framing, Resample, apply
from t2i_adapter.types import Geometry, Sample

IMAGE_FILTER: Resample = "bicubic"
LABEL_FILTER: Resample = "nearest"
CONDITION_FILTER: Resample = "bilinear"


@dataclass(frozen=True)
class Cut:
    """A pair ready for the encoder: image (3,H,W) u8 and condition (C,H,W) u8 of one view of a sample.

    The condition is read-only; a grey one in three channels is one in memory. Where it is left to chance the image
    stands in its place, for `redraw`.
    """

    key: str
    digest: str
    view: int
    image: np.ndarray
    condition: np.ndarray
    geometry: Geometry


def cut(
    sample: Sample,
    framing: Framing,
    view: int,
    in_channels: int,
    kind: Kind = "map",
    annotator: Annotator | None = None,
) -> Cut:
    """View `view` of a sample, cut as `framing` says.

    Args:
        view: in range(framing.count).
        in_channels: of the condition, 1 (grey) or 3.
        kind: what the condition's colours mean (`DataOptions.condition_kind`).
        annotator: makes the condition from the cut image; None takes the sample's own condition picture.

    Raises UserError naming the sample where it has no condition picture and needs one.
    """
    assert in_channels in (1, 3)
    size = sample.image.height, sample.image.width
    geometry = framing.plan(size, sample.digest, view)
    image = apply(sample.image, geometry, IMAGE_FILTER)
    pixels = channels_first(image)
    if annotator is None:
        condition = _as_condition(_cut_condition(sample, geometry, in_channels, kind), in_channels)
    elif annotator.chance:
        condition = pixels
    else:
        condition = _as_condition(annotate(annotator, image), in_channels)
    return Cut(sample.key, sample.digest, view, pixels, condition, geometry)


def redraw(pixels: np.ndarray, in_channels: int, annotator: Annotator, draw: str) -> np.ndarray:
    """The condition (C,H,W) u8, read-only, of a cut image (3,H,W) u8, by an annotator with chance: what is drawn is a
    function of `draw`."""
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return _as_condition(annotate(annotator, image, draw), in_channels)


def _as_condition(picture: Image.Image, in_channels: int) -> np.ndarray:
    values = channels_first(picture.convert("L") if in_channels == 1 else picture)
    return np.broadcast_to(values, (in_channels, picture.height, picture.width))


def channels_first(picture: Image.Image) -> np.ndarray:
    """(H,W) or (H,W,C) u8 -> (C,H,W) u8, contiguous.

    Not a transposed view: torch would take it for channels_last, whose GroupNorm on the CPU forms the variance as
    E[x^2] - E[x]^2 and is off by 1e-3 where a picture is flat.
    """
    values = np.asarray(picture)
    return values[None] if values.ndim == 2 else np.ascontiguousarray(values.transpose(2, 0, 1))


def _cut_condition(sample: Sample, geometry: Geometry, in_channels: int, kind: Kind) -> Image.Image:
    condition = sample.condition
    if condition is None:
        raise UserError(
            f"{sample.key}: has no condition picture, and one is needed to train. "
            "Add it, or name an annotator that makes it from the image with --data.condition."
        )
    if geometry.flipped:
        condition = exchange_sides(condition, kind)  # before resampling, while colours are whole
    if in_channels == 1:
        condition = condition.convert("L")
    return apply(condition, geometry, LABEL_FILTER if kind == "labels" else CONDITION_FILTER)
