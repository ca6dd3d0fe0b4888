"""Finds duplicate pictures: the same pixels, or one picture saved again at another size or quality."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import cv2
import numpy as np
from PIL import Image

NEAR_BITS = 6
"""Bits of 64 by which the perceptual hashes of near duplicates differ at most."""

NEAR_LEVELS = 40
"""Grey levels by which near duplicates differ at most, in each of 32 x 32 cells."""

_CELLS = 32
_BITS = 8  # per side: the perceptual hash holds the 64 lowest of 32 x 32 frequencies
_NEIGHBOURS = 16  # following hashes that each hash is compared with, in every sorted order


def hash_pixels(picture: Image.Image) -> int:
    """Returns a 64-bit hash of the mode, the size and the pixels."""
    whole = hashlib.blake2b(f"{picture.mode} {picture.size}".encode(), digest_size=8)
    whole.update(picture.tobytes())
    return int.from_bytes(whole.digest())


def perceptual_hash(picture: Image.Image) -> int:
    """Returns 64 bits that change little if a picture is saved again.

    Each bit compares one of the 64 lowest DCT frequencies of the grey picture with their median.
    """
    small = cv2.resize(np.asarray(picture.convert("L")), (_CELLS, _CELLS), interpolation=cv2.INTER_AREA)
    lowest = cv2.dct(small.astype(np.float32))[:_BITS, :_BITS].ravel()
    return int.from_bytes(np.packbits(lowest > np.median(lowest[1:])).tobytes())


def is_near_duplicate(first: Image.Image, second: Image.Image) -> bool:
    """Compares two RGB pictures at 32 x 32 cells: True if no cell differs by more than NEAR_LEVELS."""
    cells = (
        cv2.resize(np.asarray(picture), (_CELLS, _CELLS), interpolation=cv2.INTER_AREA).astype(np.int16)
        for picture in (first, second)
    )
    return bool(np.abs(next(cells) - next(cells)).max() <= NEAR_LEVELS)


def equal_groups(hashes: np.ndarray) -> Iterator[list[int]]:
    """hashes: (N,) uint64. Yields, for each value that occurs more than once, its indices in ascending order."""
    order = np.argsort(hashes, kind="stable")
    ends = np.flatnonzero(np.diff(hashes[order])) + 1
    yield from (group.tolist() for group in np.split(order, ends) if len(group) > 1)


def near_pairs(hashes: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Returns pairs of indices whose perceptual hashes (N,) uint64 differ in at most NEAR_BITS bits, ascending.

    The hashes are sorted four times, each time with another 16 bits in front, and each hash is compared with its next
    _NEIGHBOURS. That takes O(N log N) and finds nearly all pairs that differ in 3 bits or fewer. The search stops after
    about `most` pairs.
    """
    orders = [np.argsort(_rotated(hashes, bits), kind="stable") for bits in range(0, 64, 16)]
    found: set[tuple[int, int]] = set()
    for step in range(1, min(_NEIGHBOURS, len(hashes) - 1) + 1):
        for order in orders:
            first, second = order[:-step], order[step:]
            near = np.flatnonzero(_count_bits(hashes[first] ^ hashes[second]) <= NEAR_BITS)[:most]
            pairs = np.sort(np.stack([first[near], second[near]], axis=1), axis=1)
            found.update(map(tuple, pairs.tolist()))
        if len(found) >= most:
            break
    return sorted(found)


def confirm_pairs(pairs: list[tuple[int, int]], open_image: Callable[[int], Image.Image]) -> list[tuple[int, int]]:
    """Opens the pictures of each pair and returns the pairs that are near duplicates."""
    return [pair for pair in pairs if is_near_duplicate(open_image(pair[0]), open_image(pair[1]))]


def _rotated(hashes: np.ndarray, bits: int) -> np.ndarray:
    """Rotates each hash to the left by `bits`."""
    return (hashes << np.uint64(bits)) | (hashes >> np.uint64(64 - bits)) if bits else hashes


def _count_bits(values: np.ndarray) -> np.ndarray:
    return np.unpackbits(np.ascontiguousarray(values)[:, None].view(np.uint8), axis=1).sum(axis=1)
