"""Successive halving with a confirmation on fresh pairs: its error rates and its cost, on synthetic objectives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from t2i_adapter.evaluation.halving import (
    STATEMENTS_ALPHA,
    Goal,
    Limit,
    Search,
    compare,
    halve,
    most_pictures,
    recommend,
    rung_sizes,
)
from t2i_adapter.evaluation.sweep_values import Values

POINTS, PAIRS = 24, 32
GOAL = Goal("control", 1, {"color": Limit(-1, 1.0)})


def objective(
    control: np.ndarray, harm: np.ndarray, choices: np.random.Generator
) -> Callable[[int, int, int], dict[str, list[float | None]]]:
    """A point's values: its true mean, each pair's own level (which pairing removes), and noise."""
    pairs = choices.normal(0, 0.2, 4 * PAIRS)
    noise = choices.normal(0, 0.03, (len(control), 4 * PAIRS))
    colors = choices.normal(0, 0.8, (len(control), 4 * PAIRS))

    def measure(point: int, start: int, end: int) -> dict[str, list[float | None]]:
        part = slice(start, end)
        return {
            "control": (control[point] + pairs[part] + noise[point, part]).tolist(),
            "color": (4 + harm[point] + colors[point, part]).tolist(),
        }

    return measure


def recommended(control: np.ndarray, harm: np.ndarray, seed: int) -> int:
    """A whole sweep: the search on PAIRS pairs, the confirmation on as many others. The default is point 0."""
    measure = objective(control, harm, np.random.default_rng(seed))
    search = halve(len(control), 0, GOAL, measure, rung_sizes(PAIRS))
    candidates = search.candidates()

    def fresh(point: int) -> Values:
        return measure(point, PAIRS, 2 * PAIRS)

    alpha = STATEMENTS_ALPHA / max(1, len(candidates))
    return recommend(candidates, [compare(GOAL, fresh(point), fresh(0), alpha) for point in candidates], 0)


def test_without_any_effect_the_default_is_recommended() -> None:
    none = np.zeros(POINTS)
    wrong = sum(recommended(none, none, seed) != 0 for seed in range(500))
    assert wrong <= 0.05 * 500
    # The choosing pairs alone would be wrong most of the time: the fresh pairs are what holds the error.
    naive = 0
    for seed in range(100):
        search = halve(
            POINTS, 0, GOAL, objective(none, none, np.random.default_rng(seed)), rung_sizes(PAIRS), alpha=0.05
        )
        best = search.candidates(1)
        naive += bool(best) and compare(GOAL, search.values[best[0]], search.values[0], 0.025).is_better
    assert naive > 15


def test_a_point_that_is_better_is_found() -> None:
    control, harm = np.zeros(POINTS), np.zeros(POINTS)
    control[7] = 0.04
    assert sum(recommended(control, harm, seed) == 7 for seed in range(100)) >= 90


def test_a_better_point_that_harms_quality_is_not_recommended() -> None:
    control, harm = np.zeros(POINTS), np.zeros(POINTS)
    control[7], harm[7] = 0.1, 3.0
    control[9] = 0.04
    found = [recommended(control, harm, seed) for seed in range(100)]
    assert 7 not in found
    assert found.count(9) >= 85


def test_a_point_at_the_margin_of_quality_is_wrongly_recommended_in_few_sweeps() -> None:
    control, harm = np.zeros(4), np.zeros(4)
    control[2], harm[2] = 0.1, 1.0
    assert sum(recommended(control, harm, seed) == 2 for seed in range(300)) <= 0.05 * 300


@pytest.mark.parametrize(("pairs", "sizes"), [(4, [4]), (8, [8]), (30, [8, 16, 30]), (64, [8, 16, 32, 64])])
def test_the_pairs_double_up_to_the_last_rung(pairs: int, sizes: list[int]) -> None:
    assert rung_sizes(pairs) == sizes


def test_the_cost_is_bounded_and_the_default_is_measured_on_all_pairs() -> None:
    none = np.zeros(POINTS)
    counts_of_pictures: list[int] = []
    measure = objective(none, none, np.random.default_rng(0))

    def counted(point: int, start: int, end: int) -> Values:
        counts_of_pictures.append(end - start)
        return measure(point, start, end)

    rungs: list[Search] = []
    search = halve(POINTS, 3, GOAL, counted, rung_sizes(PAIRS), on_rung=rungs.append)
    assert len(rungs) == 3
    assert sum(counts_of_pictures) <= most_pictures(POINTS, rung_sizes(PAIRS)) < 0.6 * POINTS * PAIRS
    assert search.pairs(3) == PAIRS
    counts = [len(points) for _, points in search.rungs]
    assert counts[0] == POINTS and counts[1] <= POINTS / 2 + 1 and counts[2] <= counts[1] / 2 + 1.5


def test_the_front_has_the_points_that_no_other_beats() -> None:
    values = {0: (0.5, 4.0), 1: (0.6, 4.5), 2: (0.55, 4.8), 3: (0.7, 6.0), 4: (0.4, 4.2)}
    search = Search(
        GOAL, 0, {p: {"control": [c] * 4, "color": [b] * 4} for p, (c, b) in values.items()}, [(4, [*values])]
    )
    assert search.front() == [3, 1, 0]
    assert search.candidates() == [1, 2], "3 is better and two margins worse in colour"


def test_points_within_the_margins_by_their_bounds_are_confirmed_before_others() -> None:
    rows = {
        0: {"control": [0.5, 0.5, 0.5], "color": [4.0, 4.0, 4.0]},
        1: {"control": [0.9, 0.9, 0.9], "color": [0.0, 4.9, 9.8]},
        2: {"control": [0.7, 0.7, 0.7], "color": [4.1, 4.0, 4.2]},
        3: {"control": [0.6, 0.6, 0.6], "color": [4.1, 4.0, 4.2]},
    }
    search = Search(
        GOAL, 0, {point: {k: list(v) for k, v in row.items()} for point, row in rows.items()}, [(3, [*rows])]
    )
    assert search.candidates() == [2, 3]
    assert search.candidates(3) == [1, 2, 3]


def test_pairs_without_a_value_are_skipped_and_errors_count_as_lower_is_better() -> None:
    goal = Goal("condition_error", -1, {"color": Limit(-1, 1.0)})
    own: Values = {"condition_error": [0.1, 0.1, None, 0.1], "color": [None] * 4}
    other: Values = {"condition_error": [0.3, 0.2, 0.2, None], "color": [1.0] * 4}
    found = compare(goal, own, other, 0.05)
    assert found.pairs == 2 and found.gain.mean == pytest.approx(0.15) and not found.harms
    assert compare(goal, own, own, 0.05).is_better is False, "no difference is no gain"
    unknown = compare(goal, {"condition_error": [None]}, {"condition_error": [0.1]}, 0.05)
    assert unknown.pairs == 0 and not unknown.is_better
