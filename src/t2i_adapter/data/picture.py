"""Reads and decodes stored pictures: limits on size, allowed formats, and conversion to upright 8-bit RGB."""

from __future__ import annotations

import io
import stat
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from t2i_adapter.errors import UserError

MAX_PIXELS = 100_000_000
"""Largest area of a picture in pixels, 10,000 x 10,000; checked in its header, before it is decoded."""

MAX_SIDE = 16_384
"""Longest side of a picture in pixels; a crop of a longer strip shows almost nothing of it."""

MAX_BYTES = 512 * 2**20
"""Largest picture file in bytes: enough for MAX_PIXELS / 2 at 16 bits a channel without compression."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
"""Formats that are decoded. Pillow has more; some of them start other programs (EPS) or refer to other files."""

Color = tuple[int, int, int]
WHITE: Color = (255, 255, 255)
WIDE_GREY = ("I", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True)
class StoredPicture:
    """A picture's stored bytes, and its file or cell for messages.

    A generated picture has `render`, which returns it (RGB); its `data` is a hash of all that determines its pixels.
    """

    name: str
    data: bytes
    render: Callable[[], Image.Image] | None = None


def color(text: str) -> Color:
    """(red, green, blue), 0 to 255, of a CSS colour name or #rrggbb. Raises UserError."""
    try:
        channels = ImageColor.getrgb(text)
    except ValueError:
        channels = ()
    if len(channels) != 3:
        message = f"{text}: allowed is a colour's name, such as white, or #rrggbb."
        raise UserError(message, option="data.background")
    return channels


def read_file(path: Path, cell: str) -> bytes:
    """The bytes of a picture's file. `cell` names its row and column in messages. Raises UserError."""
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):  # a pipe blocks, and some devices have no end
            raise UserError(
                f"{cell}: {path} is a folder, a pipe or a device; a picture's file is needed.", kind="unreadable"
            )
        check_size(state.st_size, f"{cell}: {path}")
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{cell}: {path}: no such file.", kind="missing") from None
    except (OSError, ValueError) as fault:  # ValueError: a name that no file can have
        reason = getattr(fault, "strerror", None) or fault
        raise UserError(f"{cell}: {path} cannot be read: {reason}.", kind="unreadable") from fault


def check_size(count: int, name: str) -> None:
    """Raises UserError if a picture's file is larger than MAX_BYTES. `name` is for messages."""
    if count > MAX_BYTES:
        raise UserError(f"{name}: {count:,} bytes; a picture's file has at most {MAX_BYTES:,}.", kind="unreadable")


def decode(stored: StoredPicture, background: Color = WHITE) -> Image.Image:
    """The picture as RGB, upright (EXIF), transparency over `background`, 16-bit grey scaled to 8 bits.

    Ignores colour profiles. Raises UserError.
    """
    if stored.render:
        return stored.render()
    if not stored.data:
        raise UserError(f"{stored.name}: the file is empty; a picture is needed.", kind="empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `_check_header` has its own limit
            picture = Image.open(io.BytesIO(stored.data), formats=_formats())
        _check_header(picture, stored.name)
        picture.load()
        return to_rgb(ImageOps.exif_transpose(picture), stored.name, background)
    except Image.DecompressionBombError as fault:
        text = f"{stored.name}: too large to decode ({fault}); at most {MAX_PIXELS:,} pixels."
        raise UserError(text, kind="huge") from fault
    except UnidentifiedImageError:
        text = f"{stored.name}: not a picture that can be read ({len(stored.data)} bytes)."
        raise UserError(text, kind="unreadable") from None
    except UserError:
        raise
    except Exception as fault:  # Pillow's decoders raise many types of errors for damaged files
        raise UserError(f"{stored.name}: damaged picture: {fault}.", kind="unreadable") from fault


def to_rgb(picture: Image.Image, name: str, background: Color = WHITE) -> Image.Image:
    """RGB with 8 bits a channel, transparency composited over `background`. `name` is for messages.

    Raises UserError.
    """
    if picture.mode == "F":
        text = f"{name}: holds floating point numbers, whose range is not known; save it with 8 or 16 bits."
        raise UserError(text, kind="unreadable")
    if picture.mode in WIDE_GREY:
        picture = _scale_to_8_bits(picture, name)
    if picture.has_transparency_data:
        layered = Image.new("RGBA", picture.size, background)
        layered.alpha_composite(picture.convert("RGBA"))
        return layered.convert("RGB")
    return picture.convert("RGB")


@cache
def _formats() -> list[str]:
    """The formats of FORMATS that this build of Pillow has."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _check_header(picture: Image.Image, name: str) -> None:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        text = f"{name}: {width}x{height} pixels; at most {MAX_PIXELS:,} are decoded. Scale it down."
        raise UserError(text, kind="huge")
    if max(width, height) > MAX_SIDE:
        text = f"{name}: {width}x{height} pixels; a side has at most {MAX_SIDE:,}. Scale it down, or crop it."
        raise UserError(text, kind="huge")
    # Not n_frames, which reads a whole GIF. MPO is a JPEG with a camera's preview as second frame.
    if getattr(picture, "is_animated", False) and picture.format != "MPO":
        text = f"{name}: animated, several frames; save one frame as a still picture."
        raise UserError(text, kind="unreadable")


def _scale_to_8_bits(picture: Image.Image, name: str) -> Image.Image:
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        text = f"{name}: grey levels {values.min()}..{values.max()}; allowed are 8 or 16 bits (0..65535)."
        raise UserError(text, kind="unreadable")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
