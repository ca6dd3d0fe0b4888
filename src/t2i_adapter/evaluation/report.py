"""Writes the result of an evaluation: evaluation.json, report.html, sheet.png and a table for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from t2i_adapter.evaluation.evaluate import ADAPTER, NO_ADAPTER, OTHER_CONDITION, TARGET, Evaluation
from t2i_adapter.evaluation.metrics import TOLERANCE
from t2i_adapter.reports.html import inline_image, make_page, table
from t2i_adapter.reports.sheet import SheetRow, make_sheet

COLUMNS = {
    ADAPTER: "adapter",
    OTHER_CONDITION: "another pair's condition",
    NO_ADAPTER: "no adapter",
    TARGET: "target (ceiling)",
}
METRICS = {
    "iou": "IoU of the objects' mask, 0 to 1, higher is better",
    "edge_f1": f"F1 of the mask's outline within {TOLERANCE:.2%} of the side, 0 to 1, higher is better",
    "condition_f1": f"F1 of the picture's condition against the pair's, within {TOLERANCE:.2%}, higher is better",
    "condition_error": "RMS difference of the picture's condition from the pair's, 0 to 1, lower is better",
    "object_color": "CIEDE2000 of the objects against the prompt, lower is better",
    "background_color": "CIEDE2000 of the background against the prompt, lower is better",
}
PICTURE_COLUMNS = (NO_ADAPTER, ADAPTER, OTHER_CONDITION)
"""Order of the generated pictures on the page."""
SHEET_ROWS = 16


def write_files(out: Path, evaluation: Evaluation, settings: Mapping[str, Any]) -> list[Path]:
    """Writes the three files into an existing folder and returns their paths. settings: plain JSON types."""
    content = {**evaluation.to_json(), "settings": dict(settings)}
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    numbers, page, sheet = (out / name for name in ("evaluation.json", "report.html", "sheet.png"))
    numbers.write_text(text + "\n", encoding="utf-8")
    page.write_text(make_report(evaluation, settings), encoding="utf-8")
    picture_sheet(evaluation).save(sheet)
    return [numbers, page, sheet]


def picture_sheet(evaluation: Evaluation, count: int = SHEET_ROWS) -> Image.Image:
    """Returns condition, no adapter, adapter and target of the first `count` pairs."""
    columns = [column for column in (NO_ADAPTER, ADAPTER) if column in evaluation.pictures]
    rows = [
        SheetRow([pair.condition, *(evaluation.pictures[column][i] for column in columns), pair.target], pair.prompt)
        for i, pair in enumerate(evaluation.pairs[:count])
    ]
    return make_sheet(["condition", *(COLUMNS[column] for column in columns), "target"], rows)


def to_text(evaluation: Evaluation) -> str:
    """Returns a table for the terminal: mean and interval of each metric and column."""
    width = max(map(len, COLUMNS.values()))
    lines = []
    for metric, columns in evaluation.estimates.items():
        lines.append(metric)
        for column, label in COLUMNS.items():
            if column in columns:
                e = columns[column]
                lines.append(f"  {label:{width}}  {e.mean:7.3f}  [{e.low:.3f}, {e.high:.3f}]")
    return "\n".join(lines)


def make_report(evaluation: Evaluation, settings: Mapping[str, Any]) -> str:
    """Returns the HTML page; all text is escaped."""
    columns = [column for column in PICTURE_COLUMNS if column in evaluation.pictures]
    return make_page(
        f"Does the adapter control? {len(evaluation.pairs)} held-out pairs",
        f"""<p>Each pair is generated with its own condition, with another pair's condition and without the adapter,
from the same noise, and every picture is measured against the pair's own truth. The target is the pair's true picture;
its value is the best that a generated picture can reach. Means with 95 % bootstrap intervals over the pairs.</p>
{_numbers(evaluation)}
<h2>Settings</h2>
{_settings(settings)}
<h2>Pictures</h2>
{_pictures(evaluation, columns)}""",
    )


def _numbers(evaluation: Evaluation) -> str:
    columns = [column for column in COLUMNS if column in next(iter(evaluation.estimates.values()))]
    rows = [
        [escape(METRICS.get(metric, metric))]
        + [f"{(e := estimates[column]).mean:.3f} <small>[{e.low:.3f}, {e.high:.3f}]</small>" for column in columns]
        for metric, estimates in evaluation.estimates.items()
    ]
    return table(["", *(escape(COLUMNS[column]) for column in columns)], rows)


def _settings(settings: Mapping[str, Any]) -> str:
    rows = [[escape(str(key)), f"<code>{escape(str(value))}</code>"] for key, value in settings.items()]
    return table(["setting", "value"], rows)


def _pictures(evaluation: Evaluation, columns: Sequence[str]) -> str:
    rows = []
    for i, pair in enumerate(evaluation.pairs):
        pictures = [pair.condition, *(evaluation.pictures[column][i] for column in columns), pair.target]
        iou = evaluation.values["iou"].get(ADAPTER)
        score = f"<br><small>IoU {iou[i]:.2f}</small>" if iou else ""
        rows.append([escape(pair.prompt) + score, *(inline_image(picture) for picture in pictures)])
    return table(["prompt", "condition", *(escape(COLUMNS[column]) for column in columns), "target"], rows)
