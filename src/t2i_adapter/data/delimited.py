"""A table of delimited text with a header row: CSV with commas or semicolons, or tabs (TSV)."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.table import PictureReader
from t2i_adapter.data.text_table import BOM, Spans, TextTable, as_utf8, check_text_file, column_name
from t2i_adapter.errors import UserError

_NAMES = {",": "comma", ";": "semicolon", "\t": "tab"}
"""Delimiter -> its name in messages. The first wins a tie."""
_CHUNK = 16 * 2**20  # bytes read at once while rows are searched
_HEAD = 64 * 2**10  # bytes that hold the header row
_MAX_ROW = 64 * 2**20  # bytes; a double quote that does not end would make the rest of the file one row
_QUOTE = ord('"')
_QUOTED = re.compile(r'"[^"]*"')
_CLOSE = re.compile(rb'[^"]*(?:""[^"]*)*"(?!")')


class Dialect(NamedTuple):
    """How a file is written: the delimiter, the byte that ends a line, and whether spaces after a delimiter are dropped
    (`a, b`)."""

    delimiter: str
    line_end: bytes
    skips_space: bool

    @classmethod
    def of(cls, path: Path) -> Dialect:
        """The dialect that the header row of a file shows."""
        with path.open("rb") as file:
            head = file.read(_HEAD).removeprefix(BOM).lstrip()
        line_end = b"\r" if b"\r" in head and b"\n" not in head else b"\n"
        header = _QUOTED.sub("", head.partition(line_end)[0].decode(errors="replace"))
        counts = Counter(header)
        delimiter = max(_NAMES, key=lambda one: counts[one])
        return cls(delimiter, line_end, f"{delimiter} " in header)


class CsvTable(TextTable):
    """One file with a header row, which shows the dialect. All cells are text.

    An empty cell of a caption is the empty caption; another empty cell is missing. A row whose number of fields
    differs from the header's is an error of this row.
    """

    def __init__(
        self, path: Path, place: str, reader: PictureReader, options: DataOptions, *, prefix: str = ""
    ) -> None:
        """`place` is the file's name in messages. Raises UserError."""
        check_text_file(path, place)
        self._dialect = Dialect.of(path)
        spans = find_records(path, place, self._dialect)
        if not len(spans.starts):
            raise UserError(f"{place}: there are no rows, and no header row that names the columns.")
        with path.open("rb") as file:
            file.seek(int(spans.starts[0]))
            header = file.read(int(spans.ends[0] - spans.starts[0]))
        self._names = [column_name(name.strip()) for name in self._fields(header, f"{place}, header")]
        for name in ("image_column", "conditioning_image_column", "caption_column"):
            column = getattr(options, name)
            if self._names.count(column) > 1:
                text = f"{column}: {place} has this column {self._names.count(column)} times. Rename the others."
                raise UserError(text, option=f"data.{name}")
        super().__init__(path, Spans(*(part[1:] for part in spans)), reader, options, place=place, prefix=prefix)

    def columns(self, wanted: set[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(filter(None, self._names)))

    def parse(self, data: bytes, where: str) -> Mapping[str, Any]:
        fields = self._fields(data, where)
        if any(fields[len(self._names) :]) or any(self._names[len(fields) :]):
            raise UserError(
                f"{where}: has {len(fields)} fields, and the header has {len(self._names)}. A text that holds a "
                f"{_NAMES[self._dialect.delimiter]} or a line break stands between double quotes.",
                kind="row",
            )
        caption = self._options.caption_column
        row: dict[str, Any] = {}
        for name, field in zip(self._names, fields, strict=False):
            if name:
                row.setdefault(name, field if field or name == caption else None)
        return row

    def _fields(self, data: bytes, where: str) -> list[str]:
        """The fields of a row. Raises UserError."""
        delimiter, _, skips_space = self._dialect
        lines = [as_utf8(data, where)]
        try:
            return next(csv.reader(lines, delimiter=delimiter, skipinitialspace=skips_space, strict=True), [])
        except csv.Error as fault:
            words = f"{where}: cannot be read as CSV: {fault}. A double quote inside of double quotes is written twice."
            raise UserError(words, kind="row") from fault


def find_records(path: Path, place: str, dialect: Dialect) -> Spans:
    """The rows of a file, its header first: lines, joined where a line break lies between double quotes.

    Skips empty rows. Raises UserError if a double quote opens a text that does not end.
    """
    found = [Spans(*np.zeros((3, 0), np.int64))]
    with path.open("rb") as file:
        first_byte, first_line = (len(BOM) if file.read(len(BOM)) == BOM else 0), 1
        file.seek(first_byte)
        block = b""
        while True:
            chunk = file.read(_CHUNK)
            block += chunk
            if not chunk and block and not block.endswith(dialect.line_end):
                block += dialect.line_end
            records, num_bytes, num_lines = _split(block[: block.rfind(dialect.line_end) + 1], dialect)
            found.append(Spans(records.numbers + first_line, records.starts + first_byte, records.ends + first_byte))
            block, first_byte, first_line = block[num_bytes:], first_byte + num_bytes, first_line + num_lines
            if len(block) > _MAX_ROW or (block and not chunk):
                text = f"{place}, line {first_line}: a double quote opens a text that does not end. Add the second one."
                raise UserError(text, kind="row")
            if not chunk:
                return Spans(*map(np.concatenate, zip(*found, strict=True)))


def _split(block: bytes, dialect: Dialect) -> tuple[Spans, int, int]:
    """The whole rows of `block`, which ends with a line's end: line numbers from 0, and places in it; then the number
    of bytes and of lines that they take. The last row may go on after the block."""
    letters = np.frombuffer(block, np.uint8)
    line_ends = np.flatnonzero(letters == dialect.line_end[0])
    line_starts = np.concatenate([[0], line_ends + 1])
    goes_on = np.zeros(len(line_ends) + 1, bool)
    """(N+1,) whether a line belongs to the row of the line before."""
    whole, at = len(line_ends), 0
    for first in _doubtful_lines(letters, line_ends, dialect):
        if first < at:
            continue
        at, is_open = int(first), False
        while at < len(line_ends):
            is_open = _is_open(block[line_starts[at] : line_ends[at]], is_open, dialect)
            at += 1
            goes_on[at] = is_open
            if not is_open:
                break
        if is_open:
            whole = int(first)
            break
    goes_on[whole:] = False
    lines = np.flatnonzero(~goes_on[:whole])
    starts = line_starts[lines]
    ends = line_ends[np.concatenate([lines[1:], [whole]])[: len(lines)] - 1]
    has_text = np.ones(256, np.uint8)
    has_text[list(f'"\t \r\n{dialect.delimiter}'.encode())] = 0
    if len(lines):
        used = np.bitwise_or.reduceat(has_text[letters[: line_starts[whole]]], starts).astype(bool)
        lines, starts, ends = lines[used], starts[used], ends[used]
    return Spans(lines, starts, ends), int(line_starts[whole]), whole


def _doubtful_lines(letters: np.ndarray, line_ends: np.ndarray, dialect: Dialect) -> np.ndarray:
    """Numbers of the lines that may end inside of double quotes if they begin outside.

    Other lines have an even number of double quotes, of which each first one stands at the start of a field and each
    second one at its end, or two stand together.
    """
    quotes = np.flatnonzero(letters == _QUOTE)
    if not len(quotes):
        return quotes
    delimiter, line_end = ord(dialect.delimiter), dialect.line_end[0]
    line = np.searchsorted(line_ends, quotes)
    counts = np.bincount(line, minlength=len(line_ends))
    is_first = (np.arange(len(quotes)) - (np.cumsum(counts) - counts)[line]) % 2 == 0
    before = np.where(quotes > 0, letters[quotes - 1], line_end)
    starts_field = np.isin(before, [delimiter, line_end, _QUOTE])
    ends_field = np.isin(letters[quotes + 1], [delimiter, line_end, ord("\r"), _QUOTE])
    is_odd = np.bincount(line[~np.where(is_first, starts_field, ends_field)], minlength=len(line_ends)) > 0
    return np.flatnonzero(is_odd | (counts % 2 == 1))


def _is_open(line: bytes, is_open: bool, dialect: Dialect) -> bool:
    """Whether a line ends inside of double quotes. `is_open`: whether it begins inside."""
    at, delimiter = 0, dialect.delimiter.encode()
    while True:
        if not is_open:
            if dialect.skips_space:
                at += len(line) - at - len(line[at:].lstrip(b" "))
            is_open, at = line[at : at + 1] == b'"', at + (line[at : at + 1] == b'"')
        if is_open:
            close = _CLOSE.match(line, at)
            if close is None:
                return True
            is_open, at = False, close.end()
        at = line.find(delimiter, at) + 1
        if not at:
            return False
