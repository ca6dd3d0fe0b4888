"""An image folder: `metadata.jsonl` beside the pictures, a folder a split, as `datasets` lays it out."""

from __future__ import annotations

from pathlib import Path

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.cells import CellRows, Cells
from t2i_adapter.data.lines import LineTable
from t2i_adapter.errors import UserError
from t2i_adapter.files import user_path

METADATA = "metadata.jsonl"


def open_rows(location: str, options: DataOptions) -> CellRows:
    """Raises UserError where the folder has no metadata, or not of this split."""
    folder = user_path(location)
    metadata = find_split(folder, options.split, METADATA)
    if metadata is None:
        raise UserError(
            f"{location}: there is no {options.split}/{METADATA}, which an image folder has (docs/data.md)."
        )
    table = LineTable(metadata, options.image_column, prefix=f"{metadata.parent.name}/")
    return CellRows(table, Cells(roots=(metadata.parent,)), options)


def find_split(folder: Path, split: str, mark: str) -> Path | None:
    """`mark`, the file or folder that tells a layout: in `folder`/split, or in `folder` itself where that is the
    split's folder.

    None where the folder has another layout. Raises UserError where it has this layout but not this split.
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
