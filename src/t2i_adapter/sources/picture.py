"""A picture as a row stores it, read and decoded: bytes with a name for messages, then RGB and upright."""

from __future__ import annotations

import io
import os.path
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from t2i_adapter.errors import UserError

MAX_PIXELS = 100_000_000
"""A picture's largest area, 10,000 x 10,000: checked in its header, before anything is unpacked."""

BACKGROUND = (255, 255, 255)
"""What shows through transparent pixels."""

WIDE_GREY = ("I", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True)
class StoredPicture:
    """A picture's bytes as they are stored, and the file or cell they came from."""

    name: str
    data: bytes


def read_cell(value: Any, *, cell: str, roots: Iterable[Path]) -> StoredPicture:
    """The stored bytes of an image column's value: a path, bytes, or `datasets`' {"bytes", "path"}.

    Args:
        value: what the row holds.
        cell: names row and column in messages.
        roots: folders that paths may lie in; a relative path is taken from the first.
    """
    if isinstance(value, dict) and set(value) <= {"bytes", "path"} and value:
        data, path = value.get("bytes"), value.get("path")
        if data is not None:
            return StoredPicture(f"{cell} ({path})" if path else cell, data)
        value = path
    if value is None:
        raise UserError(f"{cell}: there is no picture. Every row needs one: add it or leave the row out.")
    if isinstance(value, bytes):
        return StoredPicture(cell, value)
    if isinstance(value, str):
        path = resolve(value, cell=cell, roots=list(roots))
        return StoredPicture(str(path), read_file(path, cell))
    raise UserError(f"{cell}: holds {type(value).__name__}; allowed are pictures, paths or bytes.")


def resolve(text: str, *, cell: str, roots: list[Path]) -> Path:
    """The file that a row's path names, which must lie in one of `roots`.

    The path itself is judged, not where a symbolic link leads: links are set by the folder's owner, paths by the row.
    """
    if "\0" in text:
        raise UserError(f"{cell}: {text!r} is no path: it holds a zero byte.")
    if "://" in text:
        raise UserError(f"{cell}: {text!r} is an address; only files are read. Download it and give its path.")
    if not roots:
        raise UserError(f"{cell}: {text!r} is a path, but this data set has no folder that it could lie in.")
    path = normal(roots[0] / text)
    if not any(path.is_relative_to(normal(root)) for root in roots):
        raise UserError(f"{cell}: {text!r} leaves the data folder {roots[0]}. Paths must stay in it.")
    return path


def normal(path: Path) -> Path:
    """Absolute, with `.` and `..` taken out, links kept."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - Path.resolve() would follow links


def read_file(path: Path, cell: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{cell}: {path}: no such file.") from None
    except OSError as fault:
        raise UserError(f"{cell}: {path} cannot be read: {fault.strerror}.") from fault


def decode(stored: StoredPicture) -> Image.Image:
    """RGB and upright (EXIF), transparency over white, 16-bit grey scaled to 8 bits. Raises UserError.

    Colour profiles are not applied.
    """
    if not stored.data:
        raise UserError(f"{stored.name}: the file is empty; a picture is needed.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit stands below
            picture = Image.open(io.BytesIO(stored.data))
        _check_header(picture, stored.name)
        picture.load()
        return to_rgb(ImageOps.exif_transpose(picture), stored.name)
    except Image.DecompressionBombError as fault:
        raise UserError(f"{stored.name}: too large to decode ({fault}); at most {MAX_PIXELS:,} pixels.") from fault
    except UnidentifiedImageError:
        raise UserError(f"{stored.name}: not a picture that can be read ({len(stored.data)} bytes).") from None
    except (OSError, SyntaxError, ValueError, EOFError) as fault:  # what Pillow's decoders raise on damaged files
        raise UserError(f"{stored.name}: damaged picture: {fault}.") from fault


def to_rgb(picture: Image.Image, name: str) -> Image.Image:
    """RGB with 8 bits a channel, transparency composited over white. `name` is for messages."""
    if picture.mode == "F":
        raise UserError(f"{name}: holds floating point numbers, whose range is not known; save it with 8 or 16 bits.")
    if picture.mode in WIDE_GREY:
        picture = _scale_to_8_bits(picture, name)
    if picture.has_transparency_data:
        layered = Image.new("RGBA", picture.size, BACKGROUND)
        layered.alpha_composite(picture.convert("RGBA"))
        return layered.convert("RGB")
    return picture.convert("RGB")


def _check_header(picture: Image.Image, name: str) -> None:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise UserError(f"{name}: {width}x{height} pixels; at most {MAX_PIXELS:,} are decoded. Scale it down.")
    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and picture.format != "MPO":  # cameras keep a preview as a second frame of their JPEG
        raise UserError(f"{name}: animated, {frames} frames; save the one that is meant as a still picture.")


def _scale_to_8_bits(picture: Image.Image, name: str) -> Image.Image:
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UserError(f"{name}: grey levels {values.min()}..{values.max()}; allowed are 8 or 16 bits (0..65535).")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
