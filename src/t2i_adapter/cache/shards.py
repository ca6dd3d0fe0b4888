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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from t2i_adapter.cache.mirror import Mirror
from t2i_adapter.data.addresses import Blob
from t2i_adapter.errors import UserError, flag
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
SHARD_BYTES = 64 * 2**20
SHARD_SECONDS = 30.0
"""A shard is written when it has this size or this age."""

INDEX_SUFFIX = ".index"
"""Ending of the local copy of the index of a shard on object storage."""
INDEX_BYTES = 2**16
"""Bytes at a shard's end that are requested first: the index of 1,300 records."""
INDEX_READERS = 16  # concurrent requests
COPY_TRIES = 5

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

    There may be millions of records, so the index is kept in arrays: 52 bytes a record, and 16 to find it. The checksum
    of a record is verified the first time that this process reads it.

    With a `mirror`, the shards lie on object storage. Only their indices are read at first, and `folder` has copies of
    these.
    """

    def __init__(self, folder: Path, mirror: Mirror | None = None) -> None:
        self.folder, self.mirror = folder, mirror
        self._blobs: dict[str, Blob] = {}
        self._names: list[str] = []
        self._seen: set[str] = set()
        self._index = np.empty(0, INDEX)
        self._shard = np.empty(0, np.int32)
        self._fresh()
        self.refresh()

    def _fresh(self) -> None:
        """Sets what follows from the index, and what each process has of its own."""
        self._keys = Keys(self._index["key"])
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()
        self._checked = np.zeros(len(self._index), bool)

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

    @property
    def stored_bytes(self) -> int:
        """Bytes of all records."""
        return int(self._index["size"].sum(dtype=np.int64))

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
                f"{self.mirror.url if self.mirror else self.folder}/{name}: a record of the cache cannot be read "
                f"({fault}). "
                "Delete that file and start again: its records are made again."
            ) from fault
        self._checked[row] = True
        return record

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_keys", "_maps", "_checked")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fresh()

    def refresh(self) -> None:
        """Adds new shards to the table. A damaged shard is skipped, with a warning."""
        found = [self._index]
        for name, index in self._new_indices():
            if isinstance(index, np.ndarray):
                found.append(index)
                self._names.append(name)
            else:
                place = self.mirror.url if self.mirror else self.folder
                print(f"{place}/{name} is damaged ({index}): skipped; its records are made again.", file=sys.stderr)
        if len(found) > 1:
            first = len(self._names) - len(found) + 1
            numbers = [np.full(len(index), first + place, np.int32) for place, index in enumerate(found[1:])]
            self._index, self._shard = np.concatenate(found), np.concatenate([self._shard, *numbers])
            self._fresh()

    def _new_indices(self) -> Iterator[tuple[str, np.ndarray | Exception]]:
        """The names of new shards, each with its index, or with why it cannot be read."""
        if not self.mirror:
            new = [path.name for path in sorted(self.folder.glob(f"*{SUFFIX}")) if path.name not in self._seen]
            self._seen |= set(new)
            for name in new:
                yield name, _or_fault(partial(read_index, self.folder / name))
            return
        blobs = {name: blob for name, blob in self.mirror.list(SUFFIX).items() if name not in self._seen}
        self._seen |= blobs.keys()
        self._blobs |= blobs
        with ThreadPoolExecutor(INDEX_READERS) as pool:
            indices = pool.map(lambda blob: _or_fault(partial(self._index_of, blob)), blobs.values())
            yield from zip(blobs, indices, strict=True)

    def _index_of(self, blob: Blob) -> np.ndarray:
        """The index of a shard on object storage, read from its end, or from the copy that is made of it."""
        assert self.mirror
        copy = self.folder / (blob.name.rpartition("/")[2] + INDEX_SUFFIX)
        with suppress(OSError, DamagedShardError):
            return parse_index(copy.read_bytes())
        data = self.mirror.tail(blob, INDEX_BYTES)
        need = index_bytes(data, blob.size)
        if need > len(data):
            data = self.mirror.tail(blob, need)
        write_atomic(copy, [data[len(data) - need :]])
        return parse_index(data)

    def _open(self, name: str) -> BinaryIO:
        """Raises OSError, and UserError if the shard cannot be downloaded."""
        if not self.mirror:
            return (self.folder / name).open("rb")
        for _ in range(COPY_TRIES):
            with suppress(FileNotFoundError):
                return self.mirror.local(self._blobs[name]).open("rb")
        raise UserError(
            f"{self.mirror.url}/{name}: its local copy was deleted {COPY_TRIES} times before it was opened, because "
            f"other processes need the room. Set a larger {flag('data.local_gb')}.",
            option="data.prepared_dir",
        )

    def write_note(self, name: str, data: bytes) -> None:
        """Writes a small file beside the shards. Raises OSError or UserError."""
        if self.mirror:
            self.mirror.write(name, data)
        else:
            write_atomic(self.folder / name, [data])

    def read_note(self, name: str) -> bytes | None:
        """A small file beside the shards; None if it is missing."""
        return self.mirror.read(name) if self.mirror else _content(self.folder / name)

    def beside(self, name: str) -> Iterator[Callable[[str], bytes | None]]:
        """The folders beside this one that have a small file of this name, each as a function that reads its small
        files."""
        if self.mirror:
            for mirror in self.mirror.beside(name):
                yield mirror.read
            return
        for path in sorted(self.folder.parent.glob(f"*/{name}")):
            if path.parent != self.folder:
                yield lambda wanted, folder=path.parent: _content(folder / wanted)

    def writer(self) -> ShardWriter:
        """Adds records to this folder; `refresh` finds them."""
        return ShardWriter(self.folder, self.mirror)

    def _map(self, shard: int) -> mmap.mmap:
        if shard not in self._maps:
            with self._open(self._names[shard]) as file:
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

    def __init__(self, folder: Path, mirror: Mirror | None = None) -> None:
        """With a mirror, a shard is uploaded when it is complete, and its local file is deleted."""
        self.folder, self.mirror = folder, mirror
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
        if self.mirror:
            sweep(self.folder, f"*{SUFFIX}")  # a process was killed while it uploaded
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
            path = self.folder / f"{uuid.uuid4().hex}{SUFFIX}"
            try:
                write_atomic(path, [*self._chunks, data, tail])
            except OSError as fault:
                if fault.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise UserError(f"{self.folder}: no space left on the disk. Make room and start again.") from fault
                raise
            if self.mirror:
                self.mirror.put(path)
                path.unlink()
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
        file.seek(max(0, size - TAIL.size))
        need = index_bytes(file.read(TAIL.size), size)
        file.seek(size - need)
        return parse_index(file.read(need))


def index_bytes(end: bytes, size: int) -> int:
    """Bytes of the index and the tail of a shard of `size` bytes, from its last bytes. Raises DamagedShardError."""
    if len(end) < TAIL.size:
        raise DamagedShardError(f"it has only {len(end)} bytes")
    count, _, magic = TAIL.unpack(end[-TAIL.size :])
    need = count * INDEX.itemsize + TAIL.size
    if magic != MAGIC or need > size:
        raise DamagedShardError("its end is missing, or has another version")
    return need


def parse_index(end: bytes) -> np.ndarray:
    """The index, (records,) of INDEX, from the last bytes of a shard. Raises DamagedShardError."""
    need = index_bytes(end, len(end))
    _, checksum, _ = TAIL.unpack(end[-TAIL.size :])
    data = end[len(end) - need : -TAIL.size]
    if zlib.crc32(data) != checksum:
        raise DamagedShardError("its index does not match its checksum")
    return np.frombuffer(data, INDEX)


def _content(path: Path) -> bytes | None:
    """A file's content; None if it is missing."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _or_fault(read: Callable[[], np.ndarray]) -> np.ndarray | Exception:
    try:
        return read()
    except (OSError, DamagedShardError) as fault:
        return fault


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
