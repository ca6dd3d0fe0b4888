"""Paired differences between columns of an evaluation, and the ranking of several adapters.

All columns are measured on the same pairs with the same noise. The value of a pair is the mean over its pictures, and a
difference is taken pair by pair, so what both columns have in common cancels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from t2i_adapter.evaluation.adapters import adapter_column
from t2i_adapter.evaluation.evaluate import Evaluation
from t2i_adapter.evaluation.headline import CONTROLS, METRICS, headline_metric
from t2i_adapter.evaluation.metrics import Estimate
from t2i_adapter.evaluation.plan import ADAPTER, NO_ADAPTER, OTHER_CONDITION, TARGET
from t2i_adapter.statistics import ALPHA, pairs_needed, t_quantile

RESAMPLES = 10_000
_DRAWN_AT_A_TIME = 2**22


@dataclass(frozen=True)
class Difference:
    """The mean paired difference of two columns in one metric, with its interval.

    Attributes:
        estimate: mean and bounds, in the metric's units; positive if the first column has the larger values.
        pairs: pairs that have both values.
        least: the difference for which `needed` holds, in the metric's units.
        needed: pairs with which the interval of a true difference of `least` excludes 0 in 80 % of evaluations.
    """

    estimate: Estimate
    pairs: int
    least: float
    needed: int

    @property
    def is_shown(self) -> bool:
        """Whether the interval excludes 0."""
        return self.estimate.low > 0 or self.estimate.high < 0

    def to_json(self) -> dict[str, Any]:
        return {
            **self.estimate.to_json(),
            "pairs": self.pairs,
            "least_difference": self.least,
            "pairs_needed": self.needed,
        }


@dataclass(frozen=True)
class Place:
    """One adapter of a ranking.

    Attributes:
        name: short name of the adapter.
        rank: 1 plus the number of adapters that are shown to be better; adapters may share a rank.
        estimate: mean and interval of the headline metric.
        to_first: paired difference to the first of the ranking; None for the first itself.
        floor: the mean with another pair's condition.
    """

    name: str
    rank: int
    estimate: Estimate
    to_first: Difference | None
    floor: Estimate | None


@dataclass(frozen=True)
class Comparison:
    """The ranking of two or more adapters by the headline metric.

    Attributes:
        names: short names of the adapters in the order of the ranking, best mean first.
        metric: key of the headline metric.
        places: one for each name.
        differences: metric -> name -> paired difference to the first of the ranking.
        count: pairs of adapters over which the intervals of one metric hold together.
    """

    names: Sequence[str]
    metric: str
    places: Sequence[Place]
    differences: Mapping[str, Mapping[str, Difference]]
    count: int

    @property
    def groups(self) -> list[list[str]]:
        """The names by rank: those of one group share a rank."""
        ranks = dict.fromkeys(sorted(place.rank for place in self.places))
        return [[place.name for place in self.places if place.rank == rank] for rank in ranks]

    @property
    def title(self) -> str:
        """The result as a short sentence."""
        first = self.groups[0]
        if len(first) == 1:
            return f"{first[0]} follows its conditions best."
        if len(first) == len(self.names):
            return f"{_listed(first)} cannot be told apart."
        return f"{_listed(first)} cannot be told apart, and are ahead of the others."

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON types."""
        return {
            "metric": self.metric,
            "higher_is_better": METRICS[self.metric].higher_is_better,
            "intervals": f"95 % for all {self.count} pairs of adapters together (Bonferroni), paired bootstrap",
            "ranking": [
                {
                    "name": place.name,
                    "rank": place.rank,
                    **place.estimate.to_json(),
                    "difference_to_first": place.to_first.to_json() if place.to_first else None,
                }
                for place in self.places
            ],
            "groups": self.groups,
            "differences_to_first": {
                metric: {name: difference.to_json() for name, difference in row.items()}
                for metric, row in self.differences.items()
            },
        }


def compare(evaluation: Evaluation, names: Sequence[str]) -> Comparison:
    """Ranks the adapters of an evaluation with the columns "adapter-NAME" by the headline metric.

    The first of the ranking is chosen by the same values that are compared. So the intervals hold for all pairs of
    adapters together: each has the error probability 0.05 / number of pairs (Bonferroni).
    """
    key = headline_metric(evaluation)
    sign = 1 if METRICS[key].higher_is_better else -1
    estimates = evaluation.estimates[key]
    ranked = sorted(names, key=lambda name: -sign * estimates[adapter_column(ADAPTER, name)].mean)
    count = math.comb(len(names), 2)

    def difference(metric: str, one: str, other: str) -> Difference | None:
        return column_difference(
            evaluation, metric, adapter_column(ADAPTER, one), adapter_column(ADAPTER, other), alpha=ALPHA / count
        )

    worse_than = dict.fromkeys(ranked, 0)
    for better, worse in combinations(ranked, 2):
        found = difference(key, better, worse)
        worse_than[worse] += found is not None and found.is_shown
    first, *others = ranked
    differences = {
        metric: {name: found for name in others if (found := difference(metric, name, first)) is not None}
        for metric in evaluation.values
    }
    places = [
        Place(
            name,
            1 + worse_than[name],
            estimates[adapter_column(ADAPTER, name)],
            differences[key].get(name),
            estimates.get(adapter_column(OTHER_CONDITION, name)),
        )
        for name in ranked
    ]
    return Comparison(ranked, key, places, differences, count)


def evaluation_of(evaluation: Evaluation, name: str) -> Evaluation:
    """Returns the evaluation of one of several adapters, with the plain names of the columns."""
    columns = {kind: adapter_column(kind, name) for kind in (ADAPTER, OTHER_CONDITION)}
    columns |= {NO_ADAPTER: NO_ADAPTER, TARGET: TARGET}

    def chosen(by_column: Mapping[str, Any]) -> dict[str, Any]:
        return {plain: by_column[column] for plain, column in columns.items() if column in by_column}

    return Evaluation(
        evaluation.pairs,
        evaluation.seeds,
        evaluation.others,
        chosen(evaluation.pictures),
        {metric: chosen(row) for metric, row in evaluation.values.items()},
        {metric: chosen(row) for metric, row in evaluation.estimates.items()},
        {metric: chosen(row) for metric, row in evaluation.singles.items()},
        evaluation.seed,
    )


def control_differences(evaluation: Evaluation) -> dict[str, dict[str, Difference]]:
    """Returns metric -> control -> paired difference of the adapter to the control, each with its own 95 % interval."""
    return {
        metric: {
            control: found
            for control in CONTROLS
            if control in evaluation.values[metric]
            and (found := column_difference(evaluation, metric, ADAPTER, control)) is not None
        }
        for metric in evaluation.values
    }


def column_difference(
    evaluation: Evaluation, metric: str, column: str, other: str, *, alpha: float = ALPHA
) -> Difference | None:
    """Returns the paired difference `column` minus `other`; None if fewer than two pairs have both values."""
    values = evaluation.values[metric]
    rows = zip(values[column], values[other], strict=True)
    found = [a - b for a, b in rows if a is not None and b is not None]
    if len(found) < 2:
        return None
    least = METRICS[metric].least
    needed = pairs_needed(found, least, alpha)
    return Difference(paired_interval(found, evaluation.seed, alpha), len(found), least, needed)


def paired_interval(differences: Sequence[float], seed: int, alpha: float = ALPHA) -> Estimate:
    """Returns the mean of N >= 2 differences and its bootstrap interval, which misses the true mean with probability
    `alpha`.

    It is the expanded percentile interval (Hesterberg 2015, "What teachers should know about the bootstrap", section
    5.3): pairs are resampled RESAMPLES times, and the quantiles lie further out than alpha / 2 for few pairs, by which
    the interval of normal differences is Student's.
    """
    array = np.asarray(differences, float)
    count = len(array)
    spread = math.sqrt(count / (count - 1)) * t_quantile(1 - alpha / 2, count - 1)
    tail = 0.5 * math.erfc(spread / math.sqrt(2))
    random = np.random.default_rng(seed)
    rows = max(1, _DRAWN_AT_A_TIME // count)
    means = [
        array[random.integers(count, size=(min(rows, RESAMPLES - start), count))].mean(axis=1)
        for start in range(0, RESAMPLES, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Estimate(float(array.mean()), float(low), float(high))


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
