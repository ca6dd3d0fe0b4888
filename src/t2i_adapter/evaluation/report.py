"""The evaluation as one HTML file that needs nothing else: numbers, settings and pictures, all text escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from t2i_adapter.evaluation.controls import ADAPTER, NO_ADAPTER, OTHER_CONDITION, TARGET
from t2i_adapter.evaluation.evaluate import Evaluation
from t2i_adapter.evaluation.metrics import TOLERANCE
from t2i_adapter.evaluation.sheet import thumbnail

COLUMNS = {
    ADAPTER: "adapter",
    OTHER_CONDITION: "another pair's condition",
    NO_ADAPTER: "no adapter",
    TARGET: "target (ceiling)",
}
METRICS = {
    "iou": "IoU of the object's mask, 0 to 1, higher is better",
    "edge_f1": f"F1 of its outline within {TOLERANCE:.2%} of the side, 0 to 1, higher is better",
    "object_color": "CIEDE2000 of the objects against the prompt, lower is better",
    "background_color": "CIEDE2000 of the background against the prompt, lower is better",
}
PICTURES = ("condition", NO_ADAPTER, ADAPTER, OTHER_CONDITION, TARGET)

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #1c1c1c; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .35rem .7rem; text-align: left; }
th { border-bottom: 2px solid #999; } td { border-bottom: 1px solid #ddd; } td.number { white-space: nowrap; }
small { color: #666; } img { display: block; max-width: 100%; } code { overflow-wrap: anywhere; }
"""


def make_report(evaluation: Evaluation, settings: Mapping[str, Any]) -> str:
    """The page. It loads nothing and runs nothing: a policy in its head forbids both."""
    drawn = [column for column in PICTURES if column in evaluation.pictures]
    title = f"Does the adapter control? {len(evaluation.pairs)} held-out pairs"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p>Each pair is drawn with its condition, with another pair's condition and without the adapter, from the same noise,
and every picture is measured against the pair's own truth. The target is the pair's true picture through the same
measure: the best that a drawn picture can reach. Means with 95 % bootstrap intervals over the pairs.</p>
{_numbers(evaluation)}
<h2>Settings</h2>
{_settings(settings)}
<h2>Pictures</h2>
{_pictures(evaluation, drawn)}
</body>
</html>
"""


def _numbers(evaluation: Evaluation) -> str:
    columns = [column for column in COLUMNS if column in next(iter(evaluation.estimates.values()))]
    rows = [
        [escape(METRICS.get(metric, metric))]
        + [f"{(e := estimates[column]).mean:.3f} <small>[{e.low:.3f}, {e.high:.3f}]</small>" for column in columns]
        for metric, estimates in evaluation.estimates.items()
    ]
    return _table(["", *(escape(COLUMNS[column]) for column in columns)], rows)


def _settings(settings: Mapping[str, Any]) -> str:
    rows = [[escape(str(key)), f"<code>{escape(str(value))}</code>"] for key, value in settings.items()]
    return _table(["setting", "value"], rows)


def _pictures(evaluation: Evaluation, drawn: Sequence[str]) -> str:
    rows = []
    for i, pair in enumerate(evaluation.pairs):
        pictures = [pair.condition, *(evaluation.pictures[column][i] for column in drawn), pair.target]
        iou = evaluation.values["iou"].get(ADAPTER)
        score = f"<br><small>IoU {iou[i]:.2f}</small>" if iou else ""
        rows.append([escape(pair.prompt) + score, *(_inline(picture) for picture in pictures)])
    return _table(["prompt", "condition", *(escape(COLUMNS[column]) for column in drawn), "target"], rows)


def _table(headings: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already."""
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"


def _inline(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    thumbnail(picture).save(buffer, "PNG", optimize=True)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
