"""Options of the sweep, which `evaluate` has beside its own. Importing this module loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from math import inf
from typing import Any

from t2i_adapter.errors import UserError, require
from t2i_adapter.generation.options import POINT, SamplingOptions

AXES = ("scale", "guidance", "control_guidance", "condition_factor")
"""Sampling options that a sweep varies."""
LOWER_GUIDANCE = 0.6
"""Factor of the second guidance scale that is tried: less text guidance alone raises control."""


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What a sweep tries, and what it does with the answer."""

    sweep: bool = False
    """Search the sampling options for the best control instead of measuring the adapter: few pictures of many points,
    then more of the better ones. As many other pairs confirm the answer. Writes sweep.json and sweep.html."""
    sweep_scale: tuple[float, ...] = (0.75, 1.0, 1.25, 1.5)
    """Values of --scale that the sweep tries."""
    sweep_guidance: tuple[float, ...] = ()
    """Values of --guidance that the sweep tries. None: the value of --guidance, and 0.6 times that."""
    sweep_control_guidance: tuple[float, ...] = (1.0, 1.5, 2.0)
    """Values of --control_guidance that the sweep tries; those that do not fit a point's guidance are skipped."""
    sweep_condition_factor: tuple[float, ...] = (1.0, 0.7)
    """Values of --condition_factor that the sweep tries."""
    sweep_metric: str | None = None
    """Metric of control that the sweep raises, such as edge_f1. None: the metric that answers an evaluation."""
    sweep_bands: bool = True
    """Fit the adapter's strength at each noise level too, and test it as a --scale_schedule."""
    write: bool = True
    """Write the point that the sweep recommends into the t2i_adapter.json of the adapter's folder; `generate` uses it
    by default."""

    def check_sweep(self) -> None:
        """Raises UserError for a value that no point may have."""
        for axis in AXES:
            values = getattr(self, f"sweep_{axis}")
            require(f"sweep_{axis}", axis == "guidance" or len(values) > 0, "no value", "allowed is 1 value or more")
            for value in values:
                require(f"sweep_{axis}", 0 <= value < inf, value, "allowed is 0 or more")
        shares = self.sweep_condition_factor
        require("sweep_condition_factor", max(shares) <= 1, max(shares), "allowed are shares from 0 to 1")


def make_points(options: SweepOptions, default: SamplingOptions) -> list[SamplingOptions]:
    """Returns the points of a sweep, the default first and each point once.

    A point whose control guidance does not fit its guidance is skipped. Raises UserError if no point but the default
    is left.
    """
    axes = {axis: list(getattr(options, f"sweep_{axis}")) for axis in AXES}
    axes["guidance"] = axes["guidance"] or [default.guidance, round(LOWER_GUIDANCE * default.guidance, 3)]
    points = [default]
    for values in product(*axes.values()):
        try:
            point = replace(default, **dict(zip(axes, values, strict=True)))
        except UserError:
            continue
        if point not in points:
            points.append(point)
    if len(points) == 1:
        raise UserError("has no point but the default: name two values or more of one option.", option="sweep_scale")
    return points


def point_values(point: SamplingOptions) -> dict[str, Any]:
    """Returns what an adapter's record holds of a point: the options that a sweep varies, and how they are applied."""
    return {name: getattr(point, name) for name in POINT}


def describe_point(point: SamplingOptions) -> str:
    """Returns the point in words: "scale 1.25, guidance 3, control_guidance 1.5, condition_factor 1"."""
    return ", ".join(f"{axis} {getattr(point, axis):g}" for axis in AXES)
