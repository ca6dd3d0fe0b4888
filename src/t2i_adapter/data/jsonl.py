"""A table of JSON: one object a line, or one array of objects."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.table import PictureReader
from t2i_adapter.data.text_table import BOM, Spans, TextTable, as_utf8, check_text_file, column_name
from t2i_adapter.errors import UserError
from t2i_adapter.files import parse_json, write_atomic

_CHUNK = 16 * 2**20  # bytes read at once while lines are searched
_BLANK_BYTES = 8  # a row with a picture is longer, so only shorter lines are tested for being blank
_SPACE = re.compile(r"[ \t\r\n]*")


class JsonLinesTable(TextTable):
    """One file of JSON lines, or of one JSON array of objects, which its first letter shows."""

    def __init__(
        self, path: Path, reader: PictureReader, options: DataOptions, *, prefix: str = "", place: str = ""
    ) -> None:
        """`place` is the file's name in messages; default is `path`. Raises UserError."""
        place = place or str(path)
        check_text_file(path, place)
        if _first_letter(path) == b"[":
            self.unit, spans = "object", find_objects(path, place)
        else:
            spans = find_lines(path)
        super().__init__(path, spans, reader, options, place=place, prefix=prefix)

    def write_captions(self, index: int, captions: tuple[str, ...]) -> None:
        if self.unit != "line" or self._beside:
            super().write_captions(index, captions)
        start, end = int(self._spans.starts[index]), int(self._spans.ends[index])
        row = parse_json(self._read(index))
        column = self._options.caption_column
        is_list = isinstance(row.get(column), list)
        if len(captions) != 1 and not is_list:
            text = f"{self.where(index)}: has one caption; {len(captions)} cannot be stored."
            raise UserError(text, kind="read_only")
        row[column] = list(captions) if is_list else captions[0]
        content = self._path.read_bytes()
        text = json.dumps(row, ensure_ascii=False)
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            text = json.dumps(row)  # half a letter in another field, which only an escape can hold
        line = text.encode() + b"\r" * content[start:end].endswith(b"\r")
        try:
            write_atomic(self._path, [content[:start], line, content[end:]])
        except OSError as fault:
            raise UserError(f"{self._path}: cannot be written ({fault.strerror}).", kind="read_only") from fault

    def parse(self, data: bytes, where: str) -> Mapping[str, Any]:
        text = as_utf8(data, where)
        try:
            row = parse_json(text)
        except ValueError as fault:
            hint = " Write each row as one object on one line, or one array of objects." if text.strip() == "{" else ""
            raise UserError(f"{where}: not JSON: {fault}.{hint}", kind="row") from fault
        if not isinstance(row, dict):
            each = "each line" if self.unit == "line" else "each"
            text = f'{where}: holds {type(row).__name__}; {each} is one object: {{"file_name": ..., ...}}.'
            raise UserError(text, kind="row")
        return {column_name(name): value for name, value in row.items()}


def find_lines(path: Path) -> Spans:
    """The lines of a file that are not blank."""
    breaks, size = [], 0
    with path.open("rb") as file:
        start = len(BOM) if file.read(len(BOM)) == BOM else 0
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
    return Spans(np.flatnonzero(used) + 1, starts[used], ends[used])


def find_objects(path: Path, place: str) -> Spans:
    """The values of a JSON array. Raises UserError that names the value after which the text is no array."""
    data = path.read_bytes()
    first = len(BOM) if data.startswith(BOM) else 0
    text = as_utf8(data[first:], place)
    del data  # it may be large
    decoder = json.JSONDecoder()
    starts, ends = [], []
    at = _skip_space(text, text.index("[") + 1)
    try:
        while text[at : at + 1] != "]":
            if starts:
                if text[at : at + 1] != ",":
                    raise ValueError("a comma or ] is needed after it")
                at = _skip_space(text, at + 1)
            _, end = decoder.raw_decode(text, at)
            starts.append(at)
            ends.append(end)
            at = _skip_space(text, end)
        if text[at + 1 :].strip():
            raise ValueError("text follows the array")
    except (ValueError, RecursionError) as fault:
        reason = "nested too deeply" if isinstance(fault, RecursionError) else fault
        raise UserError(f"{place}: not a JSON array, at or after its object {len(starts)}: {reason}.") from fault
    places = np.array([starts, ends], np.int64).T.ravel()  # ascending: start and end of each value
    if not text.isascii():
        places = _byte_places(text, places)
    return Spans(np.arange(1, len(starts) + 1), places[::2] + first, places[1::2] + first)


def _byte_places(text: str, places: np.ndarray) -> np.ndarray:
    """(N,) ascending places in `text`, as places in its UTF-8 bytes."""
    edges = [0, *places.tolist()]
    return np.cumsum([len(text[start:end].encode()) for start, end in itertools.pairwise(edges)], dtype=np.int64)


def _skip_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None  # it matches no space too
    return found.end()


def _first_letter(path: Path) -> bytes:
    """The first byte that is no white space; empty if there is none."""
    with path.open("rb") as file:
        start = len(BOM) if file.read(len(BOM)) == BOM else 0
        file.seek(start)
        while chunk := file.read(_CHUNK):
            if left := chunk.lstrip():
                return left[:1]
    return b""
