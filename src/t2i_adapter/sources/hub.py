"""Rows of whatever the `datasets` library reads: hub ids, local parquet, csv, arrow and saved data sets."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_adapter.config import DataOptions
from t2i_adapter.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

CONVERTED = "refs/convert/parquet"
"""Branch on which the hub keeps a parquet copy of data sets that are published as a loading script."""


class HubRows:
    """One split of a `datasets` data set, map-style, its pictures left undecoded."""

    def __init__(self, data: Dataset, place: str, roots: tuple[Path, ...]) -> None:
        import datasets

        for column, feature in data.features.items():
            if isinstance(feature, datasets.Image):
                data = data.cast_column(column, datasets.Image(decode=False))
        self._data = data
        self.place = place
        self.roots = roots
        self.columns = tuple(data.column_names)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self._data[index]

    def where(self, index: int) -> str:
        return f"{self.place}, row {index}"

    def column(self, name: str) -> list[Any]:
        return self._data.select_columns([name])[:][name]

    def keys(self, image_column: str) -> list[str]:
        return [f"row {index}" for index in range(len(self))]


def open_rows(options: DataOptions, name: str) -> HubRows:
    """Opens `name` (hub id or local folder) with `datasets`. Raises UserError for what the person can mend."""
    from datasets import DatasetDict

    folder = Path(name).expanduser()
    local = folder.is_dir()
    loaded = _from_disk(folder) if local and _was_saved(folder) else _load(options, str(folder) if local else name)
    splits = dict(loaded) if isinstance(loaded, DatasetDict) else {options.split: loaded}
    if options.split not in splits:
        raise UserError(f"{name} has no split {options.split!r}; there are: {', '.join(map(str, splits))}.")
    place = f"{name} (split {options.split})"
    roots = (folder, folder.resolve()) if local else _download_folders(options)
    return HubRows(splits[options.split], place, roots)


def _was_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _from_disk(folder: Path) -> Any:
    from datasets import load_from_disk

    return load_from_disk(str(folder))


def _load(options: DataOptions, name: str) -> Any:
    """All splits of a data set, downloaded where need be."""
    import datasets
    from datasets.exceptions import DatasetsError

    def load(config: str | None, revision: str | None, data_dir: str | None = None) -> Any:
        return datasets.load_dataset(name, config, revision=revision, data_dir=data_dir, cache_dir=options.cache_dir)

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


def _explain(name: str, fault: Exception) -> str:
    cause = fault.__cause__ or fault
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    kind = "folder" if Path(name).is_dir() else "data set"
    return (
        f"{kind} {name} cannot be read: {lines[0].rstrip('.')}. "
        "Give a hub id, or a folder with train/metadata.jsonl beside the pictures (docs/data.md)."
    )


def _download_folders(options: DataOptions) -> tuple[Path, ...]:
    """Where the libraries put downloaded files: the only places that a hub data set's rows may point to."""
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE

    own = (Path(options.cache_dir).expanduser(),) if options.cache_dir else ()
    return (*own, Path(HF_DATASETS_CACHE), Path(HF_HUB_CACHE))
