"""The sections of a model card that say what was measured, and what the adapter is not good at, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from t2i_adapter.export.card_pictures import PICTURES, SHEET
from t2i_adapter.export.card_text import MULTIPLES, Facts, markdown
from t2i_adapter.export.measured import (
    ADAPTER,
    COLUMNS,
    FLOORS,
    NO_ADAPTER,
    QUALITY,
    TARGET,
    Measured,
    Pair,
    headline,
    pair_values,
)


def evaluation(measured: Measured) -> str:
    """Returns the table of an evaluation with its verdict, typical pairs and picture sheet."""
    from t2i_adapter.evaluation.headline import METRICS

    content = measured.content
    present = [column for column in COLUMNS if any(column in row for row in content["metrics"].values())]
    extra = list(dict.fromkeys(c for row in content["metrics"].values() for c in row if c not in COLUMNS))
    columns: list[str] = [*present, *extra]
    rows = []
    for key, values in content["metrics"].items():
        name = f"{METRICS[key].name} ({METRICS[key].direction})" if key in METRICS else key
        cells = [show_interval(values[column]) if column in values else "" for column in columns]
        rows.append(f"| {markdown(name)} | {' | '.join(cells)} |")
    heading = " | ".join(markdown(COLUMNS.get(column, column)) for column in columns)
    table = f"| | {heading} |\n|---{'|---' * len(columns)}|\n" + "\n".join(rows)
    note = (
        f"{content['num']} held-out pairs; means with 95 % bootstrap intervals. The floors are what the same noise and "
        "prompt give with the condition of another pair, and without the adapter."
    )
    parts = ["## Evaluation", *filter(None, [_answer(measured)]), note, table]
    if measured.pairs:
        parts += ["Pairs at even ranks, not chosen by eye:", _pairs(measured.pairs)]
    parts.append(f"![condition, no adapter, adapter, another pair's condition, target]({PICTURES}/{SHEET})")
    return "\n\n".join(parts)


def pair_file(number: int, column: str) -> str:
    """Name of a picture of a typical pair."""
    return f"pair_{number:02d}_{column}.png"


def _pairs(pairs: Sequence[Pair]) -> str:
    """A table with the pictures of typical pairs."""
    columns = [c for c in ("condition", NO_ADAPTER, ADAPTER, TARGET) if any(c in pair.pictures for pair in pairs)]
    lines = [f"| | {' | '.join(column.replace('_', ' ') for column in columns)} |", f"|---{'|---' * len(columns)}|"]
    for number, pair in enumerate(pairs):
        cells = [
            f"![{column}]({PICTURES}/{pair_file(number, column)})" if column in pair.pictures else ""
            for column in columns
        ]
        lines.append(f"| {markdown(pair.place)}<br>{markdown(pair.prompt)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def show_interval(value: Mapping[str, Any]) -> str:
    low, high = value["ci95"]
    return f"{value['mean']:.3f} ({low:.3f} to {high:.3f})"


def _answer(measured: Measured) -> str:
    """The metric that answers, with the floors, and whether the adapter controls."""
    from t2i_adapter.evaluation.headline import METRICS

    key = headline(measured.content)
    if key is None:
        return ""
    values = measured.content["metrics"][key]
    floors = [column for column in FLOORS if column in values]
    against = " and ".join(f"{show_interval(values[column])} with {FLOORS[column]}" for column in floors)
    text = f"The {METRICS[key].name} is {show_interval(values[ADAPTER])} with the adapter"
    text = markdown(f"{text}, against {against}" if against else text)
    if not floors:
        return f"{text}."
    shown = all(_is_better(key, values[ADAPTER], values[column]) for column in floors)
    verdict = (
        "the adapter controls the picture" if shown else "that does not show that the adapter controls the picture"
    )
    return f"**{text}: {verdict}.**"


def _is_better(key: str, own: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether one interval lies on the better side of another."""
    from t2i_adapter.evaluation.headline import METRICS

    if METRICS[key].higher_is_better:
        return own["ci95"][0] > other["ci95"][1]
    return own["ci95"][1] < other["ci95"][0]


def limits(facts: Facts, measured: Measured | None) -> str:
    """Says what the adapter is for, and what was found or not measured."""
    metadata = facts.metadata
    name = metadata.condition.get("name")
    maps = f"{markdown(str(name))} maps" if name else "conditions like those of its dataset"
    intended = (
        f"The adapter makes pictures of {facts.family} follow {maps}. Maps of other kinds, of the opposite polarity or "
        "made with other options than those above are not what it was trained on. What the pictures show, their style "
        f"and their biases are those of the base {markdown(metadata.base['name'])}; the adapter filters nothing."
    )
    side, factor = metadata.resolution, facts.config.get("downscale_factor", 16)
    sizes = "The size of its training is not recorded."
    if side:
        sizes = f"It was trained on crops of {side} x {side} pixels; other sizes were not measured."
    sizes += f" Sides must be multiples of {factor}, better of {MULTIPLES[facts.is_xl]}, pixels."
    if metadata.steps:
        batch = metadata.training.get("global_batch")
        sizes += f" The training made {metadata.steps:,} updates"
        sizes += f" of {batch} pairs each." if isinstance(batch, int) else "."
    found = _weak_points(measured) if measured else ["How well it controls was not measured."]
    return f"## Intended use and limits\n\n{intended}\n\n{' '.join([sizes, *found])}"


def _weak_points(measured: Measured) -> list[str]:
    """Sentences on what the evaluation did not show, or showed to be worse."""
    from t2i_adapter.evaluation.headline import METRICS

    metrics, sentences = measured.content["metrics"], []
    key = headline(measured.content)
    values = sorted(pair_values(measured.content, key)) if key else []
    if key and len(values) >= 10:
        worst = values[: len(values) // 10] if METRICS[key].higher_is_better else values[-(len(values) // 10) :]
        edge = METRICS[key].show(max(worst) if METRICS[key].higher_is_better else min(worst))
        side = "at most" if METRICS[key].higher_is_better else "at least"
        name = markdown(METRICS[key].name)
        sentences.append(f"In the worst tenth of the measured pairs the {name} is {side} {edge}.")
    known = {key: row for key, row in metrics.items() if key in METRICS and ADAPTER in row}
    unshown, worse = [], []
    for metric, row in known.items():
        floors = [row[column] for column in FLOORS if column in row]
        if NO_ADAPTER in row and _is_better(metric, row[NO_ADAPTER], row[ADAPTER]):
            worse.append(METRICS[metric].name)
        elif metric not in QUALITY and floors and not all(_is_better(metric, row[ADAPTER], each) for each in floors):
            unshown.append(METRICS[metric].name)
    if worse:
        sentences.append(f"Measured to be worse than without the adapter: {_listed(worse)}.")
    if unshown:
        sentences.append(f"Not shown to be better than the floors: {_listed(unshown)}.")
    missing = measured.content["settings"].get("not_measured")
    if isinstance(missing, list) and missing:
        sentences.append(f"{_listed([str(line) for line in missing])}")
    return sentences


def _listed(names: Sequence[str]) -> str:
    return "; ".join(markdown(name) for name in names)
