"""What a browser may put into an option: nothing outside the root, no Python file, no secret."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from t2i_adapter.config.paths import CONDITIONS, NAMES, PATHS, PathKind
from t2i_adapter.config.tree import COLUMN, FOLDER, check_no_login
from t2i_adapter.errors import UserError
from t2i_adapter.studio.places import STATE, Places

_ADDRESS = re.compile(r"(https?|s3|hf)://", re.IGNORECASE)
_KIND = re.compile(r"[a-z0-9_-]+(,[^/\\~]*)?", re.DOTALL)
_SPECIAL = re.compile(r"[:,={}*?\[]")
"""What several names, a weight or a pattern are written with; such a text is no plain path."""
_SEGMENTS = re.compile(r"[/\\:,={}]")
_ABSOLUTE_CHOICE = re.compile(r"[{,]\s*[/~]")
_SKIP_LIST = re.compile(re.escape(STATE) + r"/data/[a-z0-9-]{1,60}-skip\.txt")
"""Lists of rows to skip that the page Data writes: the only files of the studio's own folder that a run may read."""
MOST_TEXT = 10_000
"""Letters of a value at most."""


def check_values(values: Mapping[str, Any], places: Places) -> None:
    """Raises UserError if a value names a file outside the root, a Python file, or is too long."""
    for path, value in values.items():
        for text in _texts(value):
            _check(path, text, places)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _check(path: str, text: str, places: Places) -> None:
    if len(text) > MOST_TEXT:
        raise UserError(f"has {len(text):,} letters; at most {MOST_TEXT:,} are allowed", option=path)
    if "\0" in text:
        raise UserError("holds a zero byte; remove it", option=path)
    if path == "data.conditions" and text.startswith(FOLDER):
        _check_path(path, text.removeprefix(FOLDER), "folder", places)
    elif path == "data.conditions" and text.startswith(COLUMN):
        return
    elif path in CONDITIONS:
        _check_kind(path, text)
    elif path in NAMES:
        _check_name(path, text)
    elif path == "data.skip" and _SKIP_LIST.fullmatch(text):
        return
    elif path in PATHS and text:
        _check_path(path, text, PATHS[path], places)


def _check_kind(path: str, text: str) -> None:
    if text and (not _KIND.fullmatch(text) or ".py" in text or ".." in text):
        raise UserError(
            f"{text[:60]}: only the kinds that `t2i-adapter conditions` lists can be chosen here; one of your own, "
            "a Python file, works on the command line",
            option=path,
        )


def _check_name(path: str, text: str) -> None:
    if text.startswith(("/", "~")) or ".." in _SEGMENTS.split(text):
        raise UserError(f"{text[:60]}: names a folder outside; a name is needed", option=path)


def _check_path(path: str, text: str, kind: PathKind, places: Places) -> None:
    if _SPECIAL.search(text) and (".." in _SEGMENTS.split(text) or _ABSOLUTE_CHOICE.search(text)):
        raise UserError(f"{text}: a pattern, list or address may hold no `..` and no second absolute path", option=path)
    if "://" not in text:
        places.confine(text, path)
    elif kind in ("dataset", "model") and _ADDRESS.match(text):
        check_no_login(path, text)
    else:
        raise UserError(
            f"{text}: only data and models have addresses, and these begin with http, https, s3 or hf", option=path
        )
