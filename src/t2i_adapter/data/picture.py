"""Reads and decodes stored pictures: limits on size, allowed formats, and conversion to upright 8-bit RGB.

Photos and the pictures that training learns from are converted to sRGB by their colour profile (`profiles`). Condition
maps keep their numbers.
"""

from __future__ import annotations

import io
import stat
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from t2i_adapter.data import png, profiles
from t2i_adapter.errors import UserError

MAX_PIXELS = 100_000_000
"""Largest area of a picture in pixels, 10,000 x 10,000; checked in its header, before it is decoded."""

MAX_SIDE = 16_384
"""Longest side of a picture in pixels; a crop of a longer strip shows almost nothing of it."""

MAX_BYTES = 512 * 2**20
"""Largest picture file in bytes: enough for MAX_PIXELS / 2 at 16 bits a channel without compression."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
"""Formats that Pillow decodes here, besides HEIF, which needs an extra. Pillow has more; some of them start other
programs (EPS) or refer to other files."""

Color = tuple[int, int, int]
WHITE: Color = (255, 255, 255)
WIDE_GREY = ("I", "I;16", "I;16B", "I;16L", "I;16N")
MAX_LEVEL = 65535
"""Largest grey level of 16 bits."""
MIN_RANGE = 0.25
"""Share of the 16-bit range that condition maps should use: below it, fewer than 64 of 256 grey levels remain."""
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")
_SHARED_BRANDS = (b"mif1", b"msf1")  # of HEIF and AVIF files
_NOTES = "t2i_adapter"  # key in `Image.info`


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


@dataclass(frozen=True)
class Notes:
    """What decoding found out about a picture besides its pixels.

    Attributes:
        levels: (lowest, highest) grey level that a picture of 16 bits stores, without 0 and 65535, which often mark
            pixels without a value. None for 8 bits, or if there are no other levels.
        is_transparent: whether the background colour is visible in it.
        colours: why its colours may be off, or "". Only a photo has it.
    """

    levels: tuple[int, int] | None = None
    is_transparent: bool = False
    colours: str = ""


def notes_of(picture: Image.Image) -> Notes:
    """The notes of a picture that `decode` returned."""
    return picture.info.get(_NOTES, Notes())


def decode(stored: StoredPicture, background: Color = WHITE, *, is_photo: bool = False) -> Image.Image:
    """The picture as RGB, upright (EXIF), transparency over `background`, 16-bit grey scaled to 8 bits.

    A photo, whose colours matter to people, is converted to sRGB by its colour profile. If that is not possible, its
    pixels stay as they are and a warning is printed. `notes_of` the picture returns what else was found out. Raises
    UserError.
    """
    if stored.render:
        return stored.render()
    if not stored.data:
        raise UserError(f"{stored.name}: the file is empty; a picture is needed.", kind="empty")
    try:
        picture, profile = _open(stored)
        _check_header(picture, stored.name)
        picture.load()
        _check_header(picture, stored.name)  # the size in a HEIF file's header may be wrong
        upright = ImageOps.exif_transpose(picture)
        if upright.mode == "F":
            text = f"{stored.name}: holds floating point numbers, whose range is not known; save it with 8 or 16 bits."
            raise UserError(text, kind="unreadable")
        levels, colours = None, ""
        if upright.mode in WIDE_GREY:
            upright, levels = _scale_to_8_bits(upright, stored.name)
        if is_photo:
            upright, colours = _to_srgb(upright, profile, picture.getexif(), stored.name)
        result, is_transparent = _flatten(upright, background)
    except Image.DecompressionBombError as fault:
        text = f"{stored.name}: too large to decode ({fault}); at most {MAX_PIXELS:,} pixels."
        raise UserError(text, kind="huge") from fault
    except UnidentifiedImageError:
        text = f"{stored.name}: not a picture that can be read ({len(stored.data)} bytes)."
        raise UserError(text, kind="unreadable") from None
    except UserError:
        raise
    except Exception as fault:  # Pillow's decoders raise many types of errors for damaged files
        by = "HEIC picture, as the extra [heif] reads it" if _is_heif(stored.data) else "picture"
        raise UserError(f"{stored.name}: damaged {by}: {fault}.", kind="unreadable") from fault
    result.info = {_NOTES: Notes(levels, is_transparent, colours)}  # without the profile, which does not fit any more
    return result


def narrow_range(low: int, high: int) -> str:
    """A sentence about condition maps that use less than MIN_RANGE of the 16-bit range, or "". `low` and `high` are
    their lowest and highest stored grey level."""
    share = (high - low) / MAX_LEVEL
    if share >= MIN_RANGE:
        return ""
    first, last = (_to_8_bits(level) for level in (low, high))
    return (
        f"they use {share:.0%} of the 16-bit range ({low} to {high} of 0 to {MAX_LEVEL}), so {last - first + 1} of 256 "
        f"grey levels remain ({first} to {last}); all would remain if each value became (value - {low}) x {MAX_LEVEL} "
        f"/ {max(1, high - low)}"
    )


def _open(stored: StoredPicture) -> tuple[Image.Image, bytes | None]:
    """The picture with its header read, and its colour profile: None if there is none, empty if it is damaged."""
    if stored.data.startswith(png.SIGNATURE):
        data, profile = png.split(stored.data, profiles.MAX_PROFILE_BYTES)
        return _open_by_pillow(data), profile
    picture = _open_heif(stored) if _is_heif(stored.data) else _open_by_pillow(stored.data)
    profile = picture.info.get("icc_profile", None)
    return picture, b"" if profile is None and "icc_profile" in picture.info else profile


def _open_by_pillow(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `_check_header` has its own limit
        return Image.open(io.BytesIO(data), formats=_formats())


def _is_heif(data: bytes) -> bool:
    """Whether a file's first box names a brand of HEIF, and not of AVIF, which Pillow reads itself."""
    if data[4:8] != b"ftyp":
        return False
    brands = data[: int.from_bytes(data[:4])][8:256]
    return data[8:12] in _HEIF_BRANDS or (data[8:12] in _SHARED_BRANDS and b"avif" not in brands)


def _open_heif(stored: StoredPicture) -> Image.Image:
    try:
        from pillow_heif import HeifImageFile  # imported when the first HEIF file is met
    except ImportError:
        text = f"{stored.name}: a HEIC or HEIF picture needs an extra: pip install 'sdxl-t2i-adapter[heif]'."
        raise UserError(f"{text} Or save it as JPEG or PNG.", kind="heif") from None
    return HeifImageFile(io.BytesIO(stored.data))


def _to_srgb(picture: Image.Image, profile: bytes | None, exif: Image.Exif, name: str) -> tuple[Image.Image, str]:
    """The picture in sRGB, and why its colours may be off ("" if they are right)."""
    if profile is None:
        return picture, "Adobe RGB by its EXIF data, without a profile" if profiles.is_adobe_rgb(exif) else ""
    try:
        return profiles.to_srgb(picture, profile), ""
    except profiles.ProfileError as fault:
        profiles.warn(name, str(fault))
        return picture, f"profile ignored: {fault}"


def _flatten(picture: Image.Image, background: Color) -> tuple[Image.Image, bool]:
    """The picture as RGB, composited over `background`; and whether the background is visible in it."""
    if not picture.has_transparency_data:
        return picture.convert("RGB"), False
    layered = picture.convert("RGBA")
    ground = Image.new("RGBA", picture.size, background)
    ground.alpha_composite(layered)
    return ground.convert("RGB"), layered.getchannel("A").getextrema() != (255, 255)


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
    # Not n_frames, which reads a whole GIF. MPO is a JPEG with a camera's preview as second frame. A HEIF file may hold
    # several stills, one of which is marked as the picture.
    if getattr(picture, "is_animated", False) and picture.format not in ("MPO", "HEIF"):
        text = f"{name}: animated, several frames; save one frame as a still picture."
        raise UserError(text, kind="unreadable")


def _scale_to_8_bits(picture: Image.Image, name: str) -> tuple[Image.Image, tuple[int, int] | None]:
    """The picture in mode L, and its stored levels (`Notes.levels`)."""
    values = np.asarray(picture).astype(np.int32)
    if values.min() < 0 or values.max() > MAX_LEVEL:
        text = f"{name}: grey levels {values.min()}..{values.max()}; allowed are 8 or 16 bits (0..65535)."
        raise UserError(text, kind="unreadable")
    inner = values[(values > 0) & (values < MAX_LEVEL)]
    levels = (int(inner.min()), int(inner.max())) if len(inner) else None
    return Image.fromarray(_to_8_bits(values).astype(np.uint8)), levels


def _to_8_bits(level: Any) -> Any:
    """0..65535 -> 0..255, rounded; an integer or an array of them."""
    return (level + 128) // 257
