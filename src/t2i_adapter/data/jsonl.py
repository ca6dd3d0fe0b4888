"""A table of JSON lines, one object a line. Only the position of each line is held; a row is parsed when it is read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.table import PictureReader, Table
from t2i_adapter.errors import UserError, redact
from t2i_adapter.files import parse_json

FILE_NAME = "file_name"
_CHUNK = 16 * 2**20  # bytes read at once while lines are searched
_BLANK_BYTES = 8  # a row with a picture is longer, so only shorter lines are tested for being blank
_BOM = b"\xef\xbb\xbf"


class JsonLinesTable(Table):
    """One .jsonl file. `file_name` is column `image`, and `X_file_name` column X, as in `datasets`.

    A row's key is `prefix`, its picture's path, and its line: "train/a.png (line 3)". A row whose picture is unknown
    has the line alone: "train/line 3".
    """

    def __init__(
        self, path: Path, reader: PictureReader, options: DataOptions, *, prefix: str = "", place: str = ""
    ) -> None:
        """`place` is the file's name in messages; default is `path`. Raises UserError."""
        self._path, self._prefix, place = path, prefix, place or str(path)
        try:
            self._lines, self._starts, self._ends = find_lines(path)
        except OSError as fault:
            raise UserError(f"{place}: cannot be read: {fault.strerror}.") from fault
        super().__init__(place, (len(self._lines),), reader, options)

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
        return _parse(self._read(index), self.where(index))

    def value(self, index: int, column: str) -> Any:
        return self.values(index).get(column)

    def key(self, index: int) -> str:
        line = f"line {self._lines[index]}"
        try:
            image = self.value(index, self._options.image_column)
        except UserError:
            image = None
        return self._prefix + (line if image is None else f"{redact(str(image))} ({line})")  # keys are written to files

    def where(self, index: int) -> str:
        return f"{self.place}, line {self._lines[index]}"

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
        start = int(self._starts[index])
        return os.pread(self._file.fileno(), int(self._ends[index]) - start, start)


def find_lines(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N,) int64 each: number (from 1), first byte and end of every line of a file that is not blank."""
    breaks, size = [], 0
    with path.open("rb") as file:
        start = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
        file.seek(0)
        while chunk := file.read(_CHUNK):
            breaks.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + size)
            size += len(chunk)
        ends = np.concatenate([*breaks, [size]]).astype(np.int64)
        starts = np.concatenate([[start], ends[:-1] + 1]).astype(np.int64)
        used = ends > starts
        for index in np.flatnonzero(used & (ends - starts < _BLANK_BYTES)):
            file.seek(int(starts[index]))
            used[index] = bool(file.read(int(ends[index] - starts[index])).strip())
    return np.flatnonzero(used) + 1, starts[used], ends[used]


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = parse_json(line.decode())
    except UnicodeDecodeError as fault:
        raise UserError(f"{where}: not UTF-8 text ({fault.reason} at byte {fault.start}).", kind="row") from fault
    except ValueError as fault:
        raise UserError(f"{where}: not JSON: {fault}.", kind="row") from fault
    if not isinstance(row, dict):
        text = f'{where}: holds {type(row).__name__}; each line is one object: {{"file_name": ..., ...}}.'
        raise UserError(text, kind="row")
    return {_column(name): value for name, value in row.items()}


def _column(name: str) -> str:
    return "image" if name == FILE_NAME else name.removesuffix(f"_{FILE_NAME}")
