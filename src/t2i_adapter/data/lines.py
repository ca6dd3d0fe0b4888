"""A table of JSON lines: only where each line lies in the file is held; a row is parsed when it is asked for."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from t2i_adapter.errors import UserError, redact
from t2i_adapter.files import parse_json

FILE_NAME = "file_name"
_CHUNK, _BLOCK = 16 * 2**20, 2 * 2**20
_LARGE = 2 * 2**20
"""Bytes of a file from which on pyarrow finds repeated pictures sooner than it is loaded, with its 25 MB."""
_BLANK_BYTES = 8  # no row that short names a picture, so shorter lines are looked at one by one
_BOM = b"\xef\xbb\xbf"


class LineTable:
    """One file of JSON objects, a line each. `file_name` is column `image`, `X_file_name` column X, as in `datasets`.

    A row's key is its picture's path with `prefix` in front, and the line where a picture is used twice or not known.
    """

    def __init__(self, path: Path, image_column: str, *, prefix: str = "", place: str = "") -> None:
        self.place = place or str(path)
        self._path, self._prefix, self._image_column = path, prefix, image_column
        try:
            self._lines, self._starts, self._ends = find_lines(path)
        except OSError as fault:
            raise UserError(f"{self.place}: cannot be read: {fault.strerror}.") from fault
        self.shards = (len(self._lines),)

    def __len__(self) -> int:
        return len(self._lines)

    def names(self, wanted: set[str]) -> tuple[str, ...]:
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

    def row(self, index: int) -> Mapping[str, Any]:
        return _parse(self._read(index), self.where(index))

    def value(self, index: int, column: str) -> Any:
        return self.row(index).get(column)

    def key(self, index: int) -> str:
        line = f"line {self._lines[index]}"
        try:
            image = self.value(index, self._image_column)
        except UserError:
            image = None
        if image is None:
            return self._prefix + line
        name = self._prefix + redact(str(image))  # keys are written down with the run
        return f"{name} ({line})" if str(image) in self._repeated else name

    def where(self, index: int) -> str:
        return f"{self.place}, line {self._lines[index]}"

    def stamp(self, index: int, columns: Sequence[str]) -> str | None:
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_file"}

    @cached_property
    def _file(self) -> IO[bytes]:
        return self._path.open("rb")

    @cached_property
    def _repeated(self) -> frozenset[str]:
        """Pictures that more than one row names."""
        found = self._repeated_in_columns()
        if found is not None:
            return found
        times = Counter(str(row.get(self._image_column)) for row in self._tolerant() if not isinstance(row, UserError))
        return frozenset(image for image, count in times.items() if count > 1)

    def _repeated_in_columns(self) -> frozenset[str] | None:
        """`_repeated` column by column, without an object a row; None where the file is small, or of several forms."""
        if self._path.stat().st_size < _LARGE:
            return None
        import pyarrow as pa
        from pyarrow import json as arrow_json

        column = self._image_column
        stored = FILE_NAME if column == "image" else f"{column}_{FILE_NAME}"
        options = arrow_json.ParseOptions(
            explicit_schema=pa.schema([(stored, pa.string()), (column, pa.string())]),
            unexpected_field_behavior="ignore",
        )
        reading = arrow_json.ReadOptions(use_threads=False, block_size=_BLOCK)
        try:
            table = arrow_json.read_json(self._path, read_options=reading, parse_options=options)
        except pa.ArrowInvalid:
            return None
        images = next((table[name] for name in (stored, column) if not table[name].null_count), None)
        if images is None or len(images.unique()) == len(images):
            return None if images is None else frozenset()
        counts = images.value_counts()
        often = pa.array(counts.field("counts").to_numpy() > 1)
        return frozenset(counts.field("values").filter(often).to_pylist())

    def _tolerant(self) -> Iterator[Mapping[str, Any] | UserError]:
        for index in range(len(self)):
            try:
                yield self.row(index)
            except UserError as fault:
                yield fault

    def _read(self, index: int) -> bytes:
        start = int(self._starts[index])
        return os.pread(self._file.fileno(), int(self._ends[index]) - start, start)


def find_lines(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers (from 1), first bytes and ends of all lines of a file that are not blank; int64 each."""
    breaks, size = [], 0
    with path.open("rb") as file:
        start = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
        file.seek(0)
        while chunk := file.read(_CHUNK):
            breaks.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + size)
            size += len(chunk)
        ends = np.concatenate([*breaks, [size]]).astype(np.int64)
        starts = np.concatenate([[start], ends[:-1] + 1]).astype(np.int64)
        kept = ends > starts
        for index in np.flatnonzero(kept & (ends - starts < _BLANK_BYTES)):
            file.seek(int(starts[index]))
            kept[index] = bool(file.read(int(ends[index] - starts[index])).strip())
    return np.flatnonzero(kept) + 1, starts[kept], ends[kept]


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
