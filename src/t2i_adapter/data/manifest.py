"""A manifest: one table (.jsonl, .json, .csv, .tsv, .parquet) whose rows name pictures by path or address."""

from __future__ import annotations

from pathlib import Path

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.addresses import base_name
from t2i_adapter.data.delimited import CsvTable
from t2i_adapter.data.jsonl import JsonLinesTable
from t2i_adapter.data.parquet import ParquetTable
from t2i_adapter.data.remote import find
from t2i_adapter.data.store import Store
from t2i_adapter.data.table import PictureReader, Table
from t2i_adapter.errors import UserError
from t2i_adapter.files import cache_root

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def open_rows(location: str, options: DataOptions) -> Table:
    """Opens the table at `location`. Raises UserError.

    `PictureReader.beside` says which pictures its rows may name.
    """
    store = Store(cache_root(options.prepared_dir))
    blobs = find(location)
    if len(blobs) != 1:
        text = f"{location}: names {len(blobs)} files; a manifest is one. Put its rows into one file."
        raise UserError(text, option="data.location")
    blob, reader = blobs[0], PictureReader.beside(blobs, store, options.location)
    suffix = Path(base_name(blob.name)).suffix.lower()
    if suffix == ".parquet":
        return ParquetTable(blobs, store, reader, options)
    if suffix in (".jsonl", ".json"):
        return JsonLinesTable(store.local(blob), reader, options, place=blob.name)
    if suffix in (".csv", ".tsv"):
        return CsvTable(store.local(blob), blob.name, reader, options)
    text = f"{blob.name}: the name of a manifest ends in {', '.join(SUFFIXES)}."
    raise UserError(text, option="data.location")
