"""Quantiles against published tables, and intervals against simulations whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from t2i_adapter.statistics import (
    difference_lower_bound,
    look_alpha,
    lower_bound,
    mean_interval,
    normal_quantile,
    pairs_needed,
    t_quantile,
    upper_bound,
)

# Student's t, tables of the NIST handbook, section 1.3.6.7.2.
TABLE = [(0.975, 1, 12.706), (0.95, 4, 2.132), (0.995, 10, 3.169), (0.975, 31, 2.040), (0.999, 100, 3.174)]


@pytest.mark.parametrize(("probability", "freedom", "value"), TABLE)
def test_quantiles_of_t_are_those_of_the_tables(probability: float, freedom: int, value: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(value, abs=6e-4)
    assert t_quantile(1 - probability, freedom) == pytest.approx(-value, abs=6e-4)


def test_quantiles_of_t_approach_those_of_the_normal_distribution() -> None:
    assert t_quantile(0.975, 10**6) == pytest.approx(normal_quantile(0.975), abs=1e-5)
    assert normal_quantile(0.975) == pytest.approx(1.959964, abs=1e-6)


def test_an_interval_holds_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    intervals = [mean_interval(rng.normal(3, 2, 8), alpha=0.1) for _ in range(2000)]
    held = np.mean([i.low <= 3 <= i.high for i in intervals])
    assert 0.88 < held < 0.92  # 0.9, 3 standard deviations of 2,000 draws


def test_bounds_are_wrong_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    draws = [rng.normal(0, 1, 12) for _ in range(2000)]
    assert 0.03 < np.mean([lower_bound(d, 0.05) > 0 for d in draws]) < 0.07
    assert 0.03 < np.mean([upper_bound(d, 0.05) < 0 for d in draws]) < 0.07


def test_the_bound_of_two_samples_is_wrong_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    draws = [(rng.normal(1, 3, 8), rng.normal(1, 1, 20)) for _ in range(2000)]
    assert 0.03 < np.mean([difference_lower_bound(a, b, 0.05) > 0 for a, b in draws]) < 0.07
    assert difference_lower_bound([1.0], [0.0, 0.1], 0.05) == -np.inf
    assert difference_lower_bound([3.0, 3.0], [1.0, 1.0], 0.05) == 2.0


def test_all_looks_spend_alpha_together() -> None:
    assert sum(look_alpha(k, 0.05) for k in range(1, 100_000)) == pytest.approx(0.05, rel=1e-4)


def test_as_many_pairs_as_needed_find_the_difference_with_the_power() -> None:
    rng = np.random.default_rng(2)
    count = pairs_needed(rng.normal(0, 0.1, 10_000), 0.02)
    assert count == pytest.approx((1.96 + 0.8416) ** 2 * 0.1**2 / 0.02**2, rel=0.03)
    found = [mean_interval(rng.normal(0.02, 0.1, count)).low > 0 for _ in range(2000)]
    assert 0.77 < np.mean(found) < 0.83
