"""Pictures that are there twice: the same pixels, or the same view saved once more at another size or quality."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import cv2
import numpy as np
from PIL import Image

NEAR_BITS = 6
"""Bits of 64 in which the looks of two savings of one picture may differ, at most."""

NEAR_LEVELS = 40
"""Grey levels that two savings of one picture may differ by in any of 32 x 32 cells, at most."""

_CELLS = 32
_BITS = 8  # per side: the 64 lowest frequencies of the 32 x 32
_NEIGHBOURS = 16


def pixels_hash(picture: Image.Image) -> int:
    """64 bits that equal pictures share, and practically no others."""
    whole = hashlib.blake2b(f"{picture.mode} {picture.size}".encode(), digest_size=8)
    whole.update(picture.tobytes())
    return int.from_bytes(whole.digest())


def look(picture: Image.Image) -> int:
    """64 bits that change little when a picture is saved anew: the signs of its lowest frequencies against their
    median."""
    small = cv2.resize(np.asarray(picture.convert("L")), (_CELLS, _CELLS), interpolation=cv2.INTER_AREA)
    lowest = cv2.dct(small.astype(np.float32))[:_BITS, :_BITS].ravel()
    return int.from_bytes(np.packbits(lowest > np.median(lowest[1:])).tobytes())


def same_view(first: Image.Image, second: Image.Image) -> bool:
    """Whether two RGB pictures differ nowhere by more than saving them anew does."""
    cells = (
        cv2.resize(np.asarray(picture), (_CELLS, _CELLS), interpolation=cv2.INTER_AREA).astype(np.int16)
        for picture in (first, second)
    )
    return bool(np.abs(next(cells) - next(cells)).max() <= NEAR_LEVELS)


def equal_groups(hashes: np.ndarray) -> Iterator[list[int]]:
    """(N,) uint64 -> the places of each value that is there more than once, ascending."""
    order = np.argsort(hashes, kind="stable")
    ends = np.flatnonzero(np.diff(hashes[order])) + 1
    yield from (group.tolist() for group in np.split(order, ends) if len(group) > 1)


def near_pairs(looks: np.ndarray, most: int) -> list[tuple[int, int]]:
    """(N,) uint64 -> pairs of places whose looks differ in NEAR_BITS bits at most, ascending; about `most` of them.

    The looks are sorted four times, each time with other 16 bits in front, and each is compared with those that then
    follow it, the next first: N log N, and sure to meet nearly all pairs that differ in 3 bits or fewer.
    """
    orders = [np.argsort(_turned(looks, bits), kind="stable") for bits in range(0, 64, 16)]
    found: set[tuple[int, int]] = set()
    for step in range(1, min(_NEIGHBOURS, len(looks) - 1) + 1):
        for order in orders:
            first, second = order[:-step], order[step:]
            near = np.flatnonzero(_count_bits(looks[first] ^ looks[second]) <= NEAR_BITS)[:most]
            pairs = np.sort(np.stack([first[near], second[near]], axis=1), axis=1)
            found.update(map(tuple, pairs.tolist()))
        if len(found) >= most:
            break
    return sorted(found)


def confirmed(pairs: list[tuple[int, int]], open_image: Callable[[int], Image.Image]) -> list[tuple[int, int]]:
    """The pairs whose pictures show the same view, by a look at the pictures themselves."""
    return [(first, second) for first, second in pairs if same_view(open_image(first), open_image(second))]


def _turned(looks: np.ndarray, bits: int) -> np.ndarray:
    """The bits of each moved round, so that those from number `bits` on come first."""
    return (looks << np.uint64(bits)) | (looks >> np.uint64(64 - bits)) if bits else looks


def _count_bits(values: np.ndarray) -> np.ndarray:
    return np.unpackbits(np.ascontiguousarray(values)[:, None].view(np.uint8), axis=1).sum(axis=1)
