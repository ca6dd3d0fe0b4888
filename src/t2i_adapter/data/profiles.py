"""Colour profiles (ICC): converts pictures to sRGB, whose colours the VAE and the annotators expect."""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image

from t2i_adapter.errors import redact

if TYPE_CHECKING:
    from PIL.ImageCms import ImageCmsTransform

MAX_PROFILE_BYTES = 4 * 2**20
"""Largest profile that is used. Profiles of cameras and screens have 0.5 to 20 KB, those of printers up to 3 MB."""
NAMED = 3
"""Pictures that are named in a process's warnings; further ones are counted."""

_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Colour space of a profile -> Pillow's mode of the pixels that it describes."""
_SAME_LEVELS = 1
"""A profile is sRGB if it changes no colour by more levels: profiles of sRGB differ by rounding."""
_GREY = ("1", "L", "LA", "La")

_warned: set[str] = set()
_count = itertools.count(1)  # thread-safe
_is_quiet = ContextVar("is_quiet", default=False)


class ProfileError(Exception):
    """A profile cannot be applied to its picture; the text says why."""


def to_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    """The picture's colours in sRGB: RGB, or RGBA if it has transparency. Returns `picture` if the profile is sRGB.

    Any mode of 8 bits a channel, or 1 bit. Raises ProfileError if the profile is damaged or describes other channels.
    """
    if len(profile) > MAX_PROFILE_BYTES:
        raise ProfileError(f"it has more than {MAX_PROFILE_BYTES // 2**20} MiB")
    conversion = _open(profile)
    if conversion.fault:
        raise ProfileError(conversion.fault)
    is_fitting = {
        "CMYK": picture.mode == "CMYK",
        "GRAY": picture.mode in _GREY,
        "RGB": picture.mode != "CMYK",  # of a grey picture too: its three channels are equal
    }[conversion.space]
    if not is_fitting:
        raise ProfileError(f"it is for {conversion.space} pixels, the picture is {picture.mode}")
    if conversion.transform is None:
        return picture
    mode = _MODES[conversion.space]
    if not picture.has_transparency_data:
        return conversion.transform.apply(picture.convert(mode))
    layered = picture.convert("LA" if mode == "L" else "RGBA")
    converted = conversion.transform.apply(layered.convert(mode))
    converted.putalpha(layered.getchannel("A"))
    return converted


def is_adobe_rgb(exif: Image.Exif) -> bool:
    """Whether EXIF data says that the colours are Adobe RGB (DCF 2.0: colour space "uncalibrated", index R03)."""
    try:
        space = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ColorSpace)
        index = exif.get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex)
    except Exception:  # Pillow raises many types of errors for damaged data
        return False
    return space == 0xFFFF and str(index).startswith("R03")


def warn(name: str, reason: str) -> None:
    """Prints that the profile of the picture `name` is ignored. Names NAMED pictures, then prints powers of ten."""
    if _is_quiet.get() or name in _warned:
        return
    if len(_warned) < 100_000:  # bounds the memory; beyond it a picture may be counted twice
        _warned.add(name)
    count = next(_count)
    line = f"{name}: its colour profile is ignored, so its colours may be off: {reason}"
    if count == NAMED:
        line += ". Further pictures are counted only; `t2i-adapter doctor` lists all"
    elif count > NAMED:
        if str(count).strip("0") != "1":
            return
        line = f"{count:,} pictures so far have a colour profile that is ignored"
    print(redact(line), file=sys.stderr, flush=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Prints no warnings within: for a caller that reports such pictures itself."""
    token = _is_quiet.set(True)
    try:
        yield
    finally:
        _is_quiet.reset(token)


@dataclass(frozen=True)
class _Conversion:
    """From a profile's colours to sRGB.

    Attributes:
        space: a key of _MODES, or "" if the profile cannot be used.
        transform: to RGB; None if the profile is sRGB. Threads may share it: lcms copies what applying changes.
        fault: why the profile cannot be used, or "".
    """

    space: str
    transform: ImageCmsTransform | None = None
    fault: str = ""


@lru_cache(maxsize=32)
def _open(profile: bytes) -> _Conversion:
    """Reads a profile's bytes; a dataset has few different ones."""
    try:
        from PIL import ImageCms

        # Relative colorimetric with black point compensation, as browsers do: white stays white and black stays
        # black. Colours that sRGB has too stay exact, which the perceptual intent does not promise. Most profiles of
        # screens and cameras have no perceptual table, so that intent would be the same for them.
        intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        source: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space not in _MODES:
            return _Conversion("", fault=f"its colour space {space} is unsupported")
        mode, srgb = _MODES[space], ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, srgb, mode, "RGB", intent, flags)
        return _Conversion(space, None if _is_identity(transform, mode) else transform)
    except ImportError:
        return _Conversion("", fault="this Pillow has no LittleCMS")
    except Exception:  # ImageCms raises many types of errors for damaged profiles, without a reason that helps
        return _Conversion("", fault="it is damaged")


def _is_identity(transform: ImageCmsTransform, mode: str) -> bool:
    """Whether the transform changes no colour of a grid by more than _SAME_LEVELS."""
    if mode == "CMYK":
        return False
    levels = np.arange(256, dtype=np.uint8)
    coarse = levels[::15]  # 18 levels with both ends
    grid = np.stack(np.meshgrid(coarse, coarse, coarse), axis=-1).reshape(1, -1, 3)
    colours = np.concatenate([grid, np.repeat(levels[None, :, None], 3, axis=2)], axis=1)
    probe = colours if mode == "RGB" else levels[None]
    result = np.asarray(transform.apply(Image.fromarray(probe))).astype(np.int16)
    return bool(np.abs(result - (probe if mode == "RGB" else probe[..., None])).max() <= _SAME_LEVELS)
