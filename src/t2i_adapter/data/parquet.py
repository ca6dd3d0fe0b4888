"""Parquet shards, as a table: rows are read by number from row groups, of which a few are held in memory."""

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
from t2i_adapter.data.addresses import Blob
from t2i_adapter.data.remote import read_tail
from t2i_adapter.data.shard_files import describe, find_shards, labels, part_of, starts
from t2i_adapter.data.store import Store
from t2i_adapter.data.table import PictureReader, Table
from t2i_adapter.errors import UserError, first_line
from t2i_adapter.files import cache_root

_HELD_BYTES, _HELD_GROUPS = 512 * 2**20, 8
_FOOTER = 64 * 2**10
_MAX_FOOTER = 2**30
_THREADS = 16
_MAGIC = b"PAR1"


def open_rows(location: str, options: DataOptions) -> ParquetTable:
    """Shards by glob or braces; a folder stands for all *.parquet in it, or in the split's folder.

    Pictures are bytes, or named as in a manifest. Raises UserError.
    """
    blobs = find_shards(location, options.split, ".parquet")
    store = Store(cache_root(options.prepared_dir))
    return ParquetTable(blobs, store, PictureReader.beside(blobs, store), options)


class ParquetTable(Table):
    """Shards one after another. A row's key is its shard's name and its row in it."""

    def __init__(
        self, blobs: Sequence[Blob], store: Store, reader: PictureReader, options: DataOptions, *, place: str = ""
    ) -> None:
        """`place` is the dataset's name in messages; default is the shards' names. Raises UserError."""
        self._blobs, self._store = list(blobs), store
        self._labels = labels(blobs)
        with ThreadPoolExecutor(_THREADS) as pool:
            groups = list(pool.map(self._groups, blobs))
        shards = tuple(int(rows.sum()) for rows in groups)
        self._shard_starts = starts(shards)
        self._group_starts = [starts(rows) for rows in groups]
        schema = read_footer(blobs[0]).schema.to_arrow_schema()
        self._names = tuple(schema.names)
        self._texts = {field.name for field in schema if _is_text(field.type)}
        self._held: OrderedDict[tuple[int, int, str | None], pa.Table] = OrderedDict()
        self._lock = threading.Lock()
        super().__init__(place or describe(blobs), shards, reader, options)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_held", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _held=OrderedDict(), _lock=threading.Lock())

    def columns(self, wanted: set[str]) -> tuple[str, ...]:
        return self._names

    def values(self, index: int) -> Mapping[str, Any]:
        group, row = self._group(index)
        return {name: _plain(group.column(name)[row]) for name in group.column_names}

    def value(self, index: int, column: str) -> Any:
        """Reads this column alone, so a caption costs no pictures."""
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

    def table_stamp(self, index: int, columns: Sequence[str]) -> str | None:
        shard, row = self._find(index)
        stamp = self._blobs[shard].stamp
        return None if stamp is None or self._texts.intersection(columns) else f"{stamp}\0{row}"

    def _find(self, index: int) -> tuple[int, int]:
        """The shard that holds a row, and the row's number in it."""
        shard = part_of(self._shard_starts, index)
        return shard, index - int(self._shard_starts[shard])

    def _group(self, index: int, column: str | None = None) -> tuple[pa.Table, int]:
        """The row group that holds a row, all columns or one, and the row's number in it."""
        shard, row = self._find(index)
        number = part_of(self._group_starts[shard], row)
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
                # Arrow's threads do not survive a fork into loader processes
                return file.read_row_group(number, columns, use_threads=False).combine_chunks()
        except (pa.ArrowException, OSError) as fault:
            raise _damaged(blob, fault) from fault

    def _groups(self, blob: Blob) -> np.ndarray:
        """Number of rows of each row group."""

        def make() -> pa.Table:
            footer = read_footer(blob)
            rows = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
            return pa.table({"rows": pa.array(rows, pa.int64())})

        table = self._store.index(f"parquet 1\0{blob.stamp}", make) if blob.is_remote and blob.stamp else make()
        return table.column("rows").to_numpy()


def read_footer(blob: Blob) -> pq.FileMetaData:
    """The metadata at the end of a parquet file. Raises UserError if there is no such file, or it is damaged."""
    try:
        if not blob.is_remote:
            return pq.read_metadata(blob.name)
        tail = read_tail(blob, _FOOTER)
        need = int.from_bytes(tail[-8:-4], "little") + 8
        if tail[-4:] == _MAGIC and len(tail) < need <= min(blob.size, _MAX_FOOTER):
            tail = read_tail(blob, need)
        return pq.read_metadata(pa.BufferReader(tail))
    except FileNotFoundError:
        raise UserError(f"{blob.name}: no such file.", kind="missing") from None
    except (pa.ArrowException, OSError) as fault:
        raise _damaged(blob, fault) from fault


def _plain(cell: pa.Scalar) -> Any:
    """A cell as plain types. A picture of `datasets` without bytes is None: the file that its path names could change
    while the shard does not."""
    value = cell.as_py()
    return None if isinstance(value, dict) and "bytes" in value and value["bytes"] is None else value


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)


def _damaged(blob: Blob, fault: Exception) -> UserError:
    return UserError(f"{blob.name}: not a parquet file, or a damaged one: {first_line(fault).rstrip('.')}.")
