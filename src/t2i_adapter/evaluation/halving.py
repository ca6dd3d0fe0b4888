"""Chooses the best of many sampling points from few pictures: successive halving, then a confirmation on fresh pairs.

A point is a number; a function measures it on pairs. Every comparison is paired: the same pairs and the same noise. The
best of many noisy means is too high, so nothing is claimed from the pairs that chose a point: `Comparison` is computed
on pairs that took no part in the choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from t2i_adapter.evaluation.sweep_values import Values
from t2i_adapter.statistics import ALPHA, Interval, lower_bound, mean_interval, upper_bound

FIRST_PAIRS = 8
"""Pairs of the first rung."""
CANDIDATES = 2
"""Points, at most, that are compared with the default on fresh pairs."""
STATEMENTS_ALPHA = ALPHA / 2
"""Probability of a wrong gain that all candidates share; the schedule of strengths has the other half of `ALPHA`."""


@dataclass(frozen=True)
class Limit:
    """A metric of quality that a point may not worsen.

    Attributes:
        sign: 1 if a higher value is better, -1 if a lower one is.
        margin: how much worse than the default's the mean may be, in the metric's unit.
    """

    sign: int
    margin: float


@dataclass(frozen=True)
class Goal:
    """What is raised, and what must not get worse.

    Attributes:
        metric: the metric of control to raise.
        sign: 1 if a higher value of it is better, -1 if a lower one is.
        limits: metric of quality -> its limit.
    """

    metric: str
    sign: int = 1
    limits: Mapping[str, Limit] = field(default_factory=dict)

    def gains(self, values: Values, reference: Values) -> np.ndarray:
        """(n,) paired differences in control, positive where `values` are the better ones."""
        return self.sign * _differences(values[self.metric], reference[self.metric])

    def harms(self, values: Values, reference: Values) -> dict[str, np.ndarray]:
        """Metric of quality -> (n,) paired differences in margins, positive where `values` are the worse ones."""
        return {
            metric: -limit.sign * _differences(values[metric], reference[metric]) / limit.margin
            for metric, limit in self.limits.items()
            if metric in values and metric in reference
        }


def _differences(values: Sequence[float | None], reference: Sequence[float | None]) -> np.ndarray:
    """(n,) differences over the pairs that have both values."""
    both = [a - b for a, b in zip(values, reference, strict=True) if a is not None and b is not None]
    return np.asarray(both, float)


@dataclass(frozen=True)
class Comparison:
    """A point against a reference on the same pairs.

    Attributes:
        gain: difference in control, positive if the point is better.
        harms: metric of quality -> difference in margins, positive if the point is worse.
        pairs: number of pairs.
    """

    gain: Interval
    harms: Mapping[str, Interval]
    pairs: int

    @property
    def is_better(self) -> bool:
        """Whether the lower bound of the gain is above 0."""
        return self.gain.low > 0

    @property
    def too_harmful(self) -> list[str]:
        """The metrics of quality that are not shown to stay within their margins."""
        return [metric for metric, harm in self.harms.items() if not harm.high < 1]

    @property
    def is_confirmed(self) -> bool:
        return self.is_better and not self.too_harmful

    def to_json(self) -> dict[str, Any]:
        return {
            "pairs": self.pairs,
            "gain": _json(self.gain),
            "harms": {metric: _json(harm) for metric, harm in self.harms.items()},
            "confirmed": self.is_confirmed,
        }


def _json(interval: Interval) -> dict[str, float | None]:
    """JSON has no infinity: the bounds of an unknown interval are null."""
    return {name: value if math.isfinite(value) else None for name, value in interval.to_json().items()}


def compare(goal: Goal, values: Values, reference: Values, alpha: float) -> Comparison:
    """Compares two points' values on the same pairs.

    alpha: probability with which a lower bound lies above, and an upper bound below, the true mean. The confirmation
    needs all of its bounds at once, so they need no correction for their number.
    """
    gains = goal.gains(values, reference)
    harms = goal.harms(values, reference)
    intervals = {name: mean_interval(harm, 2 * alpha) for name, harm in harms.items() if len(harm)}
    gain = mean_interval(gains, 2 * alpha) if len(gains) else Interval(0.0, -math.inf, math.inf)
    return Comparison(gain, intervals, len(gains))


@dataclass
class Search:
    """The measurements of a search.

    Attributes:
        goal: what was asked for.
        default: number of the point that all others are compared with; it is measured on all pairs.
        values: point -> its values, on the first pairs.
        rungs: for each rung (number of pairs, the points that were measured on all of them).
    """

    goal: Goal
    default: int
    values: dict[int, dict[str, list[float | None]]] = field(default_factory=dict)
    rungs: list[tuple[int, list[int]]] = field(default_factory=list)

    def pairs(self, point: int) -> int:
        """Number of pairs that a point was measured on."""
        return max(count for count, points in self.rungs if point in points)

    def first(self, point: int, count: int) -> Values:
        """A point's values on the first `count` pairs."""
        return {metric: row[:count] for metric, row in self.values[point].items()}

    def control(self, point: int) -> float:
        """Mean of a point's control on all of its pairs, with the sign that makes higher better; -inf without values"""
        row = [value for value in self.values[point][self.goal.metric] if value is not None]
        return self.goal.sign * float(np.mean(row)) if row else -math.inf

    def harm(self, point: int) -> float:
        """The largest mean harm of a point against the default, in margins; 0 without metrics of quality."""
        count = self.pairs(point)
        harms = self.goal.harms(self.first(point, count), self.first(self.default, count))
        return max((float(harm.mean()) for harm in harms.values() if len(harm)), default=0.0)

    def candidates(self, most: int = CANDIDATES) -> list[int]:
        """The points of the last rung that are worth a confirmation, at most `most`, best control first.

        They are better than the default and within the margins by the means. Points whose bounds are within the margins
        too come before others of better control, which fresh pairs would rarely confirm.
        """
        _, points = self.rungs[-1]
        good = [p for p in points if self.control(p) > self.control(self.default) and self.harm(p) <= 1]
        chosen = sorted(good, key=lambda p: (self._is_safe(p), self.control(p)), reverse=True)[:most]
        return sorted(chosen, key=self.control, reverse=True)

    def _is_safe(self, point: int) -> bool:
        count = self.pairs(point)
        compared = compare(self.goal, self.values[point], self.first(self.default, count), ALPHA)
        return not compared.too_harmful

    def front(self) -> list[int]:
        """The points that no other point beats in both control and harm, by their means; best control first."""
        order = sorted(self.values, key=lambda p: (-self.control(p), self.harm(p)))
        front, least = [], math.inf
        for point in order:
            if self.harm(point) < least:
                front.append(point)
                least = self.harm(point)
        return front


def rung_sizes(pairs: int, first: int = FIRST_PAIRS) -> list[int]:
    """The number of pairs of each rung: it doubles from `first` up to `pairs`."""
    sizes = []
    while first < pairs:
        sizes.append(first)
        first *= 2
    return [*sizes, pairs]


def most_pictures(points: int, sizes: Sequence[int]) -> int:
    """The largest number of pictures that `halve` can need."""
    total, done = 0, 0
    for size in sizes:
        total += points * (size - done)
        points, done = _half(points), size
    return total


def _half(points: int) -> int:
    """How many of so many points reach the next rung at most; with the default, which always does."""
    return min(points, max(2, math.ceil(points / 2) + 1))


def halve(
    points: int,
    default: int,
    goal: Goal,
    measure: Callable[[int, int, int], Values],
    sizes: Sequence[int],
    *,
    alpha: float = ALPHA,
    on_rung: Callable[[Search], None] | None = None,
) -> Search:
    """Measures `points` points on more and more pairs; after each rung, half of them and the default stay at most.

    A point is dropped if its control is significantly worse than the best one's, if its harm is significantly above a
    margin, or if half of the points are better by their means. The default always stays.

    Args:
        measure: (point, first pair, end) -> the point's values on those pairs.
        sizes: number of pairs of each rung, increasing.
        alpha: level of each single test. A wrongly dropped point costs a gain; it makes no statement wrong.
        on_rung: is called after each rung.
    """
    search, alive, done = Search(goal, default), list(range(points)), 0
    for size in sizes:
        for point in alive:
            rows = search.values.setdefault(point, {})
            for metric, row in measure(point, done, size).items():
                rows.setdefault(metric, []).extend(row)
        search.rungs.append((size, alive))
        if on_rung:
            on_rung(search)
        alive, done = _survivors(search, alive, alpha), size
    return search


def _survivors(search: Search, alive: Sequence[int], alpha: float) -> list[int]:
    goal, default = search.goal, search.values[search.default]

    def is_harmful(point: int) -> bool:
        harms = goal.harms(search.values[point], default).values()
        return any(len(harm) > 1 and lower_bound(harm, alpha) > 1 for harm in harms)

    allowed = [point for point in alive if point == search.default or not is_harmful(point)]
    best = max(allowed, key=search.control)

    def is_worse(point: int) -> bool:
        gains = goal.gains(search.values[point], search.values[best])
        return len(gains) > 1 and upper_bound(gains, alpha) < 0

    others = [point for point in allowed if point != search.default and not is_worse(point)]
    others.sort(key=lambda point: (search.harm(point) > 1, -search.control(point)))
    return sorted([search.default, *others[: _half(len(alive)) - 1]])


def recommend(candidates: Sequence[int], comparisons: Sequence[Comparison], default: int) -> int:
    """The first candidate, in the order of the choosing pairs, that fresh pairs confirm; else the default.

    With each comparison at STATEMENTS_ALPHA / len(candidates), the probability that a point without a gain is
    recommended is STATEMENTS_ALPHA at most (Bonferroni).
    """
    return next((p for p, c in zip(candidates, comparisons, strict=True) if c.is_confirmed), default)
