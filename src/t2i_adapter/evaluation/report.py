"""Writes the result of an evaluation: evaluation.json, report.html, sheet.png and a table for the terminal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from t2i_adapter.evaluation.adapters import adapter_column
from t2i_adapter.evaluation.compare import Comparison, column_difference, control_differences
from t2i_adapter.evaluation.compare_page import describe_intervals, make_comparison, show_difference, verdict
from t2i_adapter.evaluation.evaluate import ADAPTER, NO_ADAPTER, OTHER_CONDITION, TARGET, Evaluation
from t2i_adapter.evaluation.headline import METRICS, headline, headline_metric, typical_pairs
from t2i_adapter.evaluation.page import COLUMNS, CONDITION, PICTURE_NAMES, PICTURES, make_report
from t2i_adapter.evaluation.store import FOLDER, condition_name
from t2i_adapter.files import write_atomic
from t2i_adapter.reports.sheet import SheetRow, make_sheet

SHEET_ROWS = 5
_NUMBERS, _PAGE, _SHEET = "evaluation.json", "report.html", "sheet.png"


def write_files(
    out: Path, evaluation: Evaluation, settings: Mapping[str, Any], *, changed: Mapping[str, Any], command: str
) -> list[Path]:
    """Writes the three files into an existing folder and returns their paths. Arguments: as in `make_report`."""
    differences = {
        metric: {control: difference.to_json() for control, difference in row.items()}
        for metric, row in control_differences(evaluation).items()
    }
    content = {**evaluation.to_json(), "differences": differences, "settings": dict(settings)}
    page = make_report(evaluation, settings, changed, command)
    save_targets(out / FOLDER, evaluation)
    return _write(out, content, page, picture_sheet(evaluation))


def save_targets(pictures: Path, evaluation: Evaluation) -> None:
    """Writes the targets of the typical pairs beside the generated pictures, for the model card. Raises OSError.

    pictures: the folder of the evaluation's pictures; nothing is written if it is missing.
    """
    if not pictures.is_dir():
        return
    folder = pictures / TARGET
    shutil.rmtree(folder, ignore_errors=True)  # an evaluation of other pairs may have written it
    folder.mkdir()
    for index, _ in typical_pairs(evaluation, SHEET_ROWS):
        evaluation.pairs[index].target.save(folder / f"{condition_name(index)}.png")


def write_comparison(
    out: Path,
    evaluation: Evaluation,
    comparison: Comparison,
    settings: Mapping[str, Any],
    *,
    changed: Mapping[str, Any],
    command: str,
    adapters: Mapping[str, str],
) -> list[Path]:
    """Writes the three files of several adapters into an existing folder and returns their paths.

    Args:
        evaluation: with the columns "adapter-NAME" and "other_condition-NAME".
        adapters: short name -> the adapter as the user named it.
    """
    reports = {name: f"{adapter_column(ADAPTER, name)}/{_PAGE}" for name in adapters}
    content = {
        **evaluation.to_json(),
        "adapters": {
            name: {
                "adapter": adapter,
                "columns": {kind: adapter_column(kind, name) for kind in (ADAPTER, OTHER_CONDITION)},
            }
            for name, adapter in adapters.items()
        },
        "comparison": comparison.to_json(),
        "settings": dict(settings),
    }
    page = make_comparison(evaluation, comparison, settings, changed, command, reports)
    return _write(out, content, page, comparison_sheet(evaluation, comparison))


def _write(out: Path, content: Mapping[str, Any], page: str, sheet: Image.Image) -> list[Path]:
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    paths = [out / name for name in (_NUMBERS, _PAGE, _SHEET)]
    write_atomic(paths[0], [f"{text}\n".encode()])
    write_atomic(paths[1], [page.encode()])
    sheet.save(paths[2])
    return paths


def picture_sheet(evaluation: Evaluation, count: int = SHEET_ROWS) -> Image.Image:
    """Returns the answer in one line, and below it the pictures of `count` typical pairs, best first."""
    answer = headline(evaluation)
    columns = [column for column in PICTURES if column in {CONDITION, TARGET, *evaluation.pictures}]
    title = answer.line[0].upper() + answer.line[1:]
    return _sheet(evaluation, {column: PICTURE_NAMES[column] for column in columns}, (ADAPTER,), title, count)


def comparison_sheet(evaluation: Evaluation, comparison: Comparison, count: int = SHEET_ROWS) -> Image.Image:
    """Returns the result in one line, and below it the pictures of `count` typical pairs with each adapter."""
    adapters = {adapter_column(ADAPTER, name): name for name in comparison.names}
    names = {CONDITION: PICTURE_NAMES[CONDITION], NO_ADAPTER: PICTURE_NAMES[NO_ADAPTER], **adapters}
    return _sheet(evaluation, {**names, TARGET: PICTURE_NAMES[TARGET]}, list(adapters), comparison.title, count)


def _sheet(
    evaluation: Evaluation, names: Mapping[str, str], subjects: Sequence[str], title: str, count: int
) -> Image.Image:
    """names: column -> heading. subjects: columns whose values stand above the pictures."""
    key, rows = headline_metric(evaluation), []
    for index, place in typical_pairs(evaluation, count, subjects):
        pair = evaluation.pairs[index]
        own = {CONDITION: pair.condition, TARGET: pair.target}
        pictures = [own[column] if column in own else evaluation.pictures[column][index] for column in names]
        values = [evaluation.values[key][column][index] for column in subjects]
        shown = ", ".join("no value" if value is None else METRICS[key].show(value) for value in values)
        rows.append(SheetRow(pictures, f'{place}: {shown}, "{pair.prompt}"'))
    return make_sheet(list(names.values()), rows, blocks=1, title=title)


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
    lines.append(f"{answer.title} {answer.sentence}")
    return "\n".join([*lines, *_needed(evaluation, answer.metric)])


def _needed(evaluation: Evaluation, metric: str) -> list[str]:
    """Returns a line with the number of pairs that a small difference needs; none without the control."""
    if OTHER_CONDITION not in evaluation.values[metric]:
        return []
    found = column_difference(evaluation, metric, ADAPTER, OTHER_CONDITION)
    if found is None:
        return []
    return [
        f"Pair by pair, the adapter differs from {COLUMNS[OTHER_CONDITION]} by "
        f"{show_difference(found, METRICS[metric])}. To find a difference of {found.least:g}, {found.needed} pairs are "
        f"needed; here are {found.pairs}."
    ]


def comparison_text(evaluation: Evaluation, comparison: Comparison) -> str:
    """Returns tables for the terminal: all metrics, then the ranking, and below it the result."""
    columns = {adapter_column(ADAPTER, name): name for name in comparison.names}
    columns |= {
        adapter_column(OTHER_CONDITION, name): f"{name}, {COLUMNS[OTHER_CONDITION]}" for name in comparison.names
    }
    columns |= {NO_ADAPTER: COLUMNS[NO_ADAPTER], TARGET: COLUMNS[TARGET]}
    width = max(map(len, columns.values()))
    lines = []
    for metric, row in evaluation.estimates.items():
        lines.append(f"{metric} ({METRICS[metric].direction})")
        lines += [
            f"  {label:{width}}  {row[column].mean:7.3f}  [{row[column].low:.3f}, {row[column].high:.3f}]"
            for column, label in columns.items()
            if column in row
        ]
    metric = METRICS[comparison.metric]
    lines.append(f"Ranking by {comparison.metric} ({metric.direction}), differences to the first pair by pair")
    wide = max(map(len, comparison.names))
    for place in comparison.places:
        line = f"  {place.rank}  {place.name:{wide}}  {metric.show_estimate(place.estimate)}"
        if (found := place.to_first) is not None:
            line += (
                f"  {show_difference(found, metric)}, {verdict(place)}; a difference of {found.least:g} needs "
                f"{found.needed} pairs"
            )
        lines.append(line)
    return "\n".join([*lines, f"{comparison.title} {describe_intervals(comparison)}"])
