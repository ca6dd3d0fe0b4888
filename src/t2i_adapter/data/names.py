"""Names of files in a dataset: which are pictures, which are litter, and when two names are equal. Loads nothing."""

from __future__ import annotations

import unicodedata
from posixpath import splitext

PICTURE_ENDINGS = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpf", ".jpx", ".avif", ".avifs", ".heic", ".heif"),
)
"""Endings of picture files, in small letters: those of every format that `picture.decode` reads."""

_LITTER = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin"}


def is_picture(name: str) -> bool:
    """Whether a file's name has a picture's ending, in any case."""
    return name.lower().endswith(PICTURE_ENDINGS)


def is_litter(name: str) -> bool:
    """Whether a file or folder was left by a system (`.DS_Store`, `._a.jpg`, `__MACOSX`, `Thumbs.db`) or by an archiver
    (`PaxHeaders.0`), or is hidden.

    `name` is one name, or the path of a member of an archive: a member of a litter folder is litter too.
    """
    return any(map(_is_litter, name.split("/")))


def split_ending(name: str) -> tuple[str, str]:
    """ "a/b.v2.PNG" -> ("a/b.v2", ".png"). Works on text: a `Path` for each of a million names takes seconds."""
    stem, ending = splitext(name)
    return stem, ending.lower()


def same_form(name: str) -> str:
    """The name in Unicode's composed form (NFC): file systems and archives store the same letters in two forms."""
    return unicodedata.normalize("NFC", name)


def _is_litter(part: str) -> bool:
    low = part.lower()
    return (part.startswith(".") and part not in (".", "..")) or low in _LITTER or low.startswith("paxheader")
