"""Names of files, local or remote: paths, file:// and other URLs, brace patterns, and `Blob`, a file that was found."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from t2i_adapter.errors import UserError
from t2i_adapter.files import user_path

_MAX_BRACES = 1_000_000


@dataclass(frozen=True)
class Blob:
    """A file, local or remote.

    Attributes:
        name: its absolute path, or its URL.
        size: in bytes; 0 if the server does not send it.
        stamp: a text that changes when the file does; None if unknown.
    """

    name: str
    size: int
    stamp: str | None

    @property
    def is_remote(self) -> bool:
        return is_url(self.name)


def is_url(text: str) -> bool:
    return "://" in text


def base_name(text: str) -> str:
    """The last part of a path or URL, without an http URL's query and fragment."""
    path = re.split("[?#]", text, maxsplit=1)[0] if text.startswith(("http://", "https://")) else text
    return path.rpartition("/")[2]


def local_path(text: str) -> Path:
    """The absolute path of a path or file:// URL. Raises UserError for `~NAME` of an unknown user."""
    if text.startswith("file://"):
        inner = re.split("[?#]", text, maxsplit=1)[0].removeprefix("file://")
        text = unquote("/" + inner.partition("/")[2])
    return user_path(text).absolute()


def local_blob(path: Path) -> Blob:
    """Raises UserError if there is no such file."""
    try:
        state = path.stat()
    except (OSError, ValueError):  # ValueError: a name that no file can have
        raise UserError(f"{path}: no such file.", option="data.location", kind="missing") from None
    return Blob(str(path), state.st_size, file_stamp(str(path), state))


def file_stamp(path: str, state: os.stat_result) -> str:
    """Path, size and modification time: equal texts mean that the file has not changed."""
    return f"{path}\0{state.st_size}\0{state.st_mtime_ns}"


def expand(pattern: str) -> list[str]:
    """All names that a pattern's braces stand for: {000..009}, {a,b}. Leading zeros stay. Raises UserError if there
    are more than 1,000,000."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    spans = [_span(part) if inside % 2 else [part] for inside, part in enumerate(parts)]
    count = math.prod(map(len, spans))
    if not 1 <= count <= _MAX_BRACES:
        raise UserError(f"{pattern}: stands for {count:,} files; allowed are 1 to {_MAX_BRACES:,}.")
    choices = [
        _numbers(part, span) if isinstance(span, range) else span for part, span in zip(parts, spans, strict=True)
    ]
    return ["".join(names) for names in itertools.product(*choices)]


def _span(inside: str) -> Sequence[Any]:
    """The text between braces as a range of numbers, or as names that commas separate."""
    span = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", inside)
    return range(int(span[1]), int(span[2]) + 1) if span else inside.split(",")


def _numbers(inside: str, span: range) -> list[str]:
    first = inside.partition("..")[0]
    return [str(number).zfill(len(first) if first.startswith("0") else 0) for number in span]
