"""An image folder: `metadata.jsonl` or `metadata.csv` beside the pictures, one folder a split, as `datasets` lays it
out."""

from __future__ import annotations

from pathlib import Path

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.delimited import CsvTable
from t2i_adapter.data.jsonl import JsonLinesTable
from t2i_adapter.data.table import PictureReader, Table
from t2i_adapter.errors import UserError
from t2i_adapter.files import user_path

METADATA = ("metadata.jsonl", "metadata.csv")


def open_rows(location: str, options: DataOptions) -> Table:
    """Raises UserError if the folder has no metadata, or none of this split."""
    metadata = find_split(user_path(location), options.split, METADATA)
    if metadata is None:
        text = f"{location}: there is no {options.split}/{METADATA[0]}, which an image folder has (docs/data.md)."
        raise UserError(text, option="data.location")
    reader = PictureReader(roots=(metadata.parent,))
    if metadata.suffix == ".csv":
        return CsvTable(metadata, str(metadata), reader, options, prefix=f"{metadata.parent.name}/")
    return JsonLinesTable(metadata, reader, options, prefix=f"{metadata.parent.name}/")


def find_split(folder: Path, split: str, marks: tuple[str, ...]) -> Path | None:
    """The file or folder of `marks`, which identify a layout: in `folder`/split, or in `folder` if that is the split's
    own folder.

    None if the folder has another layout. Raises UserError if it has this layout but not this split.
    """

    def marked(place: Path) -> Path | None:
        return next((place / mark for mark in marks if (place / mark).exists()), None)

    if inside := marked(folder / split):
        return inside
    splits = sorted({path.parent.name for mark in marks for path in folder.glob(f"*/{mark}")})
    own = marked(folder)
    if own and split in (folder.name, "train"):
        return own
    if own:
        splits.append("train")
    if splits:
        raise no_split(folder, split, splits)
    return None


def no_split(place: object, split: str, splits: list[str]) -> UserError:
    """The error that a dataset does not have the split which the options name."""
    text = f"{split}: {place} has no split {split!r}; there are: {', '.join(splits)}."
    return UserError(text, option="data.split")
