"""Datasets of the `datasets` library: hub ids, saved datasets, and local folders of parquet or arrow files."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.folder import no_split
from t2i_adapter.data.look import walk
from t2i_adapter.data.parquet import ParquetTable
from t2i_adapter.data.remote import find_all
from t2i_adapter.data.shard_files import find_shards
from t2i_adapter.data.store import Store
from t2i_adapter.data.table import PictureReader, Table
from t2i_adapter.errors import UserError, first_line
from t2i_adapter.files import cache_root, user_path

if TYPE_CHECKING:
    from datasets import Dataset

CONVERTED = "refs/convert/parquet"
"""Branch on which the hub keeps a parquet copy of a dataset that is published as a loading script."""


class HubTable(Table):
    """One split of a map-style `datasets` dataset; its pictures stay encoded."""

    def __init__(self, data: Dataset, place: str, reader: PictureReader, options: DataOptions) -> None:
        import datasets

        for column, feature in data.features.items():
            if isinstance(feature, datasets.Image):
                data = data.cast_column(column, datasets.Image(decode=False))
        self._data = data
        self._columns: dict[str, Dataset] = {}
        super().__init__(place, (len(data),), reader, options)

    def columns(self, wanted: set[str]) -> tuple[str, ...]:
        return tuple(self._data.column_names)

    def values(self, index: int) -> Mapping[str, Any]:
        return self._data[index]

    def value(self, index: int, column: str) -> Any:
        if column not in self._columns:
            self._columns[column] = self._data.select_columns([column])  # reads a caption without the pictures
        return self._columns[column][index][column]


def open_rows(name: str, options: DataOptions) -> Table:
    """Opens `name`, a hub id or local folder, with `datasets`.

    A local folder's parquet files are read without it, and so are a hub id's if streaming. Raises UserError.
    """
    folder = user_path(name)
    local = folder.is_dir()
    roots = (folder, folder.resolve())
    if local and not _was_saved(folder) and _is_plain_parquet(folder, options):
        blobs = find_shards(name, options.split, ".parquet")
        place = f"{name} (split {options.split})"
        return ParquetTable(blobs, Store(cache_root(options.prepared_dir)), PictureReader(roots), options, place=place)
    if options.streaming and not local:
        return _stream(name, options)
    from datasets import DatasetDict

    loaded = _from_disk(folder) if local and _was_saved(folder) else _load(options, str(folder) if local else name)
    splits = dict(loaded) if isinstance(loaded, DatasetDict) else {str(loaded.split or "train"): loaded}
    if options.split not in splits:
        raise no_split(name, options.split, list(map(str, splits)))
    reader = PictureReader(roots if local else _download_folders(options))
    return HubTable(splits[options.split], f"{name} (split {options.split})", reader, options)


def _is_plain_parquet(folder: Path, options: DataOptions) -> bool:
    """Whether a folder holds parquet files, and neither arrow files nor configurations, which `datasets` knows."""
    if options.dataset_config_name:
        return False
    card = folder / "README.md"
    if card.is_file() and re.search(r"^configs:", card.read_text(encoding="utf-8", errors="replace"), re.MULTILINE):
        return False
    endings = {Path(name).suffix.lower() for _, files in walk(folder) for name in files}
    return ".parquet" in endings and ".arrow" not in endings


def _stream(name: str, options: DataOptions) -> ParquetTable:
    """The parquet files of a hub dataset, or of the hub's parquet copy of it."""
    store = Store(cache_root(options.prepared_dir))
    for revision in dict.fromkeys([options.dataset_revision or "main", options.dataset_revision or CONVERTED]):
        files = find_all(f"hf://datasets/{name}@{quote(revision, safe='')}", "**/*.parquet")
        shards = [blob for blob in files if _is_part(blob.name, options)]
        if shards:
            place = f"{name} (split {options.split}, {len(shards)} shards)"
            return ParquetTable(shards, store, PictureReader(), options, place=place)
        if files:
            text = f"{options.split}: {name} has parquet files, but none of this split{_of_config(options)}"
            raise UserError(text, option="data.split")
    text = f"{name} has no parquet files, and neither has the hub's copy of it. Read it without this option."
    raise UserError(text, option="data.streaming")


def _is_part(url: str, options: DataOptions) -> bool:
    """Whether a file belongs to the split and configuration: by a folder's name, or the start of the file's name."""
    *folders, file = url.partition("@")[2].split("/")[1:]  # of hf://datasets/owner/name@revision/folder/file
    config = options.dataset_config_name
    in_split = options.split in folders or re.match(rf"{re.escape(options.split)}(?![A-Za-z])", file) is not None
    return in_split and (config is None or config in folders)


def _of_config(options: DataOptions) -> str:
    return f" and configuration {options.dataset_config_name!r}." if options.dataset_config_name else "."


def _was_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _from_disk(folder: Path) -> Any:
    from datasets import load_from_disk
    from datasets.exceptions import DatasetsError

    try:
        with _quiet():
            return load_from_disk(str(folder))
    except IndexError:  # of a dataset that was saved without rows
        raise UserError(f"{folder}: there are no rows.") from None
    except (DatasetsError, OSError, ValueError, KeyError) as fault:
        raise UserError(_explain(str(folder), fault)) from fault


def _load(options: DataOptions, name: str) -> Any:
    """All splits of a dataset, downloaded if needed."""
    import datasets
    from datasets.exceptions import DatasetsError

    def load(config: str | None, revision: str | None, data_dir: str | None = None) -> Any:
        with _quiet():
            return datasets.load_dataset(
                name, config, revision=revision, data_dir=data_dir, cache_dir=options.cache_dir
            )

    try:
        try:
            return load(options.dataset_config_name, options.dataset_revision)
        except RuntimeError as fault:
            if "scripts are no longer supported" not in str(fault) or options.dataset_revision or Path(name).is_dir():
                raise
            print(f"{name} is a loading script, which is not run: reading its copy at {CONVERTED}.", file=sys.stderr)
            return load(None, CONVERTED, options.dataset_config_name)
    except (DatasetsError, OSError, ValueError, RuntimeError) as fault:
        raise UserError(_explain(name, fault)) from fault


@contextmanager
def _quiet() -> Iterator[None]:
    """`datasets` logs nothing while the block runs: its errors are explained in one line.

    Its progress bars are shown on a terminal only.
    """
    import datasets

    level, has_bars = datasets.utils.logging.get_verbosity(), datasets.are_progress_bars_disabled() is False
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    if has_bars and not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.utils.logging.set_verbosity(level)
        if has_bars:
            datasets.enable_progress_bars()


def _explain(name: str, fault: Exception) -> str:
    from datasets.table import CastError

    cause = fault.__cause__ or fault
    reason = first_line(cause) if isinstance(cause, Exception) else type(cause).__name__
    if isinstance(cause, CastError):
        first, other = sorted(cause.requested_column_names), sorted(cause.table_column_names)
        reason = f"its files have unlike columns, {', '.join(first)} and {', '.join(other)}"
    kind = "folder" if Path(name).is_dir() else "dataset"
    return (
        f"{kind} {name} cannot be read: {reason.rstrip('.')}. "
        "Name a hub id, or a folder with train/metadata.jsonl beside the pictures (docs/data.md)."
    )


def _download_folders(options: DataOptions) -> tuple[Path, ...]:
    """Folders of the libraries' downloads: the only folders that rows of a hub dataset may name files in."""
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE

    own = (user_path(options.cache_dir),) if options.cache_dir else ()
    return (*own, Path(HF_DATASETS_CACHE), Path(HF_HUB_CACHE))
