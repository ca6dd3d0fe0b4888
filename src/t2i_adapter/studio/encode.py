"""JSON for browsers: what their own parser reads, whatever a file of a run or a body holds."""

from __future__ import annotations

import json
import math
from typing import Any

from starlette.responses import JSONResponse


def to_json(value: Any) -> str:
    """The value as ASCII JSON. NaN and inf, which a browser does not read, become null; half a letter of a file's name
    that is not UTF-8 stays as an escape."""
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError:
        return json.dumps(_finite(value), separators=(",", ":"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Json(JSONResponse):
    """An answer of JSON, by `to_json`."""

    def render(self, content: Any) -> bytes:
        return to_json(content).encode("ascii")
