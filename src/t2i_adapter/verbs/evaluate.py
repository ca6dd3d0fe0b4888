"""The verb `evaluate`: evaluation.json, report.html and sheet.png."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from t2i_adapter.annotators.registry import Annotator, open_annotator, open_recorded
from t2i_adapter.config.tree import DataOptions, to_dict
from t2i_adapter.data.formats import located
from t2i_adapter.data.source import Source, open_source
from t2i_adapter.errors import UserError
from t2i_adapter.evaluation.controls import ADAPTER, NO_ADAPTER
from t2i_adapter.evaluation.evaluate import Evaluation, evaluate
from t2i_adapter.evaluation.metrics import TOLERANCE
from t2i_adapter.evaluation.pairs import read_pairs
from t2i_adapter.evaluation.report import COLUMNS, make_report
from t2i_adapter.files import output_folder
from t2i_adapter.generation.pipeline import Models, open_models
from t2i_adapter.models.adapter import check_resolution
from t2i_adapter.models.record import read_metadata
from t2i_adapter.reports.sheet import SheetRow, make_sheet
from t2i_adapter.verbs.evaluate_options import EvaluateOptions
from t2i_adapter.verbs.generate import LIBRARIES

_SHEET_ROWS = 16


def run(options: EvaluateOptions) -> Evaluation:
    """Measures the adapter on held-out pairs, writes the three files to `out` and prints the means."""
    source = open_pairs(options)
    models = open_models(options)
    resolution = options.resolution or models.resolution
    if resolution is None:
        raise UserError(f"--resolution is needed: {options.adapter} does not tell at which size it was trained.")
    check_resolution(resolution, resolution, models.adapter_config)
    pairs = read_pairs(source, resolution, models.channels)
    judge = find_judge(options, source)
    out = output_folder(options.out)
    evaluation = evaluate(models.pipeline(), pairs, sampling=options, seed=options.seed, judge=judge)
    write(out, evaluation, {**settings(options, models, resolution), "judge": judge.record() if judge else None})
    print(summary(evaluation))
    for name in ("evaluation.json", "report.html", "sheet.png"):
        print(out / name)
    return evaluation


def open_pairs(options: EvaluateOptions) -> Source:
    """The pairs that are measured, `num` of the split. Raises UserError where there are not as many."""
    data = DataOptions(
        split=options.split,
        image_column=options.image_column,
        conditioning_image_column=options.conditioning_image_column,
        caption_column=options.caption_column,
        max_train_samples=options.num,
        condition=_made_by(options),
    )
    source = open_source(located(options.data, data), options.seed)
    if len(source) < options.num:
        raise UserError(
            f"--num {options.num}: {options.data} has {len(source)} pairs in its split {options.split}; "
            f"use --num {len(source)} or less."
        )
    return source


def find_judge(options: EvaluateOptions, source: Source) -> Annotator | None:
    """What makes the drawn pictures' own conditions. Raises UserError."""
    spec = options.judge or source.annotate
    return None if spec in (None, "none") else open_annotator(spec)


def _made_by(options: EvaluateOptions) -> str | None:
    """What makes the pairs' conditions; None where they come with the data."""
    if options.condition:
        return None if options.condition == "none" else options.condition
    metadata = read_metadata(options.adapter)
    if metadata is None or "options" not in metadata.condition:
        return None
    return open_recorded(metadata.condition).spec


def settings(options: EvaluateOptions, models: Models, resolution: int) -> dict[str, Any]:
    """All that the numbers depend on. Plain JSON types."""
    return {
        **asdict(options),
        "base": to_dict(models.base.options),
        "resolution": resolution,
        "device": models.device,
        "precision": models.precision,
        "edge_tolerance_px": TOLERANCE * resolution,
        "adapter_sha256": models.digest,
        "versions": {name: version(name) for name in LIBRARIES},
    }


def write(out: Path, evaluation: Evaluation, settings: Mapping[str, Any]) -> None:
    """evaluation.json, report.html and sheet.png in an existing folder."""
    content = {**evaluation.to_json(), "settings": dict(settings)}
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    (out / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    (out / "report.html").write_text(make_report(evaluation, settings), encoding="utf-8")
    sheet(evaluation).save(out / "sheet.png")


def sheet(evaluation: Evaluation, count: int = _SHEET_ROWS) -> Image.Image:
    """condition | no adapter | adapter | target for the first pairs."""
    drawn = [column for column in (NO_ADAPTER, ADAPTER) if column in evaluation.pictures]
    rows = [
        SheetRow([pair.condition, *(evaluation.pictures[column][i] for column in drawn), pair.target], pair.prompt)
        for i, pair in enumerate(evaluation.pairs[:count])
    ]
    return make_sheet(["condition", *(COLUMNS[column] for column in drawn), "target"], rows)


def summary(evaluation: Evaluation) -> str:
    """One line a metric and column, for people."""
    width = max(map(len, COLUMNS.values()))
    lines = []
    for metric, columns in evaluation.estimates.items():
        lines.append(metric)
        for column, label in COLUMNS.items():
            if column in columns:
                e = columns[column]
                lines.append(f"  {label:{width}}  {e.mean:7.3f}  [{e.low:.3f}, {e.high:.3f}]")
    return "\n".join(lines)
