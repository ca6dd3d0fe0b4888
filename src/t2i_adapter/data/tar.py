"""WebDataset shards: tar files in which members whose names are equal up to the first dot form a sample.

A shard is indexed once (`tar_index.py`), and the index is stored; pictures are then read by their position in the file.
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import numpy as np
import pyarrow as pa

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.addresses import Blob
from t2i_adapter.data.look import plural
from t2i_adapter.data.picture import StoredPicture, check_size
from t2i_adapter.data.rows import Row, Rows
from t2i_adapter.data.shard_files import describe, find_shards, labels, part_of, starts
from t2i_adapter.data.store import Store
from t2i_adapter.data.table import likely_columns
from t2i_adapter.data.tar_index import MISSING, VERSION, index_shard, part_endings
from t2i_adapter.errors import UserError, flag
from t2i_adapter.files import cache_root, parse_json

_OPEN_FILES = 32
_THREADS = 4
_SHOWN_ENDINGS, _SHOWN_KEYS = 5, 20


def open_rows(location: str, options: DataOptions) -> TarRows:
    """Shards by glob or braces; a folder stands for all *.tar in it, or in the split's folder. Raises UserError."""
    blobs = find_shards(location, options.split, ".tar")
    return TarRows(blobs, options, Store(cache_root(options.prepared_dir)))


class TarRows(Rows):
    """Samples of all shards, in the order of their first members.

    A sample is an image (.jpg, .png, ...), a condition (.cond.png, or .conditioning_image.png after the column's name;
    any picture's ending) and a caption: the whole text of a .txt, otherwise the caption column of a .json.
    """

    def __init__(self, blobs: Sequence[Blob], options: DataOptions, store: Store) -> None:
        self.place, self.annotate = describe(blobs), options.condition
        self.captions_are_remote = any(blob.is_remote for blob in blobs)
        self._blobs, self._store, self._options = list(blobs), store, options
        self._labels = labels(blobs)
        with ThreadPoolExecutor(_THREADS) as pool:
            indices = list(pool.map(self._index, blobs))
        self.shards = tuple(len(index) for index in indices)
        self._starts = starts(self.shards)
        self._stems = pa.chunked_array([index.column("stem").combine_chunks() for index in indices]).combine_chunks()
        self._places = {name: _joined(indices, name) for name in indices[0].column_names if name != "stem"}
        self._reset()
        self._check_parts(Unused.of(indices))
        self._check_caption_key({key: value for index in indices for key, value in _stored(index, "cells").items()})

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
            raise UserError(f"{self.where(index)}: there is no {part}: {self._wanted(part)}.", kind="missing")
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
        starts, sizes = self._places[f"{part}_at"], self._places[f"{part}_size"]
        if starts is None or sizes is None or starts[index] == MISSING:
            return None
        start, size = int(starts[index]), int(sizes[index])
        shard = self._shard(index)
        check_size(size, f"{self.where(index)}, {part}")
        data = os.pread(self._file(shard).fileno(), size, start)
        if len(data) != size:
            raise UserError(f"{self._blobs[shard].name}: is shorter than when it was indexed. Start again.")
        return data

    def _has(self, part: str) -> np.ndarray:
        """(N,) bool: whether a sample has this part."""
        starts = self._places[f"{part}_at"]
        return np.zeros(len(self), bool) if starts is None else starts != MISSING

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
        endings = part_endings(self._options)
        if blob.stamp is None:
            return index_shard(self._store.local(blob), blob.name, endings)
        key = f"tar {VERSION}\0{blob.stamp}\0{json.dumps(endings)}"
        return self._store.index(key, lambda: index_shard(self._store.local(blob), blob.name, endings))

    def _check_parts(self, unused: Unused) -> None:
        """Sets `notes`. Raises UserError if there are no samples, or if all of them miss the same part."""
        if not len(self):
            raise UserError(f"{self.place}: there are no samples: {self._wanted('image')}{unused.hint()}.")
        has = {part: self._has(part) for part in ("image", "condition", "txt", "json")}
        missing = {"image": ~has["image"]}
        if self._options.captions not in ("none", "filename"):
            missing["caption"] = ~(has["txt"] | has["json"])
        if not self.annotate:
            missing["condition"] = ~has["condition"]
        empty = [name for name, count in zip(self._labels, self.shards, strict=True) if not count]
        notes = [f"{plural(len(empty), 'shard')} without samples (the first: {empty[0]})"] if empty else []
        for part, is_missing in missing.items():
            count = int(np.count_nonzero(is_missing))
            if count == len(self):
                text = f"{self.place}: no sample has {_A[part]}: {self._wanted(part)}{unused.hint()}."
                raise UserError(f"{text}{_ADVICE[part]}")
            if count:
                first = self.key(int(np.argmax(is_missing)))
                notes.append(f"{plural(count, 'sample')} without {_A[part]} (the first: {first})")
        self.notes = (*notes, *unused.notes())

    def _check_caption_key(self, cells: Mapping[str, Any]) -> None:
        """Raises UserError if no sample has a .txt, and the first .json of the shards have no caption under its key.

        `cells`: the values in those .json, by key.
        """
        column = self._options.caption_column
        has_txt = bool(self._has("txt").any())
        if self._options.captions != "auto" or has_txt or not cells or column in cells:
            return
        likely = likely_columns(["caption_column"], list(cells), cells)
        words = f" Perhaps: {flag('data.caption_column')} {likely['caption_column']}" if likely else ""
        shown = ", ".join(list(cells)[:_SHOWN_KEYS])
        text = f"{column}: the .json of {self.place} have no such key; there are: {shown}.{words}"
        raise UserError(text, option="data.caption_column")

    def _wanted(self, part: str) -> str:
        """The member that a sample without this part misses, for messages."""
        if part == "caption":
            return f"no member ends in {part_endings(self._options)['txt'][0]} or .json"
        column = self._options.image_column if part == "image" else self._options.conditioning_image_column
        own = ["", f".{column}"] if part == "image" else [".cond", f".{column}"]
        return f"no member ends in {' or '.join(f'{name}.png' for name in own)} (or .jpg, .webp, ...)"

    def _reset(self) -> None:
        self._files: OrderedDict[int, IO[bytes]] = OrderedDict()
        self._lock = threading.Lock()


_A = {"image": "an image", "condition": "a condition", "caption": "a caption"}
_UNPACK = " If the archive holds a data folder, unpack it and name the folder."
_ADVICE = {
    "image": _UNPACK,
    "condition": (
        f" {flag('data.conditioning_image_column')} NAME reads members that end in .NAME.png, and "
        f"{flag('data.condition')} makes the conditions from the images.{_UNPACK}"
    ),
    "caption": f" {flag('data.captions')} none trains without captions.{_UNPACK}",
}
"""What to do if no sample has this part."""


def _joined(indices: Sequence[pa.Table], name: str) -> np.ndarray | None:
    """(N,): a column of all shards, as int32 if its numbers fit; None if no sample has this part. There may be hundreds
    of millions of samples."""
    column = np.concatenate([index.column(name).to_numpy() for index in indices])
    highest = int(column.max(initial=MISSING))
    if highest == MISSING:
        return None
    return column.astype(np.int32) if highest < 2**31 else column


def _stored(index: pa.Table, name: str) -> dict[str, Any]:
    """What `index_shard` has stored beside the table of samples."""
    return json.loads((index.schema.metadata or {}).get(name.encode(), b"{}"))


class Unused:
    """The members of shards that belong to no sample: how many of each ending, and how much litter of systems."""

    def __init__(self) -> None:
        self.endings: Counter[str] = Counter()
        self.litter = 0
        self.first_litter = ""

    @classmethod
    def of(cls, indices: Sequence[pa.Table]) -> Unused:
        """Adds up what `index_shard` has counted in each shard."""
        unused = cls()
        for index in indices:
            counts = _stored(index, "unused")
            unused.endings.update(counts.get("endings", {}))
            unused.litter += counts.get("litter", 0)
            unused.first_litter = unused.first_litter or counts.get("first_litter", "")
        return unused

    def hint(self) -> str:
        """ "; the other members: .depth.png (12)", or ""."""
        return f"; the other members: {self._list()}" if self.endings else ""

    def notes(self) -> list[str]:
        """What the plan says about them."""
        found = []
        if self.endings:
            found.append(f"members that are not used: {self._list()}")
        if self.litter:
            found.append(f"{plural(self.litter, 'file')} of a system or hidden, such as {self.first_litter}: skipped")
        return found

    def _list(self) -> str:
        shown = [f"{ending} ({count:,})" for ending, count in self.endings.most_common(_SHOWN_ENDINGS)]
        return ", ".join(shown + ["..."] * (len(self.endings) > _SHOWN_ENDINGS))
