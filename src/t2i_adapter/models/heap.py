"""What the C library does with memory that is freed, where that is glibc: torch's CPU tensors come from it."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""
MIB = 2**20


def keep_freed() -> None:
    """From now on what is freed is kept for the next allocation, until `give_back`.

    By itself glibc gives large pieces back to the system at once, which then clears new pages for the next picture: a
    third of the time of encoding (benchmarks/encoding.json).
    """
    _set(trim=256 * MIB)


def give_back() -> None:
    """Gives back to the system what is free, and from now on what glibc would by itself."""
    _set(trim=64 * MIB)
    if hasattr(_library(), "malloc_trim"):
        _library().malloc_trim(0)


def _set(*, trim: int) -> None:
    """trim: bytes at the end of a heap that are kept. Setting it ends glibc's own choice of what is a large piece: the
    most that it would come to is taken."""
    if hasattr(_library(), "mallopt"):
        _library().mallopt(_M_MMAP_THRESHOLD, 32 * MIB)
        _library().mallopt(_M_TRIM_THRESHOLD, trim)


@cache
def _library() -> Any:
    return ctypes.CDLL(None) if os.name == "posix" else None
