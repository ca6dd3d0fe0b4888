"""A person's condition picture, cut to size as training cuts its own."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from t2i_adapter.sources import geometry
from t2i_adapter.sources.picture import StoredPicture, decode, read_file
from t2i_adapter.types import Geometry

CONDITION_FILTER: geometry.Resample = "bilinear"  # as cache.prepare has it


def read_condition(path: str, flag: str = "--image") -> Image.Image:
    """The picture in a file: RGB, upright. Raises UserError naming the flag and the file."""
    file = Path(path).expanduser()
    return decode(StoredPicture(f"{flag} {path}", read_file(file, flag)))


def fit_condition(picture: Image.Image, size: tuple[int, int], channels: int) -> Image.Image:
    """A condition as the adapter takes it: 1 (grey) or 3 channels, scaled to cover `size` (height, width), its centre
    cut out."""
    return fit(picture.convert("L" if channels == 1 else "RGB"), size, CONDITION_FILTER)


def fit(picture: Image.Image, size: tuple[int, int], resample: geometry.Resample) -> Image.Image:
    """Scaled so that it covers `size` (height, width), and its centre cut out."""
    return geometry.apply(picture, cover((picture.height, picture.width), size), resample)


def cover(original: tuple[int, int], target: tuple[int, int]) -> Geometry:
    """`geometry.plan` for any target: the smallest scale that covers it, then the centre. All (height, width)."""
    scale = max(t / o for t, o in zip(target, original, strict=True))
    height, width = (max(t, round(o * scale)) for t, o in zip(target, original, strict=True))
    return Geometry(original, (height, width), ((height - target[0]) // 2, (width - target[1]) // 2), target)
