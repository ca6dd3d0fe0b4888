"""From a uniform number to a timestep."""

from __future__ import annotations

import math
from statistics import NormalDist

from t2i_adapter.config.tree import ObjectiveOptions

_NORMAL = NormalDist()
_EDGE = 2.0**-53  # as far from 0 and 1 the normal quantile is a number, and any u but those two lies


def sample(options: ObjectiveOptions, u: float, num_timesteps: int) -> int:
    """The timestep in [0, num_timesteps) that the options' distribution has at its quantile `u` in [0, 1).

    `cubic` runs through its quantiles from the top, which leaves its distribution as it is.
    """
    return min(int(_share(options, u) * num_timesteps), num_timesteps - 1)


def _share(options: ObjectiveOptions, u: float) -> float:
    """t / T in [0, 1]."""
    if options.timesteps == "uniform":
        return u
    if options.timesteps == "cubic":
        # Paper 2302.08453, section 3.4: two thirds of the draws have t >= 0.7 T.
        return 1.0 - u**3
    # t / T = sigmoid(m + s z), z standard normal (2403.03206, section 3.1).
    z = _NORMAL.inv_cdf(min(max(u, _EDGE), 1.0 - _EDGE))
    return 1.0 / (1.0 + math.exp(-options.logit_mean - options.logit_std * z))
