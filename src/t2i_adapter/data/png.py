"""Splits a PNG file into its picture and its colour profile, and drops its texts.

Programs that generate pictures write megabytes of text into PNG files. Pillow unpacks every text, and refuses a file
whose texts or profile exceed its limits. Here texts are dropped without unpacking them.
"""

from __future__ import annotations

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_CHUNKS = 200_000
"""A picture of 100 megapixels with the usual 8 KiB a chunk has 73,000."""
MAX_TEXT_BYTES = 2**20
"""Largest text that is kept, in bytes, stored and unpacked. It is Pillow's limit too."""

_HEAD = struct.Struct(">I4s")  # a chunk's length and type; its data and 4 bytes of checksum follow
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_ORIENTATION = (b"exif", b"Raw profile type exif", b"XML:com.adobe.xmp")
"""Keywords of texts that may hold the picture's orientation (EXIF or XMP)."""


def split(data: bytes, most: int) -> tuple[bytes, bytes | None]:
    """Returns the file without texts and colour profile, and the profile.

    The first text of each keyword that may hold the orientation stays. The profile is None if there is none, empty if
    it is damaged, and is cut after `most` + 1 bytes. A damaged file is returned as far as it can be read. Raises
    ValueError if the file has more than MAX_CHUNKS chunks.
    """
    pieces: list[bytes] = []
    profile: bytes | None = None
    kept: set[bytes] = set()
    start = place = len(SIGNATURE)
    for _ in range(MAX_CHUNKS):
        if place + _HEAD.size > len(data):
            break
        length, kind = _HEAD.unpack_from(data, place)
        end = place + _HEAD.size + length + 4
        if kind == b"iCCP" or kind in _TEXTS:
            content = data[place + _HEAD.size : end - 4]
            keyword = content[:80].partition(b"\0")[0]
            if kind == b"iCCP":
                profile = _unpack(content[len(keyword) + 2 :], most) if profile is None else profile
            elif keyword in _ORIENTATION and keyword not in kept and _is_small(kind, keyword, content):
                kept.add(keyword)
                place = end
                continue
            pieces.append(data[start:place])
            start = end
        elif kind == b"IEND":
            break
        place = end
    else:
        raise ValueError(f"more than {MAX_CHUNKS:,} chunks")
    return (b"".join([SIGNATURE, *pieces, data[start:]]) if pieces else data), profile


def _is_small(kind: bytes, keyword: bytes, content: bytes) -> bool:
    """Whether a text has at most MAX_TEXT_BYTES, stored and unpacked."""
    if len(content) > MAX_TEXT_BYTES:
        return False
    if kind == b"zTXt":
        packed = content[len(keyword) + 2 :]
    elif kind == b"iTXt" and content[len(keyword) + 1 : len(keyword) + 2] == b"\1":
        packed = content[len(keyword) + 3 :].split(b"\0", 2)[-1]  # after the language and the translated keyword
    else:
        return True
    return len(_unpack(packed, MAX_TEXT_BYTES)) <= MAX_TEXT_BYTES


def _unpack(packed: bytes, most: int) -> bytes:
    """Unpacks at most `most` + 1 bytes; returns b"" if they are damaged."""
    try:
        return zlib.decompressobj().decompress(packed, most + 1)
    except zlib.error:
        return b""
