"""Folders of shards, on a disk or on object storage: read by memory map as one table of records, and added to.

A shard gets its name by one rename, after its bytes are on the disk. So a killed writer leaves at most a `.tmp` file.
Several processes can add to a folder at once: each writes shards of its own, and a record that two processes made is
stored twice.
"""

from __future__ import annotations

import errno
import mmap
import sys
import time
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from t2i_adapter.cache.keys import Keys
from t2i_adapter.cache.mirror import Mirror
from t2i_adapter.cache.shard_file import (
    INDEX,
    KEY_BYTES,
    MAGIC,
    SUFFIX,
    TAIL,
    DamagedShardError,
    Record,
    index_bytes,
    pack,
    parse_index,
    read_index,
    unpack,
)
from t2i_adapter.data.addresses import Blob
from t2i_adapter.errors import UserError, flag
from t2i_adapter.files import sweep, write_atomic

SHARD_BYTES = 64 * 2**20
SHARD_SECONDS = 30.0
"""A shard is written when it has this size or this age."""

INDEX_SUFFIX = ".index"
"""Ending of the local copy of the index of a shard on object storage."""
INDEX_BYTES = 2**16
"""Bytes at a shard's end that are requested first: the index of 1,300 records."""
INDEX_READERS = 16  # concurrent requests
COPY_TRIES = 5

PLACES = np.dtype([("place", "<u8"), ("size", "<u4")])
"""What of the index remains after `Shards.forget_keys`."""

MAX_OPEN = 64  # open memory maps; each holds a file descriptor


class Shards:
    """A folder of shards as one read-only table of records: `find` returns the rows of keys, `read` reads a row.

    There may be millions of records, so the index is kept in arrays: 52 bytes a record, and 12 to find it, or 16 after
    `forget_keys`. The checksum of a record is verified the first time that this process reads it.

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
        return {name: value for name, value in self.__dict__.items() if name not in ("_found", "_maps", "_checked")}

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
