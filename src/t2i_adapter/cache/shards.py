"""The cache's file format: records of arrays in append-only shard files, written atomically and read by memory map.

A shard is one file: records one after another, then the index (each record's key, place, size and tag), then a tail of
fixed size (number of records, crc32 of the index, magic). A record is its length and crc32, a JSON header, and the
bytes of its arrays. It starts at a multiple of 16 bytes.

A shard gets its name by one rename, after its bytes are on the disk. So a killed writer leaves at most a `.tmp` file.
Several processes can add to a folder at once: each writes shards of its own, and a record that two processes made is
stored twice.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
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
from t2i_adapter.files import parse_json, sweep, write_atomic

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


SUFFIX = ".shard"
MAGIC = b"T2ASHRD2"
TAIL = struct.Struct("<QI8s")
HEAD = struct.Struct("<II")  # bytes of the JSON header, crc32 of all that follows this head
ALIGN = 16
INDEX = np.dtype([("key", "u1", KEY_BYTES), ("place", "<u8"), ("size", "<u4"), ("tag", "<u4")])
PLACES = np.dtype([("place", "<u8"), ("size", "<u4")])
"""What of the index remains after `Shards.forget_keys`."""
SHARD_BYTES = 64 * 2**20
SHARD_SECONDS = 30.0
"""A shard is written when it has this size or this age."""

MAX_OPEN = 64  # open memory maps; each holds a file descriptor


@dataclass(frozen=True)
class Record:
    """Named arrays, and JSON values that describe them. Arrays that were read are read-only views of the file.

    `tag` is a number below 2^32. The index holds it too, so that the tags of all records are read at once.
    """

    arrays: Mapping[str, np.ndarray]
    facts: Mapping[str, Any] = field(default_factory=dict)
    tag: int = 0


class DamagedShardError(Exception):
    """A shard file is damaged."""


class Shards:
    """A folder of shards as one read-only table of records: `find` returns the rows of keys, `read` reads a row.

    There may be millions of records, so the index is kept in arrays: 52 bytes a record, and 12 to find it, or 16 after
    `forget_keys`. The checksum of a record is verified the first time that this process reads it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names: list[str] = []
        self._seen: set[str] = set()
        self._index = np.empty(0, INDEX)
        self._shard = np.empty(0, np.int32)
        self._fresh()
        self.refresh()

    def _fresh(self) -> None:
        """Sets what follows from the index, and what each process has of its own."""
        self._found: Keys | None = None
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()
        self._checked = np.zeros(len(self._index), bool)

    @property
    def _keys(self) -> Keys:
        """The table of keys, sorted when it is first needed: a loader process reads by row and needs none."""
        if self._found is None:
            self._found = Keys(self._index["key"])
        return self._found

    def forget_keys(self) -> None:
        """Frees what only look-ups need: then records can be read by row, and not be found or added any more."""
        self._index, self._found = self._index[["place", "size"]].astype(PLACES), None

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: bytes) -> bool:
        return self._keys.find_one(key) >= 0

    def __getitem__(self, key: bytes) -> Record:
        """Raises KeyError, and UserError if the file is damaged."""
        record = self.get(key)
        if record is None:
            raise KeyError(key.hex())
        return record

    def get(self, key: bytes) -> Record | None:
        """None if there is no such record. Raises UserError if the file is damaged."""
        row = self._keys.find_one(key)
        return self.read(row) if row >= 0 else None

    @property
    def tags(self) -> np.ndarray:
        """(rows,) uint32."""
        return self._index["tag"]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Rows (N,) int64 of keys (N,32) uint8; -1 for a missing key. `refresh` does not change the rows."""
        return self._keys.find(keys)

    def read(self, row: int) -> Record:
        """Raises UserError if the record's file is damaged or missing."""
        entry, name = self._index[row], self._names[self._shard[row]]
        try:
            data = memoryview(self._map(int(self._shard[row])))
            record = unpack(data[int(entry["place"]) :][: int(entry["size"])], check=not self._checked[row])
        except (OSError, ValueError, DamagedShardError) as fault:  # ValueError: mmap of an empty file
            raise UserError(
                f"{self.folder / name}: a record of the cache cannot be read ({fault}). "
                "Delete that file and start again: its records are made again."
            ) from fault
        self._checked[row] = True
        return record

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_found", "_maps", "_checked")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fresh()

    def refresh(self) -> None:
        """Adds new shards to the table. A damaged shard is skipped, with a warning."""
        found = [self._index]
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            if path.name in self._seen:
                continue
            self._seen.add(path.name)
            try:
                found.append(read_index(path))
            except (OSError, DamagedShardError) as fault:
                print(f"{path} is damaged ({fault}): skipped; its records are made again.", file=sys.stderr)
                continue
            self._names.append(path.name)
        if len(found) > 1:
            first = len(self._names) - len(found) + 1
            numbers = [np.full(len(index), first + place, np.int32) for place, index in enumerate(found[1:])]
            self._index, self._shard = np.concatenate(found), np.concatenate([self._shard, *numbers])
            self._fresh()

    def _map(self, shard: int) -> mmap.mmap:
        if shard not in self._maps:
            with (self.folder / self._names[shard]).open("rb") as file:
                self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if len(self._maps) > MAX_OPEN:
                self._maps.popitem(last=False)  # arrays that are still in use keep their map alive
        self._maps.move_to_end(shard)
        return self._maps[shard]


class ShardWriter:
    """Collects records and writes them as shards: `with ShardWriter(folder) as writer: writer.add(key, record)`.

    All added records are on the disk when the block ends, also by an exception. A killed process loses at most the
    records since the last shard. `written` counts the bytes of records so far.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written = 0
        self._clear()

    def _clear(self) -> None:
        self._chunks: list[bytes] = []
        self._index: list[tuple[bytes, int, int, int]] = []
        self._size = 0
        self._since = time.monotonic()

    def __enter__(self) -> ShardWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder, "*.tmp")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()

    def add(self, key: bytes, record: Record) -> None:
        chunks = pack(record)
        size = sum(map(len, chunks))
        self._index.append((key, self._size, size, record.tag))
        self._chunks += chunks
        self._size += size
        self.written += size
        if self._size >= SHARD_BYTES or time.monotonic() - self._since >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes the collected records as one shard. Raises UserError if the disk is full."""
        if self._index:
            index = np.empty(len(self._index), INDEX)
            keys, index["place"], index["size"], index["tag"] = zip(*self._index, strict=True)
            index["key"] = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)
            data = index.tobytes()
            tail = TAIL.pack(len(index), zlib.crc32(data), MAGIC)
            try:
                write_atomic(self.folder / f"{uuid.uuid4().hex}{SUFFIX}", [*self._chunks, data, tail])
            except OSError as fault:
                if fault.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise UserError(f"{self.folder}: no space left on the disk. Make room and start again.") from fault
                raise
        self._clear()


def pack(record: Record) -> list[bytes]:
    """The bytes of a record, in pieces; their sum is a multiple of ALIGN."""
    specs, pieces, size = {}, [], 0
    for name, array in record.arrays.items():
        data = np.ascontiguousarray(array).tobytes()
        specs[name] = [array.dtype.str, list(array.shape), size]
        pieces += [data, bytes(-len(data) % ALIGN)]
        size += len(data) + len(pieces[-1])
    header = json.dumps({"arrays": specs, "facts": dict(record.facts), "tag": record.tag}).encode()
    pieces.insert(0, header + b" " * (-(HEAD.size + len(header)) % ALIGN))
    checksum = 0
    for piece in pieces:
        checksum = zlib.crc32(piece, checksum)
    return [HEAD.pack(len(pieces[0]), checksum), *pieces]


def unpack(data: memoryview, *, check: bool) -> Record:
    """The record in `data`; its arrays are views of `data`. Raises DamagedShardError."""
    if len(data) < HEAD.size:
        raise DamagedShardError("its end is missing")
    length, checksum = HEAD.unpack_from(data)
    if check and zlib.crc32(data[HEAD.size :]) != checksum:
        raise DamagedShardError("its bytes do not match their checksum")
    try:
        return _read_record(data, HEAD.size + length)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as fault:
        raise DamagedShardError(f"its header cannot be read ({fault})") from fault


def _read_record(data: memoryview, start: int) -> Record:
    """The header lies before `start`, the arrays after it. A header with a right checksum may still hold anything."""
    header = parse_json(bytes(data[HEAD.size : start]))
    arrays = {}
    for name, (dtype, shape, place) in header["arrays"].items():
        if place < 0 or any(side < 0 for side in shape):
            raise ValueError(f"array {name} at {place} with shape {shape}")
        arrays[name] = np.frombuffer(data, dtype, math.prod(shape), start + place).reshape(shape)
    return Record(arrays, dict(header["facts"]), header["tag"])


def read_index(path: Path) -> np.ndarray:
    """A shard's index, (records,) of INDEX. Raises DamagedShardError."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size < TAIL.size:
            raise DamagedShardError(f"it has only {size} bytes")
        file.seek(size - TAIL.size)
        count, checksum, magic = TAIL.unpack(file.read(TAIL.size))
        length = count * INDEX.itemsize
        if magic != MAGIC or length > size - TAIL.size:
            raise DamagedShardError("its end is missing, or has another version")
        file.seek(size - TAIL.size - length)
        data = file.read(length)
    if zlib.crc32(data) != checksum:
        raise DamagedShardError("its index does not match its checksum")
    return np.frombuffer(data, INDEX)


def damage(path: Path) -> str | None:
    """Reads every record of a shard file. Returns what is wrong with it, or None."""
    try:
        index = read_index(path)
        with path.open("rb") as file:
            for entry in index:
                file.seek(int(entry["place"]))
                unpack(memoryview(file.read(int(entry["size"]))), check=True)
    except (OSError, DamagedShardError) as fault:
        return str(fault)
    return None
