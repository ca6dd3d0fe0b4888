"""Writes the result of an evaluation: evaluation.json, report.html, sheet.png and a table for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from t2i_adapter.evaluation.evaluate import ADAPTER, TARGET, Evaluation
from t2i_adapter.evaluation.headline import METRICS, headline, typical_pairs
from t2i_adapter.evaluation.page import COLUMNS, CONDITION, PICTURE_NAMES, PICTURES, make_report
from t2i_adapter.reports.sheet import SheetRow, make_sheet

SHEET_ROWS = 5


def write_files(
    out: Path, evaluation: Evaluation, settings: Mapping[str, Any], *, changed: Mapping[str, Any], command: str
) -> list[Path]:
    """Writes the three files into an existing folder and returns their paths. Arguments: as in `make_report`."""
    content = {**evaluation.to_json(), "settings": dict(settings)}
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    numbers, page, sheet = (out / name for name in ("evaluation.json", "report.html", "sheet.png"))
    numbers.write_text(text + "\n", encoding="utf-8")
    page.write_text(make_report(evaluation, settings, changed, command), encoding="utf-8")
    picture_sheet(evaluation).save(sheet)
    return [numbers, page, sheet]


def picture_sheet(evaluation: Evaluation, count: int = SHEET_ROWS) -> Image.Image:
    """Returns the answer in one line, and below it the pictures of `count` typical pairs, best first."""
    answer = headline(evaluation)
    columns = [column for column in PICTURES if column in {CONDITION, TARGET, *evaluation.pictures}]
    rows = []
    for index, place in typical_pairs(evaluation, count):
        pair = evaluation.pairs[index]
        pictures = {column: row[index] for column, row in evaluation.pictures.items()}
        pictures |= {CONDITION: pair.condition, TARGET: pair.target}
        value = evaluation.values[answer.metric][ADAPTER][index]
        shown = "no value" if value is None else METRICS[answer.metric].show(value)
        rows.append(SheetRow([pictures[column] for column in columns], f'{place}: {shown}, "{pair.prompt}"'))
    return make_sheet(
        [PICTURE_NAMES[column] for column in columns], rows, blocks=1, title=answer.line[0].upper() + answer.line[1:]
    )


def to_text(evaluation: Evaluation) -> str:
    """Returns a table for the terminal, mean and interval of each metric and column, and below it the answer."""
    width = max(map(len, COLUMNS.values()))
    lines = []
    for metric, columns in evaluation.estimates.items():
        lines.append(f"{metric} ({METRICS[metric].direction})")
        for column, label in COLUMNS.items():
            if column in columns:
                e = columns[column]
                lines.append(f"  {label:{width}}  {e.mean:7.3f}  [{e.low:.3f}, {e.high:.3f}]")
    answer = headline(evaluation)
    return "\n".join([*lines, f"{answer.title} {answer.sentence}"])
