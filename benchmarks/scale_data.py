"""Writes the generated datasets and the cache that `scale.py` measures: millions of rows in a minute.

The rows share PICTURES small pictures; each has a caption of its own, except in tar shards, which are written from one
template. The cache is what `prepare` would have left after reading all rows: stamps, and shards whose index has one
entry for each row. The entries of a shard point at a few records, because the bytes of millions of records are not
what is measured.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from t2i_adapter.cache.records import pack_image, view_keys
from t2i_adapter.cache.shard_file import INDEX, KEY_BYTES, MAGIC, SUFFIX, TAIL, pack
from t2i_adapter.cache.stamps import ENTRY, _hashes
from t2i_adapter.cache.stamps import SUFFIX as STAMPS_SUFFIX
from t2i_adapter.data import shapes
from t2i_adapter.data.source import Source
from t2i_adapter.files import write_atomic
from t2i_adapter.types import Geometry

PICTURES, SIDE = 64, 32
SHARD_ROWS, GROUP_ROWS = 100_000, 2_000
DISTINCT_RECORDS = 16
BLOCK = 512  # of a tar file


def pictures() -> list[bytes]:
    """PICTURES PNG files of SIDE px."""
    found = []
    for number in range(PICTURES):
        buffer = io.BytesIO()
        shapes.render(shapes.sample_scene(0, number), SIDE).save(buffer, "PNG")
        found.append(buffer.getvalue())
    return found


def shards_of(rows: int) -> Iterator[range]:
    """The rows of each shard: at least four shards, of at most SHARD_ROWS rows."""
    size = min(SHARD_ROWS, -(-rows // 4))
    return (range(first, min(first + size, rows)) for first in range(0, rows, size))


def write_parquet(folder: Path, rows: int) -> Path:
    folder.mkdir(parents=True)
    dictionary = pa.array(pictures(), pa.binary())
    for number, part in enumerate(shards_of(rows)):
        image = pa.DictionaryArray.from_arrays(np.arange(part.start, part.stop, dtype=np.int32) % PICTURES, dictionary)
        table = pa.table({"image": image.cast(pa.binary()), "text": [f"picture number {row}" for row in part]})
        pq.write_table(table, folder / f"train-{number:05d}.parquet", row_group_size=GROUP_ROWS)
    return folder


def write_jsonl(folder: Path, rows: int) -> Path:
    """A table of paths beside the files that it names."""
    folder.mkdir(parents=True)
    for number, data in enumerate(pictures()):
        (folder / f"{number:02d}.png").write_bytes(data)
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for part in shards_of(rows):
            file.writelines(
                f'{{"file_name": "{row % PICTURES:02d}.png", "text": "picture number {row}"}}\n' for row in part
            )
    return folder / "pairs.jsonl"


def write_tar(folder: Path, rows: int) -> Path:
    """Tar shards with a picture and a text of the same bytes for each row: the names are written by numpy."""
    folder.mkdir(parents=True)
    picture, text = pictures()[0], b"a picture"
    for number, part in enumerate(shards_of(rows)):
        row = np.concatenate([_member("png", picture), _member("txt", text)])
        second = -(-len(picture) // BLOCK) * BLOCK + BLOCK
        table = np.tile(row, (len(part), 1))
        digits = np.arange(len(part))[:, None] // 10 ** np.arange(7, -1, -1) % 10
        for start in (0, second):
            table[:, start : start + 8] = digits + ord("0")
            header = table[:, start : start + BLOCK]
            sums = header.sum(axis=1, dtype=np.int64) - header[:, 148:156].sum(axis=1, dtype=np.int64) + 8 * ord(" ")
            octal = sums[:, None] // 8 ** np.arange(5, -1, -1) % 8
            header[:, 148:154] = octal + ord("0")
        (folder / f"{number:05d}.tar").write_bytes(table.tobytes() + bytes(2 * BLOCK))
    return folder


def _member(ending: str, data: bytes) -> np.ndarray:
    """Header and bytes of a tar member whose name and checksum are still to be set."""
    header = bytearray(BLOCK)
    header[0:12] = f"00000000.{ending}".encode()
    header[100:108], header[108:116], header[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    header[124:136], header[136:148] = f"{len(data):011o}\0".encode(), b"00000000000\0"
    header[148:156], header[156:157], header[257:265] = b"000000\0 ", b"0", b"ustar\x0000"
    return np.frombuffer(bytes(header) + data + bytes(-len(data) % BLOCK), np.uint8)


def write_cache(source: Source, images: Path, stamps: Path) -> None:
    """The stamps of all rows, and shards whose index holds a record for each."""
    rng = np.random.default_rng(0)
    images.mkdir(parents=True, exist_ok=True)
    stamps.mkdir(parents=True, exist_ok=True)
    records = [_record(rng) for _ in range(DISTINCT_RECORDS)]
    sizes = np.array([len(record) for record in records])
    places, entries = np.cumsum(sizes) - sizes, []
    for number, part in enumerate(shards_of(len(source))):
        digests = rng.integers(0, 256, (len(part), KEY_BYTES), np.uint8)
        entry = np.empty(len(part), ENTRY)
        entry["stamp"], entry["digest"] = _hashes([source.stamp(row) for row in part]), digests
        entries.append(entry)
        which = np.arange(len(part)) % DISTINCT_RECORDS
        index = np.empty(len(part), INDEX)
        index["key"], index["place"] = view_keys(digests, 0), places[which]
        index["size"], index["tag"] = sizes[which], SIDE << 16 | SIDE
        data = index.tobytes()
        tail = TAIL.pack(len(index), zlib.crc32(data), MAGIC)
        write_atomic(images / f"{number:05d}{SUFFIX}", [*records, data, tail])
    content = np.concatenate(entries).tobytes()
    write_atomic(stamps / f"all{STAMPS_SUFFIX}", [content, zlib.crc32(content).to_bytes(4, "little")])


def _record(rng: np.random.Generator) -> bytes:
    h = SIDE // 8
    moments = rng.normal(size=(8, h, h)).astype(np.float16)
    condition = np.repeat(rng.integers(0, 2, (1, SIDE, SIDE), np.uint8) * 255, 3, axis=0)
    geometry = Geometry((SIDE, SIDE), (SIDE, SIDE), (0, 0), (SIDE, SIDE))
    return b"".join(pack(pack_image(moments, condition, geometry, name="generated")))
