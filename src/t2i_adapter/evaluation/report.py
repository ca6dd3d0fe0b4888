"""The evaluation as one HTML file that needs nothing else: numbers, settings and pictures, all text escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from t2i_adapter.evaluation.controls import ADAPTER, NO_ADAPTER, OTHER_CONDITION, TARGET
from t2i_adapter.evaluation.evaluate import Evaluation
from t2i_adapter.evaluation.metrics import TOLERANCE
from t2i_adapter.reports.page import inline, make_page, table

COLUMNS = {
    ADAPTER: "adapter",
    OTHER_CONDITION: "another pair's condition",
    NO_ADAPTER: "no adapter",
    TARGET: "target (ceiling)",
}
METRICS = {
    "iou": "IoU of the object's mask, 0 to 1, higher is better",
    "edge_f1": f"F1 of its outline within {TOLERANCE:.2%} of the side, 0 to 1, higher is better",
    "condition_f1": f"F1 of its own condition against the one asked for, within {TOLERANCE:.2%}, higher is better",
    "condition_error": "RMS difference of its own condition from the one asked for, 0 to 1, lower is better",
    "object_color": "CIEDE2000 of the objects against the prompt, lower is better",
    "background_color": "CIEDE2000 of the background against the prompt, lower is better",
}
PICTURES = ("condition", NO_ADAPTER, ADAPTER, OTHER_CONDITION, TARGET)


def make_report(evaluation: Evaluation, settings: Mapping[str, Any]) -> str:
    """The page."""
    drawn = [column for column in PICTURES if column in evaluation.pictures]
    return make_page(
        f"Does the adapter control? {len(evaluation.pairs)} held-out pairs",
        f"""<p>Each pair is drawn with its condition, with another pair's condition and without the adapter, from the
same noise, and every picture is measured against the pair's own truth. The target is the pair's true picture through
the same measure: the best that a drawn picture can reach. Means with 95 % bootstrap intervals over the pairs.</p>
{_numbers(evaluation)}
<h2>Settings</h2>
{_settings(settings)}
<h2>Pictures</h2>
{_pictures(evaluation, drawn)}""",
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


def _pictures(evaluation: Evaluation, drawn: Sequence[str]) -> str:
    rows = []
    for i, pair in enumerate(evaluation.pairs):
        pictures = [pair.condition, *(evaluation.pictures[column][i] for column in drawn), pair.target]
        iou = evaluation.values["iou"].get(ADAPTER)
        score = f"<br><small>IoU {iou[i]:.2f}</small>" if iou else ""
        rows.append([escape(pair.prompt) + score, *(inline(picture) for picture in pictures)])
    return table(["prompt", "condition", *(escape(COLUMNS[column]) for column in drawn), "target"], rows)
