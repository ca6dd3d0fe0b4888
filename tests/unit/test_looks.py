"""Looks cost what the budget allows, come early, and measure as many pairs as it pays for."""

from __future__ import annotations

import pytest

from t2i_adapter.training import looks
from t2i_adapter.training.looks import (
    BANDS,
    DECODE_FORWARDS,
    EACH,
    FIRST,
    FORWARDS_A_SAMPLE,
    MOST_LOOKS,
    LookPlan,
    plan_looks,
)

RUNS = [(400, 16, 0.05), (1000, 4, 0.05), (3000, 4, 0.02), (20_000, 16, 0.05), (100_000, 2, 0.05), (777, 33, 0.3)]
FORWARDS = 16


def cost(plan: LookPlan, until: int, columns: int) -> float:
    """Forward passes of all looks up to update `until`."""
    done = [step for step in plan.steps if step <= until]
    drawn = [step for step in done if step in plan.picture_steps]
    losses = plan.pairs * BANDS * (FIRST * bool(done) + EACH * len(done))
    return losses + plan.pictures * (FORWARDS + DECODE_FORWARDS) * (bool(drawn) + columns * len(drawn))


@pytest.mark.parametrize(("steps", "samples", "budget"), RUNS)
@pytest.mark.parametrize("columns", [1, 2])
def test_all_looks_together_cost_at_most_the_budget(steps: int, samples: int, budget: float, columns: int) -> None:
    plan = plan_looks(steps, samples, budget, pairs=32, picture_forwards=FORWARDS, columns=columns)
    assert plan.steps
    whole = steps * samples * FORWARDS_A_SAMPLE
    assert 0.25 * budget < cost(plan, steps, columns) / whole <= budget


@pytest.mark.parametrize(("steps", "samples", "budget"), RUNS)
def test_the_last_look_is_at_the_end_and_the_first_as_soon_as_it_is_paid_for(
    steps: int, samples: int, budget: float
) -> None:
    plan = plan_looks(steps, samples, budget, pairs=32, picture_forwards=FORWARDS)
    assert plan.steps[-1] == steps and steps in plan.picture_steps | {steps}
    assert list(plan.steps) == sorted(set(plan.steps))
    assert plan.picture_steps <= set(plan.steps)
    losses = plan.pairs * BANDS * (FIRST + EACH)
    assert losses <= budget * plan.steps[0] * samples * FORWARDS_A_SAMPLE * 1.01
    assert plan.steps[0] <= 0.45 * steps


def test_a_long_run_measures_all_pairs_and_looks_no_more_often_than_useful() -> None:
    plan = plan_looks(100_000, 16, 0.05, pairs=32, picture_forwards=FORWARDS)
    assert plan.pairs == 32 and plan.pictures == looks.MOST_PICTURES
    assert len(plan.steps) <= MOST_LOOKS + 12  # the early looks lie closer


@pytest.mark.parametrize(("steps", "samples", "budget"), [(3, 2, 0.05), (100, 1, 0.05), (10_000, 16, 0.0)])
def test_a_run_that_cannot_pay_measures_nothing(steps: int, samples: int, budget: float) -> None:
    assert plan_looks(steps, samples, budget, pairs=32, picture_forwards=FORWARDS).steps == ()
