"""WebDataset shards: tar files in which members whose names are equal up to the first dot form a sample.

A shard is indexed once, and the index is stored; pictures are then read by their position in the file. No member's
name is used as a path. Links, devices and members whose names lead out of the archive are refused.
"""

from __future__ import annotations

import json
import os
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.addresses import Blob
from t2i_adapter.data.picture import StoredPicture, check_size
from t2i_adapter.data.remote import find
from t2i_adapter.data.rows import Row, Rows
from t2i_adapter.data.shard_files import describe, labels, part_of, shard_pattern, starts
from t2i_adapter.data.store import Store
from t2i_adapter.errors import UserError
from t2i_adapter.files import cache_root, parse_json

PICTURES = ("jpg", "jpeg", "png", "webp")
PARTS = ("image", "condition", "txt", "json")
_VERSION = 1
_BLOCK = tarfile.BLOCKSIZE
_OPEN_FILES = 32
_THREADS = 4
_MISSING = -1


def open_rows(location: str, options: DataOptions) -> TarRows:
    """Shards by glob or braces; a folder stands for all *.tar in it, or in the split's folder. Raises UserError."""
    blobs = find(shard_pattern(location, options.split, ".tar"))
    return TarRows(blobs, options, Store(cache_root(options.prepared_dir)))


class TarRows(Rows):
    """Samples of all shards, in the order of their first members.

    A sample is an image (.jpg, .png, .webp), a condition (.cond.png, or .conditioning_image.png after the column's
    name; or jpg, webp) and a caption: the whole text of a .txt, otherwise the caption column of a .json.
    """

    def __init__(self, blobs: Sequence[Blob], options: DataOptions, store: Store) -> None:
        self.place, self.annotate = describe(blobs), options.condition
        self._blobs, self._store, self._options = list(blobs), store, options
        self._labels = labels(blobs)
        with ThreadPoolExecutor(_THREADS) as pool:
            indices = list(pool.map(self._index, blobs))
        self.shards = tuple(len(index) for index in indices)
        self._starts = starts(self.shards)
        index = pa.concat_tables(indices).combine_chunks()
        self._stems = index.column("stem")
        self._places = {name: index.column(name).to_numpy() for name in index.column_names if name != "stem"}
        self._reset()
        if not len(self):
            raise UserError(f"{self.place}: there are no samples.")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_files", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def key(self, index: int) -> str:
        return f"{self._labels[self._shard(index)]}/{self._stems[index].as_py()}"

    def where(self, index: int) -> str:
        return f"{self._blobs[self._shard(index)].name}, sample {self._stems[index].as_py()}"

    def caption_cell(self, index: int) -> str:
        return f"{self.where(index)}, its .txt or the {self._options.caption_column} of its .json"

    def row(self, index: int) -> Row:
        image = self._picture(index, "image")
        condition = None if self.annotate else self._picture(index, "condition")
        return Row(image, condition, self.captions(index), self._meta(index))

    def captions(self, index: int) -> Any:
        text = self._part(index, "txt")
        if text is not None:
            return self._text(index, text).strip()
        return self._json(index).get(self._options.caption_column)

    def stamp(self, index: int) -> str | None:
        stamp = self._blobs[self._shard(index)].stamp
        used = self._options.image_column, "" if self.annotate else self._options.conditioning_image_column
        return None if stamp is None else "\n".join([stamp, self._stems[index].as_py(), *used])

    def _picture(self, index: int, part: str) -> StoredPicture:
        data = self._part(index, part)
        if data is None:
            wanted = ", ".join(f".{suffix}" for suffix in part_suffixes(self._options)[part])
            raise UserError(f"{self.where(index)}: there is no {part}: no member ends in {wanted}.", kind="missing")
        return StoredPicture(f"{self.where(index)}, {part}", data)

    def _meta(self, index: int) -> dict[str, Any]:
        caption = self._options.caption_column
        row = self._json(index)
        return {k: v for k, v in row.items() if k != caption and isinstance(v, str | int | float | bool)}

    def _json(self, index: int) -> dict[str, Any]:
        data = self._part(index, "json")
        if data is None:
            return {}
        try:
            row = parse_json(self._text(index, data))
        except ValueError as fault:
            raise UserError(f"{self.where(index)}: its .json is not JSON: {fault}.", kind="row") from fault
        if not isinstance(row, dict):
            text = f"{self.where(index)}: its .json holds {type(row).__name__}; an object is needed."
            raise UserError(text, kind="row")
        return row

    def _text(self, index: int, data: bytes) -> str:
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as fault:
            text = f"{self.where(index)}: its caption is not UTF-8 text (byte {fault.start})."
            raise UserError(text, kind="caption") from fault

    def _part(self, index: int, part: str) -> bytes | None:
        """A member's bytes; None if the sample has no such member. Raises UserError."""
        start, size = int(self._places[f"{part}_at"][index]), int(self._places[f"{part}_size"][index])
        if start == _MISSING:
            return None
        shard = self._shard(index)
        check_size(size, f"{self.where(index)}, {part}")
        data = os.pread(self._file(shard).fileno(), size, start)
        if len(data) != size:
            raise UserError(f"{self._blobs[shard].name}: is shorter than when it was indexed. Start again.")
        return data

    def _file(self, shard: int) -> IO[bytes]:
        with self._lock:
            file = self._files.pop(shard, None)
            if file is None:
                file = self._open(self._blobs[shard])
            self._files[shard] = file
            while len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)  # closes when no thread refers to it any more
        return file

    def _open(self, blob: Blob) -> IO[bytes]:
        path = self._store.local(blob)
        try:
            return path.open("rb", buffering=0)
        except OSError as fault:
            raise UserError(f"{blob.name}: cannot be read: {fault.strerror}.") from fault

    def _shard(self, index: int) -> int:
        return part_of(self._starts, index)

    def _index(self, blob: Blob) -> pa.Table:
        suffixes = part_suffixes(self._options)
        if blob.stamp is None:
            return index_shard(self._store.local(blob), blob.name, suffixes)
        key = f"tar {_VERSION}\0{blob.stamp}\0{json.dumps(suffixes)}"
        return self._store.index(key, lambda: index_shard(self._store.local(blob), blob.name, suffixes))

    def _reset(self) -> None:
        self._files: OrderedDict[int, IO[bytes]] = OrderedDict()
        self._lock = threading.Lock()


def part_suffixes(options: DataOptions) -> dict[str, list[str]]:
    """Part of a sample -> the suffixes, after the first dot of a member's name, that it may have."""
    names = dict.fromkeys(["cond", "conditioning_image", options.conditioning_image_column])
    return {
        "image": [*PICTURES, *(f"{options.image_column}.{suffix}" for suffix in PICTURES)],
        "condition": [f"{name}.{suffix}" for name in names for suffix in PICTURES],
        "txt": ["txt"],
        "json": ["json"],
    }


def index_shard(path: Path, name: str, suffixes: dict[str, list[str]]) -> pa.Table:
    """One row a sample: its stem, and position and size in bytes of each part; both are -1 if the part is missing.

    `name` is the shard's name in messages. Raises UserError that names the shard and the member.
    """
    part_of = {suffix: part for part, ends in suffixes.items() for suffix in ends}
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                _check_member(member, name)
                if member.size < 0 or member.offset_data < end:
                    raise UserError(
                        f"{name}: damaged: the header of member {member.name!r} puts it before the end of the last one."
                    )
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK if member.isreg() else end
                stem, suffix = split_name(member.name)
                part = part_of.get(suffix.lower())
                if not member.isreg() or part is None:
                    continue
                sample = samples.setdefault(stem, {})
                if part in sample:
                    raise UserError(f"{name}: sample {stem} has two members for its {part}; one is allowed.")
                sample[part] = member.offset_data, member.size
        _check_end(path, name, end)
    except tarfile.TarError as fault:
        raise UserError(
            f"{name}: truncated, or not a plain tar file (compressed ones are not supported): {fault}."
        ) from fault
    except OSError as fault:
        raise UserError(f"{name}: cannot be read: {fault.strerror or fault}.") from fault
    return _to_table(samples)


def split_name(member: str) -> tuple[str, str]:
    """ "a/b.cond.png" -> ("a/b", "cond.png")."""
    folder, slash, base = member.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix


def _check_member(member: tarfile.TarInfo, name: str) -> None:
    if member.name.startswith(("/", "\\")) or ".." in member.name.replace("\\", "/").split("/"):
        raise UserError(f"{name}: member {member.name!r} leads out of the archive, which is not allowed.")
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise UserError(f"{name}: member {member.name!r} is a link or a device; only plain files are allowed.")


def _check_end(path: Path, name: str, end: int) -> None:
    """Raises UserError if the archive does not end in a block of zeros, which `tarfile` does not check."""
    with path.open("rb") as file:
        file.seek(end)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise UserError(
                f"{name}: truncated: it ends at byte {path.stat().st_size:,} without an end mark. Copy it again."
            )


def _to_table(samples: dict[str, dict[str, tuple[int, int]]]) -> pa.Table:
    columns: dict[str, Any] = {"stem": pa.array(list(samples), pa.large_string())}
    for part in PARTS:
        found = [sample.get(part, (_MISSING, _MISSING)) for sample in samples.values()]
        columns[f"{part}_at"] = pa.array([place for place, _ in found], pa.int64())
        columns[f"{part}_size"] = pa.array([size for _, size in found], pa.int64())
    return pa.table(columns)
