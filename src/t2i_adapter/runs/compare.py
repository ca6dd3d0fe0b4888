"""Compares runs by what their folders hold: options that differ, losses, control gain, scores, speed.

If two runs logged the benefit of each pair, and the pairs are the same ones, the difference of a pair is looked at:
most of what varies from pair to pair is in both and cancels. Otherwise only the intervals of the two means are
compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from t2i_adapter.runs.metrics import Look, Score
from t2i_adapter.runs.read import Run
from t2i_adapter.statistics import Interval, mean_interval

Answer = Literal["better", "worse", "open"]


@dataclass(frozen=True)
class Difference:
    """How a run differs from the first one at one step of each.

    Attributes:
        what: "benefit" or the score's metric.
        steps: of the first run and of this one.
        first, other: the value of each.
        paired: interval of the mean difference, other - first, over the same pairs; None if it cannot be had.
        pairs: number of the pairs of `paired`.
        answer: whether the other run is better; "open" if the interval holds 0, or the two intervals meet.
    """

    what: str
    steps: tuple[int, int]
    first: Interval
    other: Interval
    paired: Interval | None
    pairs: int
    answer: Answer


def names_of(runs: Sequence[Run]) -> list[str]:
    """A name for each run: its folder's, with a number if several have the same."""
    names = [run.name for run in runs]
    return [
        f"{name} ({names[: place + 1].count(name)})" if names.count(name) > 1 else name
        for place, name in enumerate(names)
    ]


def differing_options(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Option -> its value in each run, for those that are not the same in all. A run without the option has None."""
    every = dict.fromkeys(name for run in runs for name in run.options if name not in ("output_dir", "hub.model_id"))
    values = {name: [run.options.get(name) for run in runs] for name in every}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def differences(first: Run, other: Run) -> list[Difference]:
    """Benefit and score at the largest step that both were measured at, then at the last step of each."""
    found: list[Difference] = []
    for one, two in _meetings(first.metrics.looks, other.metrics.looks):
        if one.benefit and two.benefit and one.on == two.on:
            found.append(_of_looks(one, two, one.benefit, two.benefit))
    for one, two in _meetings(first.metrics.scores, other.metrics.scores):
        if one.metric == two.metric:
            found.append(_of_scores(one, two))
    return found


def _meetings(first: Sequence[Any], other: Sequence[Any]) -> list[tuple[Any, Any]]:
    """The two measurements at the largest common step, and the last of each if that is another pair of them."""
    if not first or not other:
        return []
    by_step = {one.step: one for one in first}
    common = [(by_step[two.step], two) for two in other if two.step in by_step][-1:]
    last = (first[-1], other[-1])
    return common if common == [last] else [*common, last]


def _of_looks(one: Look, two: Look, first: Interval, other: Interval) -> Difference:
    is_paired = one.keys_digest and one.keys_digest == two.keys_digest
    pairs = len(one.pairs_benefit)
    paired = None
    if is_paired and pairs == len(two.pairs_benefit) and pairs > 1:
        paired = mean_interval([b - a for a, b in zip(one.pairs_benefit, two.pairs_benefit, strict=True)])
    answer = _answer(paired, first, other, higher_is_better=True)
    return Difference("benefit", (one.step, two.step), first, other, paired, pairs if paired else 0, answer)


def _of_scores(one: Score, two: Score) -> Difference:
    first, other = one.columns["adapter"], two.columns["adapter"]
    answer = _answer(None, first, other, higher_is_better=one.higher_is_better)
    return Difference(one.metric, (one.step, two.step), first, other, None, 0, answer)


def _answer(paired: Interval | None, first: Interval, other: Interval, *, higher_is_better: bool) -> Answer:
    if paired:
        is_above, is_below = paired.low > 0, paired.high < 0
    else:
        is_above, is_below = other.low > first.high, other.high < first.low
    if not is_above and not is_below:
        return "open"
    return "better" if is_above == higher_is_better else "worse"
