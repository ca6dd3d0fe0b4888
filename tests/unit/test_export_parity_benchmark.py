"""The page about other programs shows what benchmarks/export_parity.py measured."""

from __future__ import annotations

import json

import common
import export_parity


def test_the_page_shows_the_table_of_the_newest_result() -> None:
    file = common.newest("export_parity")
    assert file is not None
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    page = (common.ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    assert export_parity.table(rows) in page


def test_equal_features_are_shown_as_zero_and_tiny_differences_are_not() -> None:
    row = {"kind": "full_adapter", "height": 64, "width": 32}
    rows = [
        {**row, "program": program, "difference": shares}
        for program, shares in (("ComfyUI", [0.0, 0.001, 0.5, 0.0]), ("A1111", [0.0] * 4))
    ]
    assert "| full_adapter | 64 x 32 | 0, 0.00, 0.50, 0 | 0, 0, 0, 0 |" in export_parity.table(rows)
