"""Parquet shards: rows by number from row groups, of which a few are held."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.cells import CellRows, beside
from t2i_adapter.data.remote import Blob, Store, base_name, find, read_tail
from t2i_adapter.errors import UserError
from t2i_adapter.files import cache_root, user_path

_HELD_BYTES, _HELD_GROUPS = 512 * 2**20, 8
_FOOTER = 64 * 2**10
_MAX_FOOTER = 2**30
_AT_ONCE = 16
_MAGIC = b"PAR1"


def open_rows(location: str, options: DataOptions) -> CellRows:
    """Shards by glob or braces; a folder stands for all *.parquet in it, or in the split's folder. Pictures are bytes,
    or as in a manifest. Raises UserError."""
    blobs = find(shard_pattern(location, options.split, ".parquet"), "train_data_dir")
    store = Store(cache_root(options.prepared_dir))
    return CellRows(ParquetTable(blobs, store), beside(blobs, store), options)


def shard_pattern(location: str, split: str, suffix: str) -> str:
    """The glob that a local folder stands for: its split's shards; anything else is a pattern already."""
    folder = user_path(location)
    if not folder.is_dir():
        return location
    if any((folder / split).glob(f"*{suffix}")):
        return str(folder / split / f"*{suffix}")
    named = f"{split}*{suffix}"
    return str(folder / (named if any(folder.glob(named)) else f"*{suffix}"))


class ParquetTable:
    """Shards one after another. Keys are a shard's name and the row in it."""

    def __init__(self, blobs: Sequence[Blob], store: Store, place: str = "") -> None:
        self.place = place or describe(blobs)
        self._blobs, self._store = list(blobs), store
        self._labels = labels(blobs)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            groups = list(pool.map(self._groups, blobs))
        self.shards = tuple(int(rows.sum()) for rows in groups)
        self._shard_starts = starts(self.shards)
        self._group_starts = [starts(rows) for rows in groups]
        schema = read_footer(blobs[0]).schema.to_arrow_schema()
        self._names = tuple(schema.names)
        self._texts = {field.name for field in schema if _is_text(field.type)}
        self._held: OrderedDict[tuple[int, int, str | None], pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._shard_starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_held", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _held=OrderedDict(), _lock=threading.Lock())

    def names(self, wanted: set[str]) -> tuple[str, ...]:
        return self._names

    def row(self, index: int) -> Mapping[str, Any]:
        group, row = self._group(index)
        return {name: _plain(group.column(name)[row]) for name in group.column_names}

    def value(self, index: int, column: str) -> Any:
        """Reads that column alone: captions without their pictures."""
        if column not in self._names:
            return None
        group, row = self._group(index, column)
        return _plain(group.column(column)[row])

    def key(self, index: int) -> str:
        shard, row = self._find(index)
        return f"{self._labels[shard]}, row {row}"

    def where(self, index: int) -> str:
        shard, row = self._find(index)
        return f"{self._blobs[shard].name}, row {row}"

    def stamp(self, index: int, columns: Sequence[str]) -> str | None:
        shard, row = self._find(index)
        stamp = self._blobs[shard].stamp
        return None if stamp is None or self._texts.intersection(columns) else f"{stamp}\0{row}"

    def _find(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._shard_starts, index, side="right")) - 1
        return shard, index - int(self._shard_starts[shard])

    def _group(self, index: int, column: str | None = None) -> tuple[pa.Table, int]:
        """The row group that holds a row, all of it or one column, and the row's number in it."""
        shard, row = self._find(index)
        number = int(np.searchsorted(self._group_starts[shard], row, side="right")) - 1
        key = shard, number, column
        with self._lock:
            table = self._held.pop(key, None)
            if table is None:
                table = self._read(shard, number, column)
            self._held[key] = table
            while len(self._held) > _HELD_GROUPS or (
                len(self._held) > 1 and sum(held.nbytes for held in self._held.values()) > _HELD_BYTES
            ):
                self._held.popitem(last=False)
        return table, row - int(self._group_starts[shard][number])

    def _read(self, shard: int, number: int, column: str | None) -> pa.Table:
        blob = self._blobs[shard]
        path = self._store.local(blob)
        columns = None if column is None else [column]
        try:
            with pq.ParquetFile(path) as file:
                # Not with arrow's threads: they do not outlive a fork into loader processes
                return file.read_row_group(number, columns, use_threads=False).combine_chunks()
        except (pa.ArrowException, OSError) as fault:
            raise _damaged(blob, fault) from fault

    def _groups(self, blob: Blob) -> np.ndarray:
        """Rows of each row group."""

        def make() -> pa.Table:
            footer = read_footer(blob)
            rows = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
            return pa.table({"rows": pa.array(rows, pa.int64())})

        table = self._store.index(f"parquet 1\0{blob.stamp}", make) if blob.is_remote and blob.stamp else make()
        return table.column("rows").to_numpy()


def read_footer(blob: Blob) -> pq.FileMetaData:
    """What a parquet file says of itself, at its end. Raises UserError where there is no such file, or it is none."""
    try:
        if not blob.is_remote:
            return pq.read_metadata(blob.name)
        tail = read_tail(blob, _FOOTER)
        need = int.from_bytes(tail[-8:-4], "little") + 8
        if tail[-4:] == _MAGIC and len(tail) < need <= min(blob.size, _MAX_FOOTER):
            tail = read_tail(blob, need)
        return pq.read_metadata(pa.BufferReader(tail))
    except FileNotFoundError:
        raise UserError(f"{blob.name}: no such file.") from None
    except (pa.ArrowException, OSError) as fault:
        raise _damaged(blob, fault) from fault


def starts(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """(N,) counts -> (N+1,) int64: the first number of each part, and the number of all."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def labels(blobs: Sequence[Blob]) -> list[str]:
    """Short names of shards: the file's, or the whole where two files have the same."""
    short = [base_name(blob.name) for blob in blobs]
    return short if len(set(short)) == len(short) else [blob.name for blob in blobs]


def describe(blobs: Sequence[Blob]) -> str:
    """ "data/0000.tar", or "16 shards, data/0000.tar to 0015.tar"."""
    first, last = blobs[0].name, labels(blobs)[-1]
    return first if len(blobs) == 1 else f"{len(blobs)} shards, {first} to {last}"


def _plain(cell: pa.Scalar) -> Any:
    """A cell as plain types. Of `datasets`' pictures only those whose bytes are here: what their path leads to could
    change without the shard."""
    value = cell.as_py()
    return None if isinstance(value, dict) and "bytes" in value and value["bytes"] is None else value


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)


def _damaged(blob: Blob, fault: Exception) -> UserError:
    reason = (str(fault).splitlines() or [type(fault).__name__])[0]
    return UserError(f"{blob.name}: not a parquet file, or a damaged one: {reason.rstrip('.')}.")
