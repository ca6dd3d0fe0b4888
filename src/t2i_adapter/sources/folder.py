"""Rows of an image folder: `metadata.jsonl` beside the pictures, as `datasets` lays it out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t2i_adapter.errors import UserError

METADATA = "metadata.jsonl"
FILE_NAME = "file_name"


class FolderRows:
    """One split's metadata file. `file_name` is column `image`, `X_file_name` is column X, as in `datasets`."""

    def __init__(self, metadata: Path) -> None:
        self.place = str(metadata)
        self.roots = (metadata.parent,)
        self._lines, self._rows = read_jsonl(metadata)
        self.columns = tuple(dict.fromkeys(column for row in self._rows for column in row))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self._rows[index]

    def where(self, index: int) -> str:
        return f"{self.place}, line {self._lines[index]}"

    def column(self, name: str) -> list[Any]:
        return [row.get(name) for row in self._rows]

    def keys(self, image_column: str) -> list[str]:
        """Each picture's path with its split folder in front, and the line where a picture is used twice."""
        images = [str(image) for image in self.column(image_column)]
        times = Counter(images)
        return [
            f"{self.roots[0].name}/{image}" + (f" (line {line})" if times[image] > 1 else "")
            for image, line in zip(images, self._lines, strict=True)
        ]


def find_metadata(folder: Path, split: str) -> Path | None:
    """The metadata file of a split: in `folder`/split, or in `folder` itself where that is the split's folder.

    None where the folder has another layout. Raises UserError where it has this layout but not this split.
    """
    if (folder / split / METADATA).is_file():
        return folder / split / METADATA
    splits = sorted(path.parent.name for path in folder.glob(f"*/{METADATA}"))
    own = folder / METADATA
    if own.is_file() and split in (folder.name, "train"):
        return own
    if own.is_file():
        splits.append("train")
    if splits:
        raise UserError(f"{folder} has no split {split!r}; there are: {', '.join(splits)}.")
    return None


def read_jsonl(path: Path) -> tuple[list[int], list[dict[str, Any]]]:
    """Line numbers (from 1) and rows of a metadata file, blank lines left out."""
    numbers, rows = [], []
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    rows.append(_parse(line, f"{path}, line {number}"))
                    numbers.append(number)
        except UnicodeDecodeError as fault:
            raise UserError(f"{path}: not UTF-8 text ({fault.reason} at byte {fault.start}).") from fault
    return numbers, rows


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as fault:
        raise UserError(f"{where}: not JSON: {fault.msg} at column {fault.colno}.") from fault
    if not isinstance(row, dict):
        raise UserError(f'{where}: holds {type(row).__name__}; each line is one object: {{"file_name": ..., ...}}.')
    return {_column(name): value for name, value in row.items()}


def _column(name: str) -> str:
    return "image" if name == FILE_NAME else name.removesuffix(f"_{FILE_NAME}")
