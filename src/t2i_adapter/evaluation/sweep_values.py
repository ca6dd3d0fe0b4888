"""The file of a sweep's measurements, so that an interrupted sweep, or one with more points, measures nothing twice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from t2i_adapter.files import parse_json

FILE_NAME = "sweep-values.jsonl"
Values = Mapping[str, Sequence[float | None]]
"""Metric -> one value a pair; None if the metric is not defined for the pair."""


class ValueFile:
    """Measurements by key, which are appended as they are made.

    The first line names the settings on which all measurements depend. A file of other settings is replaced. A line
    that a killed process left incomplete is skipped.
    """

    def __init__(self, path: Path | None, settings: str) -> None:
        """path: of the file, None stores nothing. settings: a digest."""
        self.path = path
        self._values: dict[str, Values] = {}
        if path is None:
            return
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        rows = [row for row in map(_read, lines) if row is not None]
        if rows and rows[0].get("settings") == settings:
            self._values = {str(row["key"]): row["values"] for row in rows[1:] if {"key", "values"} <= set(row)}
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        else:
            path.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")

    @property
    def count(self) -> int:
        """Number of measurements."""
        return len(self._values)

    def get(self, key: str) -> Values | None:
        """Returns the measurement of a key, None if there is none."""
        return self._values.get(key)

    def put(self, key: str, values: Values) -> None:
        """Stores a measurement; it is in the file when the call returns."""
        self._values[key] = values
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "values": values}) + "\n")


def _read(line: str) -> dict | None:
    try:
        row = parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
