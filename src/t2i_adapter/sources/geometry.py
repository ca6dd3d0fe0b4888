"""One affine map for both pictures of a pair: what part of the original is cut out, and at what scale."""

from __future__ import annotations

from typing import Literal

from PIL import Image

from t2i_adapter.types import Geometry

Resample = Literal["bicubic", "bilinear", "nearest"]

FILTERS: dict[Resample, Image.Resampling] = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}
"""Pillow widens the first two with the scale, so that shrinking does not alias; `nearest` keeps label values."""


def plan(original: tuple[int, int], resolution: int) -> Geometry:
    """The shorter side is scaled to `resolution` and the centre is cut out; sizes are (height, width) in pixels."""
    height, width = original
    scale = resolution / min(height, width)
    resized = max(resolution, round(height * scale)), max(resolution, round(width * scale))
    top_left = (resized[0] - resolution) // 2, (resized[1] - resolution) // 2
    return Geometry(original=original, resized=resized, top_left=top_left, target=(resolution, resolution))


def apply(picture: Image.Image, geometry: Geometry, resample: Resample) -> Image.Image:
    """Cuts the crop out of `picture`, which may have another size than `geometry.original` but covers the same view.

    Resize and crop are one step: the crop's corners go back to the picture's own coordinates, and only what lies
    between them is resampled. Pixels are squares whose centres lie at half coordinates, so that pictures of
    different sizes fall on each other to the sub-pixel, and a long thin picture is never blown up as a whole.
    """
    (top, left), (height, width) = geometry.top_left, geometry.target
    up, across = picture.height / geometry.resized[0], picture.width / geometry.resized[1]
    bottom, right = min((top + height) * up, picture.height), min((left + width) * across, picture.width)
    return picture.resize((width, height), FILTERS[resample], box=(left * across, top * up, right, bottom))


def aspect_gap(image: tuple[int, int], condition: tuple[int, int]) -> float:
    """How far apart two pictures' aspects are, in pixels of the smaller error; 0 is the same aspect, and up to 1
    is what rounding a size to whole pixels makes. Sizes are (height, width)."""
    (h, w), (ch, cw) = image, condition
    gaps = abs(h * cw / ch - w), abs(w * ch / cw - h), abs(ch * w / h - cw), abs(cw * h / w - ch)
    return min(gaps)
