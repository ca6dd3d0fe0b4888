"""Rows of bytes that are found by content, millions of them in a few arrays."""

from __future__ import annotations

import numpy as np

KEY_BYTES = 32
BLOCK = 2**16  # keys that are compared at once, which bounds the memory that takes


class Keys:
    """Finds rows of a table of keys, (N,K) uint8 with K at least 8. Of equal keys the first is found.

    Keys are hashes, so their first 8 bytes alone tell nearly all apart: those are sorted, and the rest is compared.
    """

    def __init__(self, keys: np.ndarray) -> None:
        self._keys = keys
        heads = _heads(keys)
        self._order = np.argsort(heads, kind="stable").astype(np.int32)
        self._heads = heads[self._order]

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, wanted: np.ndarray) -> np.ndarray:
        """(M,K) uint8 -> (M,) int64 numbers of the rows that are equal; -1 where there is none."""
        blocks = range(0, len(wanted), BLOCK)
        return np.concatenate([np.empty(0, np.int64), *(self._find(wanted[at : at + BLOCK]) for at in blocks)])

    def find_one(self, wanted: bytes) -> int:
        """As `find`, of one key, without an array for it."""
        head = np.uint64(int.from_bytes(wanted[:8], "little"))
        place = int(self._heads.searchsorted(head))
        while place < len(self._heads) and self._heads[place] == head:
            row = int(self._order[place])
            if self._keys[row].tobytes() == wanted:
                return row
            place += 1
        return -1

    def _find(self, wanted: np.ndarray) -> np.ndarray:
        found = np.full(len(wanted), -1, np.int64)
        heads = _heads(wanted)
        place = np.searchsorted(self._heads, heads)
        left = np.arange(len(wanted))
        while True:  # once, but for different keys whose heads are equal
            left = left[place[left] < len(self._heads)]
            left = left[self._heads[place[left]] == heads[left]]
            if not len(left):
                return found
            rows = self._order[place[left]]
            same = (self._keys[rows] == wanted[left]).all(axis=1)
            found[left[same]] = rows[same]
            left = left[~same]
            place[left] += 1


def _heads(keys: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(keys[:, :8]).view("<u8")[:, 0]
