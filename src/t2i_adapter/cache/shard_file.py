"""The cache's file format: records of arrays in shard files.

A shard is one file: records one after another, then the index (each record's key, place, size and tag), then a tail of
fixed size (number of records, crc32 of the index, magic). A record is its length and crc32, a JSON header, and the
bytes of its arrays. It starts at a multiple of 16 bytes.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from t2i_adapter.cache.keys import KEY_BYTES
from t2i_adapter.files import parse_json

SUFFIX = ".shard"
MAGIC = b"T2ASHRD2"
TAIL = struct.Struct("<QI8s")
HEAD = struct.Struct("<II")  # bytes of the JSON header, crc32 of all that follows this head
ALIGN = 16
INDEX = np.dtype([("key", "u1", KEY_BYTES), ("place", "<u8"), ("size", "<u4"), ("tag", "<u4")])


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
