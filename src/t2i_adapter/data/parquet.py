"""Parquet shards, as a table: rows are read by number from row groups, of which a few are held in memory."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.addresses import Blob, base_name
from t2i_adapter.data.look import plural
from t2i_adapter.data.remote import read_tail
from t2i_adapter.data.shard_files import check_pointer, describe, find_shards, labels, part_of, starts
from t2i_adapter.data.store import Store
from t2i_adapter.data.table import PictureReader, Table
from t2i_adapter.errors import UserError, first_line
from t2i_adapter.files import cache_root

_HELD_BYTES, _HELD_GROUPS = 512 * 2**20, 8
_FOOTER = 64 * 2**10
_MAX_FOOTER = 2**30
_THREADS = 16
_MAGIC = b"PAR1"
_VERSION = 2  # of what is stored of a remote footer


def open_rows(location: str, options: DataOptions) -> ParquetTable:
    """Shards by glob or braces; a folder stands for all *.parquet in it, or in the split's folder.

    Pictures are bytes, or named as in a manifest. Raises UserError.
    """
    blobs = find_shards(location, options.split, ".parquet")
    store = Store(cache_root(options.prepared_dir))
    return ParquetTable(blobs, store, PictureReader.beside(blobs, store, options.location), options)


class Shard(NamedTuple):
    """What a parquet file's footer says: the rows of each row group, the columns, and the columns that may name files.

    Those hold text, or pictures of `datasets` without bytes.
    """

    rows: np.ndarray
    columns: tuple[str, ...]
    naming: frozenset[str]


class ParquetTable(Table):
    """Shards one after another. A row's key is its shard's name and its row in it."""

    def __init__(
        self, blobs: Sequence[Blob], store: Store, reader: PictureReader, options: DataOptions, *, place: str = ""
    ) -> None:
        """`place` is the dataset's name in messages; default is the shards' names. Raises UserError."""
        self._blobs, self._store = list(blobs), store
        self.captions_are_remote = any(blob.is_remote for blob in blobs)
        self._labels = labels(blobs)
        with ThreadPoolExecutor(_THREADS) as pool:
            self._shards = list(pool.map(self._shard, blobs))
        shards = tuple(int(shard.rows.sum()) for shard in self._shards)
        self._shard_starts = starts(shards)
        self._group_starts = [starts(shard.rows) for shard in self._shards]
        self._used = [number for number, count in enumerate(shards) if count]
        empty = [blob.name for blob, count in zip(blobs, shards, strict=True) if not count]
        if empty:
            self.notes = (f"{plural(len(empty), 'shard')} without rows (the first: {base_name(empty[0])})",)
        self._held: OrderedDict[tuple[int, int, str | None], pa.Table] = OrderedDict()
        self._lock = threading.Lock()
        super().__init__(place or describe(blobs), shards, reader, options)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_held", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _held=OrderedDict(), _lock=threading.Lock())

    def columns(self, wanted: set[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self._shards[self._used[0]].columns))

    def values(self, index: int) -> Mapping[str, Any]:
        group, row = self._group(index)
        found: dict[str, Any] = {}
        for number, name in enumerate(group.column_names):
            if name not in found:  # two columns may have one name
                found[name] = group.column(number)[row].as_py()
        return found

    def value(self, index: int, column: str) -> Any:
        """Reads this column alone, so a caption costs no pictures."""
        if column not in self._shards[self._find(index)[0]].columns:
            return None
        group, row = self._group(index, column)
        return group.column(0)[row].as_py()

    def key(self, index: int) -> str:
        shard, row = self._find(index)
        return f"{self._labels[shard]}, row {row}"

    def where(self, index: int) -> str:
        shard, row = self._find(index)
        return f"{self._blobs[shard].name}, row {row}"

    def table_stamp(self, index: int, columns: Sequence[str]) -> str | None:
        shard, row = self._find(index)
        stamp = self._blobs[shard].stamp
        return None if stamp is None or self._shards[shard].naming.intersection(columns) else f"{stamp}\0{row}"

    def _check_columns(self, used: Mapping[str, str]) -> None:
        """Raises UserError if a used column is in some shards only, or twice in one."""
        for name, column in used.items():
            having = {number: self._shards[number].columns.count(column) for number in self._used}
            several = [number for number, count in having.items() if count > 1]
            if several:
                text = f"{column}: {self._blobs[several[0]].name} has this column {having[several[0]]} times."
                raise UserError(f"{text} Rename the others.", option=f"data.{name}")
            without = [number for number, count in having.items() if not count]
            if 0 < len(without) < len(having):
                other = next(number for number, count in having.items() if count)
                raise UserError(
                    f"{column}: {self._blobs[without[0]].name} has no such column, and "
                    f"{base_name(self._blobs[other].name)} has it; the first has: "
                    f"{', '.join(self._shards[without[0]].columns)}. Give all shards the same columns.",
                    option=f"data.{name}",
                )
        super()._check_columns(used)

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

    def _shard(self, blob: Blob) -> Shard:
        def make() -> pa.Table:
            footer = read_footer(blob)
            rows = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
            schema = footer.schema.to_arrow_schema()
            naming = [field.name for field in schema if _is_text(field.type) or _may_lack_bytes(footer, field)]
            about = {"columns": json.dumps(schema.names), "naming": json.dumps(naming)}
            return pa.table({"rows": pa.array(rows, pa.int64())}).replace_schema_metadata(about)

        is_stored = blob.is_remote and blob.stamp
        table = self._store.index(f"parquet {_VERSION}\0{blob.stamp}", make) if is_stored else make()
        about = {key.decode(): json.loads(value) for key, value in table.schema.metadata.items()}
        return Shard(table.column("rows").to_numpy(), tuple(about["columns"]), frozenset(about["naming"]))


def read_footer(blob: Blob) -> pq.FileMetaData:
    """The metadata at the end of a parquet file. Raises UserError if there is no such file, or it is damaged."""
    try:
        if not blob.is_remote:
            check_pointer(Path(blob.name), blob.name)
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


def _may_lack_bytes(footer: pq.FileMetaData, field: pa.Field) -> bool:
    """Whether a column of `datasets`' pictures may have cells without bytes.

    The file that the path in such a cell names may change while the shard does not.
    """
    if not pa.types.is_struct(field.type) or field.type.get_field_index("bytes") < 0:
        return False
    names = [footer.schema.column(place).path for place in range(footer.num_columns)]
    place = names.index(f"{field.name}.bytes")
    known = [footer.row_group(number).column(place).statistics for number in range(footer.num_row_groups)]
    return any(one is None or not one.has_null_count or one.null_count for one in known)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)


def _damaged(blob: Blob, fault: Exception) -> UserError:
    return UserError(f"{blob.name}: not a parquet file, or a damaged one: {first_line(fault).rstrip('.')}.")
