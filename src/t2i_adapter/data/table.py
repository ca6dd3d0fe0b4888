"""Tables whose cells hold pictures: as paths, addresses or bytes. Each table format (JSON lines, CSV, parquet,
`datasets`) derives from `Table`."""

from __future__ import annotations

import os
import re
import unicodedata
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.addresses import Blob, base_name, file_stamp, is_url, local_path
from t2i_adapter.data.names import is_picture
from t2i_adapter.data.picture import StoredPicture, read_file
from t2i_adapter.data.rows import Row, Rows, read_caption
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
        used = ["image_column"] if self.annotate else ["image_column", "conditioning_image_column"]
        self._pictures = [getattr(options, name) for name in used]
        self._beside = options.captions if options.captions.startswith(".") else None
        if options.captions == "auto":
            used.append("caption_column")
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
        return self._cell(index, self._options.image_column if self._beside else self._options.caption_column)

    def captions(self, index: int) -> Any:
        if self._beside:
            name = self.value(index, self._options.image_column)
            return self._reader.caption(name, self._beside, self.caption_cell(index))
        return self.value(index, self._options.caption_column)

    def file_name(self, index: int) -> str | None:
        value = self.value(index, self._options.image_column)
        value = value.get("path") if isinstance(value, dict) else value
        return base_name(value) if isinstance(value, str) else None

    def row(self, index: int) -> Row:
        values = self.values(index)
        image, *others = (self._reader.read(values.get(name), self._cell(index, name)) for name in self._pictures)
        condition = others[0] if others else None
        captions = self.captions(index) if self._beside else values.get(self._options.caption_column)
        return Row(image, condition, captions, self._meta(values))

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
        missing = {name: column for name, column in used.items() if column not in names}
        if missing:
            raise self._no_column(missing, [name for name in names if name not in used.values()], names)

    def _no_column(self, missing: Mapping[str, str], free: list[str], names: Sequence[str]) -> UserError:
        """The error about missing columns, by option: those that exist, and the flags that choose the likely ones."""
        first, *others = missing
        also = "".join(f", nor {missing[name]} ({flag(f'data.{name}')})" for name in others)
        likely = likely_columns(list(missing), free, self._first_values())
        advice = [f"{flag(f'data.{name}')} {column}" for name, column in likely.items()]
        words = f" Perhaps: {' '.join(advice)}." if advice else ""
        if "conditioning_image_column" in missing and "conditioning_image_column" not in likely:
            words += f" {flag('data.condition')} canny makes the conditions from the images."
        if "caption_column" in missing and "caption_column" not in likely:
            words += f" {flag('data.captions')} none trains without captions."
        shown = ", ".join(names) or "none"
        text = f"{missing[first]}: {self.place} has no such column{also}; there are: {shown}.{words}"
        kinds = {"conditioning_image_column": "no condition", "caption_column": "caption"}
        return UserError(text, option=f"data.{first}", kind="" if advice else kinds.get(first, ""))

    def _first_values(self) -> Mapping[str, Any]:
        try:
            return self.values(0)
        except UserError:
            return {}


_LIKELY = {
    "image_column": ("target", "image", "img", "picture", "photo", "file_name", "file", "path", "jpg", "png", "url"),
    "conditioning_image_column": (
        *("condition", "cond", "control", "hint", "guide", "source", "edge", "canny", "depth", "sketch", "lineart"),
        *("pose", "mask", "segmentation", "annotation"),
    ),
    "caption_column": ("caption", "text", "prompt", "description", "txt", "label", "tags", "title"),
}
"""Option of a column -> words in the names that such columns often have, the most telling first."""


def likely_columns(wanted: Sequence[str], free: Sequence[str], values: Mapping[str, Any]) -> dict[str, str]:
    """Option -> the column of `free` that it may mean, by name and by the first row's values; without those unclear."""
    found: dict[str, str] = {}
    order = ("conditioning_image_column", "image_column", "caption_column")  # a condition's name may hold "image" too
    for option in (name for name in order if name in wanted):
        fits = _is_text if option == "caption_column" else _is_picture
        left = [name for name in free if name not in found.values() and fits(values.get(name))]
        named = [name for word in _LIKELY[option] for name in left if word in name.lower()]
        if not named and len(left) == 1 and option != "conditioning_image_column":
            named = left
        if named:
            found[option] = named[0]
    return {name: found[name] for name in wanted if name in found}


def _is_picture(value: Any) -> bool:
    if isinstance(value, str):
        return is_picture(base_name(value)) or is_url(value)
    return isinstance(value, bytes | dict)


def _is_text(value: Any) -> bool:
    return isinstance(value, str | list) and not (isinstance(value, str) and is_picture(value))


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
    def beside(cls, blobs: Sequence[Blob], store: Store, named: str | None) -> PictureReader:
        """Reader for the table files `blobs`: relative paths start at the first one's folder and stay in the folders of
        the files.

        `named`: what the user named. If that is the tables themselves, and not the folder in which they were found,
        cells may name other files: by absolute paths, or by addresses, which are downloaded.
        """
        if blobs[0].is_remote:
            return cls(base=blobs[0].name.partition("?")[0].rpartition("/")[0], store=store)
        roots = tuple(dict.fromkeys(Path(blob.name).parent for blob in blobs))
        return cls(roots=roots, store=None if named and local_path(named).is_dir() else store)

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
        try:
            return StoredPicture(blob.name, read_file(path, cell))
        except UserError as fault:
            if fault.kind == "missing" and "\\" in value:
                text = f"{cell}: {path}: no such file. It has backslashes; between folders stands /."
                raise UserError(text, kind="missing") from fault
            raise

    def caption(self, value: Any, ending: str, cell: str) -> str:
        """The text of the file beside the picture that a cell names, which has its name and `ending`. Raises
        UserError."""
        value = value.get("path") if isinstance(value, dict) else value
        if not isinstance(value, str) or self.base or (is_url(value) and not value.startswith("file://")):
            text = f"{cell}: names no local file, so there is no {ending} beside it."
            raise UserError(text, option="data.captions", kind="caption")
        path = Path(self._blob(value, cell).name).with_suffix(ending)
        return read_caption(path)

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
        """The file that a cell names. It lies in one of `roots`; or it is an address or an absolute path, which only a
        manifest that the user has named may hold (`store`), and not a remote one.

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
        is_named = self.store is not None and text.startswith("/")
        if not is_named and not any(path.is_relative_to(normal(root)) for root in self.roots):
            advice = _ADVICE_MANIFEST if self.store else _ADVICE_ABSOLUTE
            raise _leaves(text, str(self.roots[0]), cell, advice)
        return Blob(_existing(self.roots[0], text), 0, None)

    def _address(self, url: str, cell: str) -> Blob:
        if self.store is None:
            text = (
                f"{cell}: {url!r} is an address; only files are read. Download it and write its path. Rows of a table "
                f"that you name yourself may hold addresses: {flag('data.location')} FOLDER/metadata.jsonl"
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


def _existing(root: Path, text: str) -> str:
    """The file that `text` names from `root`; if it is missing, the one of the same letters in another Unicode form."""
    path = str(normal(root / text))
    if text.isascii() or os.path.lexists(path):
        return path
    forms = (str(normal(root / unicodedata.normalize(form, text))) for form in ("NFC", "NFD"))
    return next(filter(os.path.lexists, forms), path)


def _inside(text: str, base: str, cell: str) -> str:
    """`text` normalised. Raises UserError if it leaves the folder `base`."""
    path = os.path.normpath(text)
    if path.startswith(("/", "..")) or _SCHEME.match(path):
        raise _leaves(text, base, cell)
    return path


def _leaves(text: str, folder: str, cell: str, advice: str = "Paths must stay in it.") -> UserError:
    return UserError(f"{cell}: {text!r} leaves the data folder {folder}. {advice}", kind="missing")


_ADVICE_ABSOLUTE = (
    "Paths must stay in it. Rows of a table that you name yourself may hold absolute paths: "
    f"{flag('data.location')} FOLDER/metadata.jsonl"
)
_ADVICE_MANIFEST = "Relative paths must stay in it; write the absolute path of a file elsewhere."
