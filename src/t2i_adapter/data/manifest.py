"""A manifest: one table (.jsonl, .csv, .parquet) whose rows name pictures by path or address."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.addresses import base_name
from t2i_adapter.data.jsonl import JsonLinesTable
from t2i_adapter.data.parquet import ParquetTable
from t2i_adapter.data.remote import find
from t2i_adapter.data.store import Store
from t2i_adapter.data.table import PictureReader, Table
from t2i_adapter.errors import UserError, first_line
from t2i_adapter.files import cache_root

SUFFIXES = (".jsonl", ".csv", ".parquet")
_BLOCK = 16 * 2**20


def open_rows(location: str, options: DataOptions) -> Table:
    """Paths are relative to the manifest's folder and stay in it; addresses are downloaded. Raises UserError."""
    store = Store(cache_root(options.prepared_dir))
    blobs = find(location)
    if len(blobs) != 1:
        text = f"{location}: names {len(blobs)} files; a manifest is one. Put its rows into one file."
        raise UserError(text, option="data.location")
    blob, reader = blobs[0], PictureReader.beside(blobs, store)
    suffix = Path(base_name(blob.name)).suffix.lower()
    if suffix == ".parquet":
        return ParquetTable(blobs, store, reader, options)
    if suffix == ".jsonl":
        return JsonLinesTable(store.local(blob), reader, options, place=blob.name)
    if suffix == ".csv":
        return CsvTable(store.local(blob), blob.name, reader, options)
    text = f"{blob.name}: the name of a manifest ends in {', '.join(SUFFIXES)}."
    raise UserError(text, option="data.location")


class CsvTable(Table):
    """A .csv with a header row, held column by column. Pictures and captions are text; an empty cell of a caption is
    the empty caption."""

    def __init__(self, path: Path, place: str, reader: PictureReader, options: DataOptions) -> None:
        """`place` is the file's name in messages. Raises UserError."""
        texts = options.image_column, options.conditioning_image_column, options.caption_column
        try:
            self._rows = csv.read_csv(
                path,
                read_options=csv.ReadOptions(use_threads=False, block_size=_BLOCK),
                parse_options=csv.ParseOptions(newlines_in_values=True),
                convert_options=csv.ConvertOptions(column_types=dict.fromkeys(texts, pa.string())),
            )
        except pa.ArrowInvalid as fault:
            reason = first_line(fault).rstrip(".")
            raise UserError(f"{place}: cannot be read as CSV with a header row: {reason}.") from fault
        super().__init__(place, (len(self._rows),), reader, options)

    def columns(self, wanted: set[str]) -> tuple[str, ...]:
        return tuple(self._rows.column_names)

    def values(self, index: int) -> Mapping[str, Any]:
        return {name: self.value(index, name) for name in self._rows.column_names}

    def value(self, index: int, column: str) -> Any:
        return self._rows.column(column)[index].as_py()
