"""Finds rows of a table by their keys, which are hashes."""

from __future__ import annotations

import numpy as np

KEY_BYTES = 32
BLOCK = 2**16  # keys that are looked up at once; bounds the memory of a look-up


class Keys:
    """Finds rows of a table of keys, (N,K) uint8 with K at least 8. Of equal keys the first is found.

    Keys are hashes, so nearly all of them differ in their first 8 bytes. The table is sorted by these, and the other
    bytes are compared.
    """

    def __init__(self, keys: np.ndarray) -> None:
        self._keys = keys
        heads = _heads(keys)
        self._order = np.argsort(heads, kind="stable").astype(np.int32)
        self._heads = heads[self._order]

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, wanted: np.ndarray) -> np.ndarray:
        """(M,K) uint8 -> (M,) int64 rows of these keys; -1 for a key that is not in the table."""
        blocks = range(0, len(wanted), BLOCK)
        return np.concatenate([np.empty(0, np.int64), *(self._find(wanted[at : at + BLOCK]) for at in blocks)])

    def find_one(self, wanted: bytes) -> int:
        """`find` for one key, without an array."""
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
        while True:  # runs once, unless different keys have equal heads
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
