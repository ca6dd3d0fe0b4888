"""Remembers the digests of files, so that unchanged files are not read again at the next start.

A row's stamp is made of its files' paths, sizes and times of change. It leads to the digest of the row's bytes, which
is the key in the cache. If a stamp is new or has changed, the row is read.
"""

from __future__ import annotations

import hashlib
import uuid
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from t2i_adapter.cache.keys import KEY_BYTES, Keys
from t2i_adapter.cache.mirror import Mirror
from t2i_adapter.data.remote import download
from t2i_adapter.errors import UserError
from t2i_adapter.files import write_atomic

STAMP_BYTES = 16
ENTRY = np.dtype([("stamp", "u1", STAMP_BYTES), ("digest", "u1", KEY_BYTES)])
SUFFIX = ".stamps"
MAX_FILES = 16  # more are merged into one


class Stamps:
    """The table stamp -> digest, stored in `folder`. Several processes can add to it at once.

    With a `mirror` on object storage, `folder` has copies of its files.
    """

    def __init__(self, folder: Path, mirror: Mirror | None = None) -> None:
        self.folder, self._mirror = folder, mirror
        if mirror:
            self._fetch(mirror)
        self._files = sorted(folder.glob(f"*{SUFFIX}"))
        parts = [_read(file) for file in self._files]
        self._entries = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, ENTRY), *parts])
        self._keys = Keys(self._entries["stamp"])
        self._new: list[np.ndarray] = []

    def digests(self, stamps: Sequence[str | None]) -> tuple[np.ndarray, np.ndarray]:
        """Digests (N,32) uint8 of rows by their stamps, and (N,) bool: whether the stamp was found."""
        found = self._keys.find(_hashes(stamps))
        known = found >= 0
        digests = np.zeros((len(stamps), KEY_BYTES), np.uint8)
        digests[known] = self._entries["digest"][found[known]]
        return digests, known

    def add(self, stamps: Sequence[str | None], digests: np.ndarray) -> None:
        """Adds rows and their digests (N,32). Rows whose stamp is None are skipped."""
        has_one = np.array([stamp is not None for stamp in stamps], bool)
        entries = np.empty(int(has_one.sum()), ENTRY)
        entries["stamp"] = _hashes(stamps)[has_one]
        entries["digest"] = digests[has_one]
        self._new.append(entries)

    def save(self) -> None:
        """Writes the added rows to a new file, atomically. Raises OSError."""
        entries = np.concatenate([np.empty(0, ENTRY), *self._new])
        if not len(entries):
            return
        crowded = len(self._files) >= MAX_FILES
        data = (np.concatenate([self._entries, entries]) if crowded else entries).tobytes()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{uuid.uuid4().hex}{SUFFIX}"
        write_atomic(path, [data, zlib.crc32(data).to_bytes(4, "little")])
        if self._mirror:
            with suppress(UserError):  # credentials that may only read: the rows are read again at the next start
                self._mirror.put(path)
        for file in self._files if crowded else ():
            file.unlink(missing_ok=True)
            if self._mirror:
                with suppress(UserError):  # credentials that may not delete: the merged files stay
                    self._mirror.remove(file.name)
        self._new = []

    def _fetch(self, mirror: Mirror) -> None:
        """Makes the files in the folder those of the mirror."""
        self.folder.mkdir(parents=True, exist_ok=True)
        blobs = mirror.list(SUFFIX)
        for path in self.folder.glob(f"*{SUFFIX}"):
            if path.name not in blobs:
                path.unlink(missing_ok=True)
        for name, blob in blobs.items():
            if not (self.folder / name).exists():
                with suppress(UserError):  # another process has just merged it into a larger one
                    download(blob, self.folder / name, most=blob.size)


def _read(file: Path) -> np.ndarray:
    """A file's entries; an empty array if it is damaged, or another process has just merged it into a larger one."""
    try:
        content = memoryview(file.read_bytes())
    except OSError:
        return np.empty(0, ENTRY)
    data = content[:-4]
    whole = len(data) % ENTRY.itemsize == 0 and zlib.crc32(data).to_bytes(4, "little") == content[-4:]
    return np.frombuffer(data, ENTRY) if whole else np.empty(0, ENTRY)


def _hashes(stamps: Sequence[str | None]) -> np.ndarray:
    """(N,16) uint8."""
    joined = b"".join(hashlib.blake2b((s or "").encode(), digest_size=STAMP_BYTES).digest() for s in stamps)
    return np.frombuffer(joined, np.uint8).reshape(-1, STAMP_BYTES)
