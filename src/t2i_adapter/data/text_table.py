"""Tables in text files: JSON lines, a JSON array, CSV.

Only the position of each row is held; a row is parsed when it is read.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.addresses import base_name
from t2i_adapter.data.table import PictureReader, Table
from t2i_adapter.errors import UserError, redact
from t2i_adapter.files import show_word

FILE_NAME = "file_name"
BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_HEAD = 4  # bytes in which a zero byte shows UTF-16 without a mark: a table begins with ASCII


class Spans(NamedTuple):
    """(N,) int64 each: a row's number from 1 (of its line, or of its object), its first byte, and its end."""

    numbers: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


class TextTable(Table):
    """Rows at positions of one text file. `file_name` is column `image`, and `X_file_name` column X, as in `datasets`.

    A row's key is `prefix`, its picture's path, and its line: "train/a.png (line 3)". A row whose picture is unknown
    has the line alone: "train/line 3". A format implements `parse`.
    """

    unit = "line"
    """What a row's number counts, for messages."""

    def __init__(
        self, path: Path, spans: Spans, reader: PictureReader, options: DataOptions, *, place: str, prefix: str = ""
    ) -> None:
        """`place` is the file's name in messages. Raises UserError."""
        self._path, self._spans, self._prefix = path, spans, prefix
        super().__init__(place, (len(spans.starts),), reader, options)

    @abstractmethod
    def parse(self, data: bytes, where: str) -> Mapping[str, Any]:
        """The cells of a row, by column. `where` names the row in messages. Raises UserError."""

    def local_files(self, index: int) -> list[str]:
        return [str(self._path.absolute()), *super().local_files(index)]

    def caption_files(self, index: int) -> list[str]:
        return self.local_files(index) if self._beside else [str(self._path.absolute())]

    def columns(self, wanted: set[str]) -> tuple[str, ...]:
        found: dict[str, None] = {}
        first_fault = None
        for row in self._tolerant():
            if isinstance(row, UserError):
                first_fault = first_fault or row
                continue
            found.update(dict.fromkeys(row))
            if wanted <= found.keys():
                break
        if first_fault and not found:
            raise first_fault
        return tuple(found)

    def values(self, index: int) -> Mapping[str, Any]:
        return self.parse(self._read(index), self.where(index))

    def value(self, index: int, column: str) -> Any:
        return self.values(index).get(column)

    def key(self, index: int) -> str:
        line = f"{self.unit} {self._spans.numbers[index]}"
        try:
            image = self.value(index, self._options.image_column)
        except UserError:
            image = None
        return self._prefix + (line if image is None else f"{redact(str(image))} ({line})")  # keys are written to files

    def where(self, index: int) -> str:
        return f"{self.place}, {self.unit} {self._spans.numbers[index]}"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_file"}

    @cached_property
    def _file(self) -> IO[bytes]:
        return self._path.open("rb")

    def _tolerant(self) -> Iterator[Mapping[str, Any] | UserError]:
        for index in range(len(self)):
            try:
                yield self.values(index)
            except UserError as fault:
                yield fault

    def _read(self, index: int) -> bytes:
        start = int(self._spans.starts[index])
        return os.pread(self._file.fileno(), int(self._spans.ends[index]) - start, start)


def check_text_file(path: Path, place: str) -> None:
    """Raises UserError if a file cannot be read, or is UTF-16. `place` is its name in messages."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as fault:
        raise UserError(f"{place}: cannot be read: {fault.strerror}.") from fault
    if head.startswith(_UTF16) or b"\0" in head:
        name = base_name(place)
        raise UserError(
            f"{place}: is UTF-16 text, or not text; UTF-8 is needed. Convert it: "
            f"iconv -f UTF-16 -t UTF-8 {show_word(name)} > {show_word(f'new_{name}')}",
            kind="row",
        )


def as_utf8(data: bytes, where: str) -> str:
    """Raises UserError that names the byte if the row's bytes are not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as fault:
        text = f"{where}: not UTF-8 text ({fault.reason} at byte {fault.start}). Save the file as UTF-8."
        raise UserError(text, kind="row") from fault


def column_name(name: str) -> str:
    """The column that a name in a file means: "image" for "file_name", "X" for "X_file_name"."""
    return "image" if name == FILE_NAME else name.removesuffix(f"_{FILE_NAME}")
