"""JSON for browsers: what their own parser reads, whatever a file of a run or a body holds."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse

from t2i_adapter.runs.metrics import finite


def to_json(value: Any) -> str:
    """The value as ASCII JSON. NaN and inf, which a browser does not read, become null; half a letter of a file's name
    that is not UTF-8 stays as an escape."""
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError:
        return json.dumps(finite(value), separators=(",", ":"))


class Json(JSONResponse):
    """An answer of JSON, by `to_json`."""

    def render(self, content: Any) -> bytes:
        return to_json(content).encode("ascii")
