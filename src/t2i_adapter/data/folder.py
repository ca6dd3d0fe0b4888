"""An image folder: `metadata.jsonl` beside the pictures, one folder a split, as `datasets` lays it out."""

from __future__ import annotations

from pathlib import Path

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.jsonl import JsonLinesTable
from t2i_adapter.data.table import PictureReader
from t2i_adapter.errors import UserError
from t2i_adapter.files import user_path

METADATA = "metadata.jsonl"


def open_rows(location: str, options: DataOptions) -> JsonLinesTable:
    """Raises UserError if the folder has no metadata, or none of this split."""
    metadata = find_split(user_path(location), options.split, METADATA)
    if metadata is None:
        text = f"{location}: there is no {options.split}/{METADATA}, which an image folder has (docs/data.md)."
        raise UserError(text, option="data.train_data_dir")
    reader = PictureReader(roots=(metadata.parent,))
    return JsonLinesTable(metadata, reader, options, prefix=f"{metadata.parent.name}/")


def find_split(folder: Path, split: str, mark: str) -> Path | None:
    """The file or folder `mark`, which identifies a layout: in `folder`/split, or in `folder` if that is the split's
    own folder.

    None if the folder has another layout. Raises UserError if it has this layout but not this split.
    """
    if (folder / split / mark).exists():
        return folder / split / mark
    splits = sorted(path.parent.name for path in folder.glob(f"*/{mark}"))
    own = folder / mark
    if own.exists() and split in (folder.name, "train"):
        return own
    if own.exists():
        splits.append("train")
    if splits:
        raise UserError(f"{folder} has no split {split!r}; there are: {', '.join(splits)}.")
    return None
