"""A source over a table of rows: which column is what, and every fault of a row named."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL.Image import Image

from t2i_adapter.config import DataOptions
from t2i_adapter.errors import UserError
from t2i_adapter.sources.folder import FolderRows, find_metadata
from t2i_adapter.sources.geometry import aspect_gap
from t2i_adapter.sources.picture import StoredPicture, decode, read_cell
from t2i_adapter.types import Sample

MAX_ASPECT_GAP = 1.0  # pixels: what rounding a size makes


@dataclass(frozen=True)
class Identity:
    """What is known of a row before its pictures are decoded; fields as in `Sample`."""

    key: str
    captions: tuple[str, ...]
    digest: str


class Source(Protocol):
    """Training pairs by number. Every call reads afresh and depends on nothing but the number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """The pair, decoded and checked. Raises UserError naming the row or file."""
        ...

    def identify(self, index: int) -> Identity:
        """The pair's key, captions and content hash: reads the stored bytes, decodes nothing. Raises UserError."""
        ...

    def describe(self) -> str:
        """One line for the plan: how many pairs, from where."""
        ...


class Rows(Protocol):
    """A table: what `TableSource` needs of a folder or a `datasets` split."""

    place: str
    columns: tuple[str, ...]
    roots: tuple[Path, ...]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    def column(self, name: str) -> list[Any]: ...
    def keys(self, image_column: str) -> list[str]: ...
    def where(self, index: int) -> str: ...


def open_source(options: DataOptions, seed: int) -> Source:
    """Opens the data that the options name; `seed` chooses the rows where max_train_samples is set.

    Columns and captions are checked here, pictures when they are read. Raises UserError.
    """
    rows = open_rows(options)
    return TableSource(rows, options, choose(len(rows), options.max_train_samples, seed))


def open_rows(options: DataOptions) -> Rows:
    if bool(options.train_data_dir) == bool(options.dataset_name):
        given = "both are given" if options.dataset_name else "neither is given"
        raise UserError(f"--dataset_name or --train_data_dir names the data; {given}: give one of them.")
    folder = Path(options.train_data_dir or options.dataset_name or "").expanduser()
    if options.train_data_dir and not folder.is_dir():
        raise UserError(f"--train_data_dir {options.train_data_dir}: no such folder.")
    metadata = find_metadata(folder, options.split) if folder.is_dir() else None
    if metadata:
        return FolderRows(metadata)
    from t2i_adapter.sources import hub  # the `datasets` library takes a second to load; image folders do without

    return hub.open_rows(options, options.train_data_dir or options.dataset_name or "")


def choose(count: int, most: int | None, seed: int) -> Sequence[int]:
    """Numbers of the rows that are used, ascending: all, or `most` drawn by the seed."""
    if most is None or most >= count:
        return range(count)
    return sorted(np.random.default_rng(seed).choice(count, most, replace=False).tolist())


class TableSource:
    """Pairs from a table of rows, by column names. What needs no picture is checked when it is made."""

    def __init__(self, rows: Rows, options: DataOptions, numbers: Sequence[int]) -> None:
        self._rows = rows
        self._options = options
        self._numbers = numbers
        self._check_columns()
        self._captions = rows.column(options.caption_column)
        self._keys = rows.keys(options.image_column)
        for number in numbers:
            check_caption(self._captions[number], self._cell(number, options.caption_column))

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Sample:
        number = self._numbers[index]
        row = self._rows[number]
        stored = self._stored(number, row)
        image, condition = decode(stored[0]), decode(stored[1])
        self._check_aspect(number, image, condition)
        identity = self._identity(number, stored)
        return Sample(identity.key, image, condition, identity.captions, identity.digest, self._meta(row))

    def identify(self, index: int) -> Identity:
        number = self._numbers[index]
        return self._identity(number, self._stored(number, self._rows[number]))

    def describe(self) -> str:
        of = f" of {len(self._rows)}" if len(self) < len(self._rows) else ""
        return f"{len(self)}{of} pairs from {self._rows.place}"

    def _stored(self, number: int, row: Mapping[str, Any]) -> tuple[StoredPicture, StoredPicture]:
        columns = self._options.image_column, self._options.conditioning_image_column
        image, condition = (
            read_cell(row.get(column), cell=self._cell(number, column), roots=self._rows.roots) for column in columns
        )
        return image, condition

    def _identity(self, number: int, stored: tuple[StoredPicture, StoredPicture]) -> Identity:
        captions = self._captions[number]
        texts = (captions,) if isinstance(captions, str) else tuple(captions)
        return Identity(self._keys[number], texts, digest(*stored))

    def _meta(self, row: Mapping[str, Any]) -> dict[str, Any]:
        options = self._options
        used = (options.image_column, options.conditioning_image_column, options.caption_column)
        return {k: v for k, v in row.items() if k not in used and isinstance(v, str | int | float | bool)}

    def _cell(self, number: int, column: str) -> str:
        return f"{self._rows.where(number)}, column {column}"

    def _check_columns(self) -> None:
        if not len(self._rows):
            raise UserError(f"{self._rows.place}: there are no rows.")
        for flag in ("image_column", "conditioning_image_column", "caption_column"):
            if getattr(self._options, flag) not in self._rows.columns:
                raise UserError(
                    f"--{flag} {getattr(self._options, flag)}: {self._rows.place} has no such column; "
                    f"there are: {', '.join(self._rows.columns)}."
                )

    def _check_aspect(self, number: int, image: Image, condition: Image) -> None:
        if aspect_gap((image.height, image.width), (condition.height, condition.width)) > MAX_ASPECT_GAP:
            raise UserError(
                f"{self._rows.where(number)} ({self._keys[number]}): the condition is "
                f"{condition.width}x{condition.height} and its image {image.width}x{image.height}: another aspect, so "
                "they would not lie on each other. Make the condition at its image's size, or at one scale of it."
            )


def check_caption(value: Any, cell: str) -> None:
    """A caption is a string, or a list of at least one; the empty string is allowed. Raises UserError."""
    texts = value if isinstance(value, list | tuple) else [value]
    if not texts:
        raise UserError(f'{cell}: an empty list; give at least one caption ("" is allowed).')
    for text in texts:
        if text is None:
            raise UserError(f'{cell}: there is no caption. Add one ("" is allowed) or leave the row out.')
        if not isinstance(text, str):
            raise UserError(f"{cell}: holds {type(text).__name__}; a caption is a string or a list of strings.")


def digest(image: StoredPicture, condition: StoredPicture) -> str:
    """sha256 (hex) of both pictures' stored bytes."""
    whole = hashlib.sha256(len(image.data).to_bytes(8, "little"))
    whole.update(image.data)
    whole.update(condition.data)
    return whole.hexdigest()
