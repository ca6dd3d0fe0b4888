"""Records of arrays in append-only shard files: written whole or not at all, read by memory map.

A shard is one file: the arrays' bytes one after another, then a JSON index, then a tail of fixed size (length and
crc32 of the index, magic). It appears under its name by one rename, after it has reached the disk, so a killed
writer leaves no more than a `.tmp` file behind, and several processes may add to a folder at once: each writes
shards of its own, and a record that two of them made is simply there twice.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import struct
import sys
import time
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from t2i_adapter.errors import UserError

SUFFIX = ".shard"
MAGIC = b"T2ASHRD1"
TAIL = struct.Struct("<QI8s")
SHARD_BYTES = 64 * 2**20
SHARD_SECONDS = 30.0
"""A shard is written when either is reached."""

MAX_OPEN = 64  # maps held open at once; each holds a file descriptor
STALE_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Record:
    """Named arrays and a few plain facts about them. Arrays that were read are read-only views of the file."""

    arrays: Mapping[str, np.ndarray]
    facts: Mapping[str, Any] = field(default_factory=dict)


class DamagedShardError(Exception):
    """A shard file whose content is not what was written."""


class Shards:
    """A folder of shards, seen as one read-only mapping from key to record."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._index: dict[str, tuple[str, dict[str, Any]]] = {}
        self._seen: set[str] = set()
        self._maps: OrderedDict[str, mmap.mmap] = OrderedDict()
        self.refresh()

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: str) -> bool:
        return key in self._index

    def __getitem__(self, key: str) -> Record:
        """Reads one record and checks it against its checksums. Raises UserError where the file is damaged."""
        shard, entry = self._index[key]
        try:
            data = self._map(shard)
            return Record({name: _array(data, spec) for name, spec in entry["arrays"].items()}, entry["facts"])
        except (OSError, ValueError, DamagedShardError) as fault:
            raise UserError(
                f"{self.folder / shard}: a prepared record cannot be read ({fault}). "
                "Delete that file and start again: what it held is made anew."
            ) from fault

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": OrderedDict()}  # maps do not cross to loader processes

    def refresh(self) -> None:
        """Takes in the shards that have appeared since; a damaged one is left out, and said so."""
        if not self.folder.is_dir():
            return
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            if path.name in self._seen:
                continue
            self._seen.add(path.name)
            try:
                index = read_index(path)
            except (OSError, DamagedShardError) as fault:
                print(f"{path} is damaged ({fault}): left out, what it held is made anew.", file=sys.stderr)
                continue
            self._index.update((key, (path.name, entry)) for key, entry in index.items())

    def _map(self, shard: str) -> mmap.mmap:
        if shard not in self._maps:
            with (self.folder / shard).open("rb") as file:
                self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if len(self._maps) > MAX_OPEN:
                self._maps.popitem(last=False)  # views that are still held keep their map alive
        self._maps.move_to_end(shard)
        return self._maps[shard]


class ShardWriter:
    """Gathers records and writes them as shards: `with ShardWriter(folder) as writer: writer.add(key, record)`.

    What was added is on disk when the block is left, also by an exception; a killed process loses at most the
    records since the last shard.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._chunks: list[bytes] = []
        self._index: dict[str, dict[str, Any]] = {}
        self._size = 0
        self._since = time.monotonic()

    def __enter__(self) -> ShardWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob("*.tmp"):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink(missing_ok=True)  # left by a killed writer; a living one is never that old
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()

    def add(self, key: str, record: Record) -> None:
        specs = {}
        for name, array in record.arrays.items():
            data = np.ascontiguousarray(array).tobytes()
            specs[name] = {
                "dtype": array.dtype.str,
                "shape": list(array.shape),
                "offset": self._size,
                "bytes": len(data),
                "crc32": zlib.crc32(data),
            }
            self._chunks.append(data)
            self._size += len(data)
        self._index[key] = {"arrays": specs, "facts": dict(record.facts)}
        if self._size >= SHARD_BYTES or time.monotonic() - self._since >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what was gathered as one shard. Raises UserError where the disk is full."""
        if self._index:
            index = json.dumps(self._index).encode()
            tail = TAIL.pack(len(index), zlib.crc32(index), MAGIC)
            write_whole(self.folder / f"{uuid.uuid4().hex}{SUFFIX}", [*self._chunks, index, tail])
        self._chunks, self._index, self._size, self._since = [], {}, 0, time.monotonic()


def read_index(path: Path) -> dict[str, dict[str, Any]]:
    """A shard's index: key -> arrays' places and facts. Raises DamagedShardError."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < TAIL.size:
            raise DamagedShardError(f"{size} bytes are too few")
        file.seek(size - TAIL.size)
        length, checksum, magic = TAIL.unpack(file.read(TAIL.size))
        if magic != MAGIC or length > size - TAIL.size:
            raise DamagedShardError("its end is missing")
        file.seek(size - TAIL.size - length)
        data = file.read(length)
    if zlib.crc32(data) != checksum:
        raise DamagedShardError("its index does not match its checksum")
    return json.loads(data)


def write_whole(path: Path, chunks: list[bytes]) -> None:
    """Writes a file that appears under its name complete and on disk, or not at all."""
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as fault:
        temporary.unlink(missing_ok=True)
        if fault.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{path.parent}: no space left on the disk. Make room and start again.") from fault
        raise


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _array(data: mmap.mmap, spec: Mapping[str, Any]) -> np.ndarray:
    view = memoryview(data)[spec["offset"] : spec["offset"] + spec["bytes"]]
    if zlib.crc32(view) != spec["crc32"]:
        raise DamagedShardError("its bytes do not match their checksum")
    return np.frombuffer(view, dtype=spec["dtype"]).reshape(spec["shape"])
