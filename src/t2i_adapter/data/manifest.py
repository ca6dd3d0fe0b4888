"""A manifest: one table (.jsonl, .csv, .parquet) whose rows name pictures by path or address."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.cells import CellRows, Table, beside
from t2i_adapter.data.lines import LineTable
from t2i_adapter.data.parquet import ParquetTable
from t2i_adapter.data.remote import Blob, Store, base_name, find
from t2i_adapter.errors import UserError
from t2i_adapter.files import cache_root

SUFFIXES = (".jsonl", ".csv", ".parquet")
_BLOCK = 16 * 2**20


def open_rows(location: str, options: DataOptions) -> CellRows:
    """Paths are relative to the manifest's folder and stay in it; addresses are fetched. Raises UserError."""
    store = Store(cache_root(options.prepared_dir))
    blobs = find(location, "train_data_dir")
    if len(blobs) != 1:
        raise UserError(f"{location}: names {len(blobs)} files; a manifest is one. Put its rows into one file.")
    return CellRows(_open(blobs[0], options, store), beside(blobs, store), options)


def _open(blob: Blob, options: DataOptions, store: Store) -> Table:
    suffix = Path(base_name(blob.name)).suffix.lower()
    if suffix == ".parquet":
        return ParquetTable([blob], store)
    if suffix == ".jsonl":
        return LineTable(store.local(blob), options.image_column, place=blob.name)
    if suffix == ".csv":
        return CsvTable(store.local(blob), options, place=blob.name)
    raise UserError(f"{blob.name}: a manifest ends in {', '.join(SUFFIXES)}.")


class CsvTable:
    """A .csv with a header row, held column by column. Pictures and captions are text; an empty caption is empty."""

    def __init__(self, path: Path, options: DataOptions, place: str) -> None:
        self.place = place
        texts = options.image_column, options.conditioning_image_column, options.caption_column
        try:
            self._rows = csv.read_csv(
                path,
                read_options=csv.ReadOptions(use_threads=False, block_size=_BLOCK),
                parse_options=csv.ParseOptions(newlines_in_values=True),
                convert_options=csv.ConvertOptions(column_types=dict.fromkeys(texts, pa.string())),
            )
        except pa.ArrowInvalid as fault:
            reason = str(fault).splitlines()[0] if str(fault) else "no table"
            raise UserError(f"{place}: cannot be read as CSV with a header row: {reason.rstrip('.')}.") from fault
        self.shards = (len(self._rows),)

    def __len__(self) -> int:
        return len(self._rows)

    def names(self, wanted: set[str]) -> tuple[str, ...]:
        return tuple(self._rows.column_names)

    def row(self, index: int) -> Mapping[str, Any]:
        return {name: self.value(index, name) for name in self._rows.column_names}

    def value(self, index: int, column: str) -> Any:
        return self._rows.column(column)[index].as_py()

    def key(self, index: int) -> str:
        return f"row {index}"

    def where(self, index: int) -> str:
        return f"{self.place}, row {index}"

    def stamp(self, index: int, columns: Sequence[str]) -> str | None:
        return None
