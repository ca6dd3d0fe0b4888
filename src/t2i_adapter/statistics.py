"""Statistics of paired measurements: intervals, looks that share one error probability, numbers of pairs.

Letters: N pairs. Two adapters, or two conditions, are measured on the same N pairs with the same noise, and only the
differences of a pair are looked at: most of what varies from pair to pair is in both and cancels.

References: Student 1908 for the interval of a mean of N differences; the union bound for several looks.

Importing this module loads no numpy: what only shows intervals needs none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

ALPHA = 0.05
"""Probability of a wrong statement that all looks of a run share."""
POWER = 0.8
"""Probability with which a difference is found, for numbers of pairs that are needed."""


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval."""

    mean: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """Returns {"mean", "low", "high"}."""
        return {"mean": self.mean, "low": self.low, "high": self.high}

    @classmethod
    def from_json(cls, values: dict[str, float]) -> Interval:
        """Builds the interval from what `to_json` returned."""
        return cls(float(values["mean"]), float(values["low"]), float(values["high"]))


def mean_interval(values: Sequence[float] | np.ndarray, alpha: float = ALPHA) -> Interval:
    """Student's two-sided interval of the mean of N values, which misses the true mean with probability `alpha`.

    One value has an infinite interval. Pass the pairs' differences for a paired comparison.
    """
    import numpy as np

    array = np.asarray(values, float)
    count = len(array)
    mean = float(array.sum()) / count
    if count < 2:
        return Interval(mean, -math.inf, math.inf)
    squares = float(np.square(array - mean).sum())
    half = t_quantile(1 - alpha / 2, count - 1) * math.sqrt(squares / (count - 1) / count)
    return Interval(mean, mean - half, mean + half)


def lower_bound(values: Sequence[float] | np.ndarray, alpha: float) -> float:
    """The one-sided bound that lies above the true mean with probability `alpha`; -inf for one value."""
    return mean_interval(values, 2 * alpha).low


def upper_bound(values: Sequence[float] | np.ndarray, alpha: float) -> float:
    """The one-sided bound that lies below the true mean with probability `alpha`; inf for one value."""
    return mean_interval(values, 2 * alpha).high


def difference_lower_bound(
    first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray, alpha: float
) -> float:
    """The one-sided bound that lies above mean(first) - mean(second) with probability `alpha`, for two independent
    samples of unequal variance (Welch 1947); -inf if one of them has a single value."""
    import numpy as np

    samples = [np.asarray(values, float) for values in (first, second)]
    difference = float(samples[0].mean() - samples[1].mean())
    if min(len(values) for values in samples) < 2:
        return -math.inf
    errors = [float(values.var(ddof=1)) / len(values) for values in samples]
    if not sum(errors):
        return difference
    freedom = sum(errors) ** 2 / sum(e * e / (len(v) - 1) for e, v in zip(errors, samples, strict=True))
    return difference - t_quantile(1 - alpha, max(1, math.floor(freedom))) * math.sqrt(sum(errors))


def look_alpha(look: int, alpha: float = ALPHA) -> float:
    """What look number `look`, from 1, may spend: alpha / (k (k + 1)). Over all looks this sums to `alpha`, so by the
    union bound some look makes a wrong statement with probability `alpha` at most, however many looks there are."""
    assert look >= 1
    return alpha / (look * (look + 1))


def pairs_needed(
    differences: Sequence[float] | np.ndarray, least: float, alpha: float = ALPHA, power: float = POWER
) -> int:
    """The number of pairs with which a true mean difference of `least` is found with probability `power`.

    differences: N measured ones, whose standard deviation s stands for the true one: n = (z_a + z_p)^2 s^2 / least^2.
    """
    import numpy as np

    z = normal_quantile(1 - alpha / 2) + normal_quantile(power)
    spread = float(np.std(np.asarray(differences, float), ddof=1))
    return max(2, math.ceil((z * spread / least) ** 2))


@lru_cache(maxsize=4096)
def t_quantile(probability: float, freedom: int) -> float:
    """The value below which Student's t with `freedom` degrees of freedom lies with `probability`, in (0, 1)."""
    if probability < 0.5:
        return -t_quantile(1 - probability, freedom)
    low, high = 0.0, 1.0
    while _t_below(high, freedom) < probability:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_below(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


@lru_cache(maxsize=256)
def normal_quantile(probability: float) -> float:
    """The value below which a standard normal number lies with `probability`, in (0, 1)."""
    low, high = -40.0, 40.0
    for _ in range(100):
        middle = (low + high) / 2
        below = 0.5 * math.erfc(-middle / math.sqrt(2))
        low, high = (middle, high) if below < probability else (low, middle)
    return (low + high) / 2


def _t_below(t: float, freedom: int) -> float:
    """P(T < t) for t of at least 0: 1 - I_x(v/2, 1/2) / 2 with x = v / (v + t^2)."""
    return 1 - 0.5 * _incomplete_beta(freedom / (freedom + t * t), freedom / 2, 0.5)


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by the continued fraction of Lentz (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side only
        return 1 - _incomplete_beta(1 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    tiny, fraction, c, d = 1e-300, 1.0, 1.0, 0.0
    for term in range(1000):
        m = term // 2
        if term == 0:
            factor = 1.0
        elif term % 2:
            factor = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            factor = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / (1 + factor * d or tiny)
        c = 1 + factor / c or tiny
        fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return math.exp(log_front) * (fraction - 1) / a
