"""Rows of a table whose cells hold pictures: paths, addresses, or bytes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.picture import StoredPicture, read_file
from t2i_adapter.data.remote import Blob, Store, file_stamp, is_url, local_path
from t2i_adapter.data.rows import Row
from t2i_adapter.errors import UserError, flag, has_login


class Table(Protocol):
    """Rows of named columns, by number."""

    place: str
    shards: tuple[int, ...]

    def names(self, wanted: set[str]) -> tuple[str, ...]:
        """The columns there are; at least those of `wanted` that are there at all."""
        ...

    def __len__(self) -> int: ...
    def row(self, index: int) -> Mapping[str, Any]: ...
    def value(self, index: int, column: str) -> Any: ...
    def key(self, index: int) -> str: ...
    def where(self, index: int) -> str: ...

    def stamp(self, index: int, columns: Sequence[str]) -> str | None:
        """As `Source.stamp`, where the pictures of these columns are in the table itself; None where they are not."""
        ...


@dataclass(frozen=True)
class Cells:
    """How a cell's value becomes a picture's stored bytes.

    Attributes:
        roots: folders that paths may lie in; a relative path is taken from the first.
        base: URL of the folder that relative paths are taken from instead, where the table itself is remote.
        store: fetches addresses; None where rows may not name any.
    """

    roots: tuple[Path, ...] = ()
    base: str | None = None
    store: Store | None = None

    def read(self, value: Any, cell: str) -> StoredPicture:
        """The stored bytes of a path, bytes, or `datasets`' {"bytes", "path"}. Raises UserError beginning with `cell`,
        which names row and column."""
        if isinstance(value, dict) and set(value) <= {"bytes", "path"} and value:
            data, path = value.get("bytes"), value.get("path")
            if data is not None:
                return StoredPicture(f"{cell} ({path})" if path else cell, data)
            value = path
        if value is None or value == "":
            raise UserError(
                f"{cell}: there is no picture. Every row needs one: add it or skip the row.", kind="missing"
            )
        if isinstance(value, bytes):
            return StoredPicture(cell, value)
        if not isinstance(value, str):
            kind = "unreadable"
            raise UserError(f"{cell}: holds {type(value).__name__}; allowed are pictures, paths or bytes.", kind=kind)
        blob = self._blob(value, cell)
        try:
            path = self.store.local(blob) if blob.is_remote and self.store else Path(blob.name)
        except UserError as fault:
            raise fault.within(cell) from fault
        return StoredPicture(blob.name, read_file(path, cell))

    def stamp(self, value: Any) -> str | None:
        """Path, size and time of change of the file that a cell names; None where it names none that is here."""
        if isinstance(value, dict) and value.get("bytes") is None:
            value = value.get("path")
        if not isinstance(value, str) or not value:
            return None
        try:
            blob = self._blob(value, "")
            path = self.store.place(blob) if blob.is_remote and self.store else Path(blob.name)
            return file_stamp(blob.name, path.stat())
        except (OSError, ValueError, UserError):  # ValueError: a name that no file can have
            return None  # reading it says what is wrong

    def _blob(self, text: str, cell: str) -> Blob:
        """The file that a row names, which must lie in one of `roots` or be an address where those are allowed.

        The path itself is judged, not where a symbolic link leads: links are set by the folder's owner, paths by the
        row.
        """
        if "\0" in text:
            raise UserError(f"{cell}: {text!r} is no path: it holds a zero byte.")
        if is_url(text):
            return self._address(text, cell)
        if self.base:
            return Blob(f"{self.base}/{_inside(text, self.base, cell)}", 0, None)
        if not self.roots:
            raise UserError(f"{cell}: {text!r} is a path, but this data set has no folder that it could lie in.")
        path = normal(self.roots[0] / text)
        if not any(path.is_relative_to(normal(root)) for root in self.roots):
            raise UserError(
                f"{cell}: {text!r} leaves the data folder {self.roots[0]}. Paths must stay in it.", kind="missing"
            )
        return Blob(str(path), 0, None)

    def _address(self, url: str, cell: str) -> Blob:
        if self.store is None:
            raise UserError(
                f"{cell}: {url!r} is an address; only files are read. Download it and write its path, or make the "
                f"table a manifest ({flag('data.kind')} manifest), whose rows may name addresses.",
                kind="missing",
            )
        if has_login(url):
            raise UserError(f"{cell}: {url!r} held a login, which rows may not; put it into ~/.netrc.")
        if not url.startswith("file://"):
            return Blob(url, 0, None)
        if self.base:
            raise UserError(f"{cell}: {url!r} names a file here, but the table comes from {self.base}.")
        return Blob(str(local_path(url)), 0, None)


def beside(blobs: Sequence[Blob], store: Store) -> Cells:
    """Cells of files whose paths are relative to the first one's folder and stay in a folder of theirs; addresses are
    fetched."""
    if blobs[0].is_remote:
        return Cells(base=blobs[0].name.partition("?")[0].rpartition("/")[0], store=store)
    return Cells(roots=tuple(dict.fromkeys(Path(blob.name).parent for blob in blobs)), store=store)


def normal(path: Path) -> Path:
    """Absolute, with `.` and `..` taken out, links kept."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - Path.resolve() would follow links


_SCHEME = re.compile("[A-Za-z][A-Za-z0-9+.-]*:")


def _inside(text: str, base: str, cell: str) -> str:
    path = os.path.normpath(text)
    if path.startswith(("/", "..")) or _SCHEME.match(path):
        raise UserError(f"{cell}: {text!r} leaves the data folder {base}. Paths must stay in it.", kind="missing")
    return path


class CellRows:
    """Rows of a table, by the column names that the options give."""

    def __init__(self, table: Table, cells: Cells, options: DataOptions) -> None:
        self.place, self.shards = table.place, table.shards
        self.annotate = options.condition
        self._table, self._cells, self._options = table, cells, options
        used = ["image_column", "caption_column"]
        if not self.annotate:
            used.insert(1, "conditioning_image_column")
        self._pictures = [getattr(options, name) for name in used[:-1]]
        _check_columns(table, {name: getattr(options, name) for name in used})

    def __len__(self) -> int:
        return len(self._table)

    def key(self, index: int) -> str:
        return self._table.key(index)

    def where(self, index: int) -> str:
        return self._table.where(index)

    def caption_cell(self, index: int) -> str:
        return self._cell(index, self._options.caption_column)

    def captions(self, index: int) -> Any:
        return self._table.value(index, self._options.caption_column)

    def row(self, index: int) -> Row:
        row = self._table.row(index)
        image, condition = self._read(index, row)
        return Row(image, condition, row.get(self._options.caption_column), self._meta(row))

    def stamp(self, index: int) -> str | None:
        row_stamp = self._table.stamp(index, self._pictures)
        if row_stamp is not None:
            return "\n".join([row_stamp, *self._pictures])
        try:
            stamps = [self._cells.stamp(self._table.value(index, column)) for column in self._pictures]
        except UserError:
            return None  # reading it says what is wrong
        return None if None in stamps else "\n".join(map(str, stamps))

    def _read(self, index: int, row: Mapping[str, Any]) -> tuple[StoredPicture, StoredPicture | None]:
        image, *others = (self._cells.read(row.get(name), self._cell(index, name)) for name in self._pictures)
        return image, others[0] if others else None

    def _meta(self, row: Mapping[str, Any]) -> dict[str, Any]:
        used = (*self._pictures, self._options.conditioning_image_column, self._options.caption_column)
        return {k: v for k, v in row.items() if k not in used and isinstance(v, str | int | float | bool)}

    def _cell(self, index: int, column: str) -> str:
        return f"{self._table.where(index)}, column {column}"


def _check_columns(table: Table, columns: Mapping[str, str]) -> None:
    if not len(table):
        raise UserError(f"{table.place}: there are no rows.")
    names = table.names(set(columns.values()))
    for name, column in columns.items():
        if column not in names:
            text = f"{column}: {table.place} has no such column; there are: {', '.join(names)}."
            raise UserError(text, option=f"data.{name}")
