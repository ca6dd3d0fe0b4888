"""Reads a file of prompts for `generate`: one prompt a line, or a table with pictures and seeds beside them.

Importing this module loads no torch.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from t2i_adapter.errors import UserError, flag
from t2i_adapter.files import parse_json, user_path

OPTION = "prompt_file"
COLUMNS = ("prompt", "image", "photo", "seed")
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Request:
    """A prompt, and what its row sets besides; None where the options decide.

    Attributes:
        place: names the row in messages.
        image, photo: a condition picture's file, or a photo's; at most one is set.
        seed: of the first of the prompt's pictures.
    """

    prompt: str
    place: str = ""
    image: str | None = None
    photo: str | None = None
    seed: int | None = None


def read_prompts(file: str) -> list[Request]:
    """Reads the prompts of a file, one or more.

    A .jsonl file has an object a line and a .csv file a header line, with `prompt` and, if wanted, `image` or `photo`
    (relative to the file's folder) and `seed`. Any other file has one prompt a line; empty lines are skipped. Raises
    UserError that names the line.
    """
    path = user_path(file)
    text = _read_text(path, file)
    kind = path.suffix.lower()
    rows = {".jsonl": _json_rows, ".csv": _csv_rows}.get(kind, _plain_rows)(text, file)
    requests = [_request(row, place, path.parent) for place, row in rows]
    if not requests:
        raise UserError(f"{file}: holds no prompt; write one a line.", option=OPTION)
    return requests


def _read_text(path: Path, file: str) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as fault:
        raise UserError(f"{file}: cannot be read ({fault.strerror}).", option=OPTION) from fault
    except UnicodeDecodeError as fault:
        line = fault.object[: fault.start].count(b"\n") + 1
        raise UserError(
            f"{file}: line {line} is not UTF-8 (byte {fault.object[fault.start]:#04x}); save the file as UTF-8.",
            option=OPTION,
        ) from fault


def _plain_rows(text: str, file: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{file}, line {number}", {"prompt": line.strip()}


def _json_rows(text: str, file: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            row = parse_json(line)
        except ValueError as fault:
            raise UserError(f"{place}: not JSON ({fault}).", option=OPTION) from fault
        if not isinstance(row, dict):
            raise UserError(f'{place}: must be an object, such as {{"prompt": "a red circle"}}.', option=OPTION)
        yield place, row


def _csv_rows(text: str, file: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            place = f"{file}, line {reader.line_num}"
            if None in row:
                raise UserError(f"{place}: has more cells than the header; quote a cell with commas.", option=OPTION)
            yield place, {name: cell for name, cell in row.items() if cell}
    except csv.Error as fault:
        raise UserError(f"{file}, line {reader.line_num + 1}: not CSV ({fault}).", option=OPTION) from fault


def _request(row: Mapping[str, Any], place: str, folder: Path) -> Request:
    """Checks a row. Raises UserError."""
    if unknown := next((name for name in row if name not in COLUMNS), None):
        raise UserError(f"{place}: unknown column {unknown!r}; allowed are {', '.join(COLUMNS)}.", option=OPTION)
    for name in ("prompt", "image", "photo"):
        if name in row and not isinstance(row[name], str):
            raise UserError(f"{place}: {name} is {row[name]!r}; it must be text.", option=OPTION)
    if "prompt" not in row:
        raise UserError(f'{place}: has no prompt; add one ("" is allowed in .jsonl).', option=OPTION)
    if not is_unicode(row["prompt"]):
        raise UserError(
            f"{place}: prompt {row['prompt']!r} holds half of a surrogate pair; write it anew.", option=OPTION
        )
    if row.get("image") and row.get("photo"):
        raise UserError(f"{place}: sets both image and photo; keep one of them.", option=OPTION)
    files = {name: str(folder / user_path(row[name])) for name in ("image", "photo") if row.get(name)}
    return Request(row["prompt"], place, seed=_seed(row.get("seed"), place), **files)


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can write the text: not if it holds a lone surrogate, as Python reads bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _seed(value: Any, place: str) -> int | None:
    """Checks a seed, a number or the text of one. Raises UserError."""
    if value is None:
        return None
    is_number = isinstance(value, int) and not isinstance(value, bool)
    is_text = isinstance(value, str) and re.fullmatch(r"[0-9]{1,19}", value.strip()) is not None
    if not (is_number or is_text) or not 0 <= int(value) <= MAX_SEED:
        raise UserError(f"{place}: seed is {value!r}; allowed is 0 to 2^63 - 1.", option=OPTION)
    return int(value)


def match_files(requests: list[Request], image: tuple[str, ...], photo: tuple[str, ...]) -> list[Request]:
    """Gives every request a picture: its row's own, or else one of the option `image` or `photo`.

    A single request is repeated for every picture, and a single picture is used for every request. Raises UserError if
    the numbers do not match or a picture is missing.
    """
    files = image or photo
    name = "photo" if photo else "image"
    missing = [request for request in requests if not (request.image or request.photo)]
    if not missing:
        return requests
    if not files:
        raise UserError(
            f"{missing[0].place}: names no picture; add a column image or photo, or set {flag('image')} or "
            f"{flag('photo')}.",
            option=OPTION,
        )
    count = max(len(requests), len(files))
    if {len(requests), len(files)} - {1, count}:
        source = flag(OPTION if missing[0].place else "prompt")
        raise UserError(
            f"{source} has {len(requests)} entries and {flag(name)} {len(files)}: "
            "set as many of one as of the other, or a single one of either."
        )
    repeated = requests * count if len(requests) == 1 else requests
    return [
        request if request.image or request.photo else replace(request, **{name: files[index % len(files)]})
        for index, request in enumerate(repeated)
    ]
