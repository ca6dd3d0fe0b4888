"""Tables whose cells hold pictures: as paths, addresses or bytes. Each table format (JSON lines, CSV, parquet,
`datasets`) derives from `Table`."""

from __future__ import annotations

import os
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.addresses import Blob, file_stamp, is_url, local_path
from t2i_adapter.data.picture import StoredPicture, read_file
from t2i_adapter.data.rows import Row, Rows
from t2i_adapter.data.store import Store
from t2i_adapter.errors import UserError, flag, has_login

_SCHEME = re.compile("[A-Za-z][A-Za-z0-9+.-]*:")


class Table(Rows):
    """Rows of named columns. The options name the columns of image, condition and caption.

    A table format implements `columns`, `values` and `value`, and its `__init__` calls this one last.
    """

    def __init__(self, place: str, shards: tuple[int, ...], reader: PictureReader, options: DataOptions) -> None:
        """Raises UserError if the table has no rows or misses a column."""
        self.place, self.shards, self.annotate = place, shards, options.condition
        self._reader, self._options = reader, options
        used = ["image_column", "caption_column"]
        if not self.annotate:
            used.insert(1, "conditioning_image_column")
        self._pictures = [getattr(options, name) for name in used[:-1]]
        self._check_columns({name: getattr(options, name) for name in used})

    @abstractmethod
    def columns(self, wanted: set[str]) -> tuple[str, ...]:
        """The table's column names: at least those of `wanted` that exist."""

    @abstractmethod
    def values(self, index: int) -> Mapping[str, Any]:
        """The values of all cells of a row, by column. Raises UserError."""

    @abstractmethod
    def value(self, index: int, column: str) -> Any:
        """The value of one cell; None if it is missing. Raises UserError."""

    def table_stamp(self, index: int, columns: Sequence[str]) -> str | None:
        """The row's stamp if the table itself holds the pictures of `columns`; None otherwise."""
        return None

    def key(self, index: int) -> str:
        return f"row {index}"

    def where(self, index: int) -> str:
        return f"{self.place}, row {index}"

    def caption_cell(self, index: int) -> str:
        return self._cell(index, self._options.caption_column)

    def captions(self, index: int) -> Any:
        return self.value(index, self._options.caption_column)

    def row(self, index: int) -> Row:
        values = self.values(index)
        image, *others = (self._reader.read(values.get(name), self._cell(index, name)) for name in self._pictures)
        condition = others[0] if others else None
        return Row(image, condition, values.get(self._options.caption_column), self._meta(values))

    def stamp(self, index: int) -> str | None:
        table_stamp = self.table_stamp(index, self._pictures)
        if table_stamp is not None:
            return "\n".join([table_stamp, *self._pictures])
        try:
            stamps = [self._reader.stamp(self.value(index, column)) for column in self._pictures]
        except UserError:
            return None  # reading the row raises the same error
        return None if None in stamps else "\n".join(map(str, stamps))

    def _meta(self, values: Mapping[str, Any]) -> dict[str, Any]:
        used = (*self._pictures, self._options.conditioning_image_column, self._options.caption_column)
        return {k: v for k, v in values.items() if k not in used and isinstance(v, str | int | float | bool)}

    def _cell(self, index: int, column: str) -> str:
        return f"{self.where(index)}, column {column}"

    def _check_columns(self, used: Mapping[str, str]) -> None:
        if not len(self):
            raise UserError(f"{self.place}: there are no rows.")
        names = self.columns(set(used.values()))
        for name, column in used.items():
            if column not in names:
                text = f"{column}: {self.place} has no such column; there are: {', '.join(names)}."
                raise UserError(text, option=f"data.{name}")


@dataclass(frozen=True)
class PictureReader:
    """Reads a picture's stored bytes from the value of a cell.

    Attributes:
        roots: folders that paths may lie in; a relative path starts at the first.
        base: URL of the folder that relative paths start at instead, if the table itself is remote.
        store: downloads addresses; None if cells may not hold any.
    """

    roots: tuple[Path, ...] = ()
    base: str | None = None
    store: Store | None = None

    @classmethod
    def beside(cls, blobs: Sequence[Blob], store: Store) -> PictureReader:
        """Reader for the table files `blobs`: paths start at the first one's folder and stay in the folders of the
        files; addresses are downloaded."""
        if blobs[0].is_remote:
            return cls(base=blobs[0].name.partition("?")[0].rpartition("/")[0], store=store)
        return cls(roots=tuple(dict.fromkeys(Path(blob.name).parent for blob in blobs)), store=store)

    def read(self, value: Any, cell: str) -> StoredPicture:
        """The stored bytes of a path, of bytes, or of `datasets`' {"bytes", "path"}.

        `cell` names row and column in messages. Raises UserError.
        """
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
            text = f"{cell}: holds {type(value).__name__}; allowed are pictures, paths or bytes."
            raise UserError(text, kind="unreadable")
        blob = self._blob(value, cell)
        try:
            path = self.store.local(blob) if blob.is_remote and self.store else Path(blob.name)
        except UserError as fault:
            raise fault.within(cell) from fault
        return StoredPicture(blob.name, read_file(path, cell))

    def stamp(self, value: Any) -> str | None:
        """Path, size and modification time of the local file that a cell names; None if there is no such file."""
        if isinstance(value, dict) and value.get("bytes") is None:
            value = value.get("path")
        if not isinstance(value, str) or not value:
            return None
        try:
            blob = self._blob(value, "")
            path = self.store.place(blob) if blob.is_remote and self.store else Path(blob.name)
            return file_stamp(blob.name, path.stat())
        except (OSError, ValueError, UserError):  # ValueError: a name that no file can have
            return None  # `read` raises the error

    def _blob(self, text: str, cell: str) -> Blob:
        """The file that a cell names. It lies in one of `roots`, or is an address if addresses are allowed.

        The path is checked, not the target of a symbolic link: the owner of the folder makes links, a row makes paths.
        """
        if "\0" in text:
            raise UserError(f"{cell}: {text!r} holds a zero byte, so it cannot be a path.", kind="unreadable")
        if is_url(text):
            return self._address(text, cell)
        if self.base:
            return Blob(f"{self.base}/{_inside(text, self.base, cell)}", 0, None)
        if not self.roots:
            message = f"{cell}: {text!r} is a path, but this dataset has no folder that it could lie in."
            raise UserError(message, kind="unreadable")
        path = normal(self.roots[0] / text)
        if not any(path.is_relative_to(normal(root)) for root in self.roots):
            raise _leaves(text, str(self.roots[0]), cell)
        return Blob(str(path), 0, None)

    def _address(self, url: str, cell: str) -> Blob:
        if self.store is None:
            text = (
                f"{cell}: {url!r} is an address; only files are read. Download it and write its path, or make the "
                f"table a manifest ({flag('data.kind')} manifest), whose rows may name addresses."
            )
            raise UserError(text, kind="missing")
        if has_login(url):
            text = f"{cell}: {url!r} holds a login, which rows may not; put it into ~/.netrc."
            raise UserError(text, kind="unreadable")
        if not url.startswith("file://"):
            return Blob(url, 0, None)
        if self.base:
            text = f"{cell}: {url!r} names a local file, but the table comes from {self.base}."
            raise UserError(text, kind="unreadable")
        return Blob(str(local_path(url)), 0, None)


def normal(path: Path) -> Path:
    """The absolute path without `.` and `..`; symbolic links stay."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - Path.resolve() would follow links


def _inside(text: str, base: str, cell: str) -> str:
    """`text` normalised. Raises UserError if it leaves the folder `base`."""
    path = os.path.normpath(text)
    if path.startswith(("/", "..")) or _SCHEME.match(path):
        raise _leaves(text, base, cell)
    return path


def _leaves(text: str, folder: str, cell: str) -> UserError:
    message = f"{cell}: {text!r} leaves the data folder {folder}. Paths must stay in it."
    return UserError(message, kind="missing")
