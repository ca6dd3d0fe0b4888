"""A person's condition picture, cut to size as training cuts its own."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from t2i_adapter.sources import geometry
from t2i_adapter.sources.picture import StoredPicture, decode, read_file
from t2i_adapter.types import Geometry

RESAMPLE: geometry.Resample = "bicubic"


def read_condition(path: str, flag: str = "--image") -> Image.Image:
    """The picture in a file: RGB, upright. Raises UserError naming the flag and the file."""
    file = Path(path).expanduser()
    return decode(StoredPicture(f"{flag} {path}", read_file(file, flag)))


def fit(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scaled so that it covers `size` (height, width), and its centre cut out."""
    return geometry.apply(picture, cover((picture.height, picture.width), size), RESAMPLE)


def cover(original: tuple[int, int], target: tuple[int, int]) -> Geometry:
    """`geometry.plan` for any target: the smallest scale that covers it, then the centre. All (height, width)."""
    scale = max(t / o for t, o in zip(target, original, strict=True))
    height, width = (max(t, round(o * scale)) for t, o in zip(target, original, strict=True))
    return Geometry(original, (height, width), ((height - target[0]) // 2, (width - target[1]) // 2), target)
