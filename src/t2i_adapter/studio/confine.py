"""What a browser may put into an option: nothing outside the root, no Python file, no secret."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from t2i_adapter.config.paths import CONDITIONS, PATHS
from t2i_adapter.config.tree import check_no_login
from t2i_adapter.errors import UserError
from t2i_adapter.studio.places import STATE, Places

_ADDRESS = re.compile(r"(https?|s3|hf)://", re.IGNORECASE)
_KIND = re.compile(r"(column:[^/\\]+|folder:.+|none|[a-z0-9_-]+)(,[^/\\]*)?", re.DOTALL)
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
    if path in CONDITIONS or path == "validation.judge":
        if not _KIND.fullmatch(text) or ".py" in text:
            raise UserError(
                f"{text[:60]}: only the kinds that `t2i-adapter conditions` lists can be chosen here; one of your own, "
                "a Python file, works on the command line",
                option=path,
            )
        text = text.removeprefix("folder:") if text.startswith("folder:") else ""
    elif path not in PATHS:
        return
    if _ADDRESS.match(text):
        check_no_login(path, text)
    elif text and not (path == "data.skip" and _SKIP_LIST.fullmatch(text)):
        places.confine(text, path)
