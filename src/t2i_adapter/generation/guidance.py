"""Control guidance: how strongly guidance amplifies the condition, and the adapter's strength over the steps.

A base is trained without conditions, so it predicts the noise without a condition, too. Let e(p, a) be the UNet's
prediction with prompt p, or without one (0), and with a share a of the adapter's features. With text guidance g and
control guidance c a step predicts

    two passes      e(0, r) + g [e(p, 1) - e(0, r)],  r = (g - c) / (g - 1)
    three passes    e(0, 0) + c [e(0, 1) - e(0, 0)] + g [e(p, 1) - e(0, 1)]
    g at most 1     e(p, 0) + c [e(p, 1) - e(p, 0)],  with `control_passes` 3

The pipeline of diffusers computes n + g (e(p, 1) - n) of a negative prediction n. All forms are therefore hooks around
its UNet. They change what the negative branch carries (two passes), or put (1 - w) e(0, 1) + w e(0, 0) with
w = (c - 1) / (g - 1) in the place of n (three passes: InstructPix2Pix, arXiv 2211.09800, eq. 3). The two forms are
equal to first order in the features, and amplify the condition c times. c = 1 is the pipeline itself.

With several adapters, c and the schedule may differ between them. Adapter i then has its own share r_i. With three
passes each c_i is 1 or one common c: the pass without the adapter keeps those with c_i = 1.

Letters: B pictures; a batch has 2 B rows with text guidance, the negative ones first, and B without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import MultiAdapter, StableDiffusionXLAdapterPipeline
from torch import Tensor

from t2i_adapter.errors import UserError, flag
from t2i_adapter.generation.options import SamplingOptions, Strength, parse_schedule
from t2i_adapter.models.family import AdapterPipeline

_FEATURES = "down_intrablock_additional_residuals"
"""The UNet's argument with the adapter's features: a list of (2B,D,h,w), fresh copies at each step, or None."""
_ALL_CALLS = 100.0
"""An adapter_conditioning_factor that the pipeline never reaches: it counts calls of the UNet, and some schedulers call
it twice a step."""


@contextmanager
def steer(
    pipeline: AdapterPipeline, sampling: SamplingOptions, strengths: Sequence[Strength]
) -> Iterator[dict[str, float]]:
    """While it is open, one call of the pipeline applies what its own arguments cannot say.

    These are the control guidance, the schedule, and the steps of each adapter. The call gets the scales of `strengths`
    as its adapter_conditioning_scale, and the yielded arguments, which say when the adapters end; only SDXL's pipeline
    has one. If the arguments say it all, no hook is set.

    Raises UserError.
    """
    steering = _Steering(pipeline, sampling, strengths)
    if not steering.is_needed:
        yield _end(pipeline, max(strength.end for strength in strengths))
        return
    unet = pipeline.unet
    with ExitStack() as hooks:
        hooks.callback(unet.register_forward_pre_hook(steering.before, with_kwargs=True).remove)
        hooks.callback(unet.register_forward_hook(steering.after).remove)
        if len(strengths) > 1:
            for number, adapter in enumerate(adapters_of(pipeline)):
                hooks.callback(adapter.register_forward_hook(steering.keeper(number)).remove)
        yield _end(pipeline, _ALL_CALLS)


def takes_end(pipeline: AdapterPipeline) -> bool:
    """Whether a call of the pipeline has an adapter_conditioning_factor: only SDXL's has."""
    return isinstance(pipeline, StableDiffusionXLAdapterPipeline)


def _end(pipeline: AdapterPipeline, factor: float) -> dict[str, float]:
    return {"adapter_conditioning_factor": factor} if takes_end(pipeline) else {}


def adapters_of(pipeline: AdapterPipeline) -> list[Any]:
    """Returns the pipeline's adapters: one, or those of its `MultiAdapter`."""
    adapter: Any = pipeline.adapter
    return list(adapter.adapters) if isinstance(adapter, MultiAdapter) else [adapter]


class _Steering:
    """The hooks of one call of the pipeline, and the number of calls of the UNet that it has made."""

    def __init__(self, pipeline: AdapterPipeline, sampling: SamplingOptions, strengths: Sequence[Strength]) -> None:
        self.pipeline, self.steps, self.strengths = pipeline, sampling.steps, strengths
        self.guidance = sampling.guidance
        self.controls = [_or(s.control_guidance, sampling.control_guidance) for s in strengths]
        self.schedules = [parse_schedule(_or(s.scale_schedule, sampling.scale_schedule)) for s in strengths]
        amplified = sorted({control for control in self.controls if control != 1})
        self.separates = sampling.control_passes == 3 and bool(amplified)
        self.control = amplified[0] if self.separates else 1.0
        self.has_negative = self.guidance > 1 and pipeline.unet.config.get("time_cond_proj_dim") is None
        if amplified and not self.separates and not self.has_negative:
            raise UserError(
                f"{amplified[0]:g}: this base takes guidance as a number and has no negative branch; set "
                f"{flag('control_passes')} 3.",
                option="control_guidance",
            )
        if self.separates and len(amplified) > 1:
            raise UserError(
                f"{' and '.join(f'{control:g}' for control in amplified)}: with {flag('control_passes')} 3 each "
                f"adapter has 1 or one common value; set {flag('control_passes')} 2 for different ones.",
                option="control_guidance",
            )
        self.periods = [(int(self.steps * s.start), int(self.steps * s.end)) for s in strengths]
        self.last = max(end for _, end in self.periods) if takes_end(pipeline) else self.steps
        """Steps of the call in which the pipeline itself gives the features to the UNet."""
        self.calls_in_all = count_calls(pipeline, self.steps)
        self.calls = 0
        """Calls of the UNet so far, the present one included."""
        self.added = 0
        """Rows that the present call has more than the pipeline gave."""
        self.features: dict[int, list[Tensor]] = {}
        """Each of several adapters' features, (B,D,h,w), before they are weighed and summed."""

    @property
    def is_needed(self) -> bool:
        starts, ends = zip(*self.periods, strict=True)
        return (
            any(control != 1 for control in self.controls)
            or any(self.schedules)
            or any(starts)
            or set(ends) != {self.last}
            or self.calls_in_all != self.steps
        )

    def keeper(self, number: int) -> Any:
        """Returns a hook that keeps the features of an adapter."""

        def keep(_adapter: Any, _inputs: Any, features: list[Tensor]) -> None:
            self.features[number] = list(features)  # the pipeline changes its own list

        return keep

    def before(self, _unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        """Changes the UNet's arguments of one call."""
        given, rows = kwargs[_FEATURES], len(args[0])
        step = self.calls * self.steps // self.calls_in_all
        self.calls += 1
        self.added = 0
        active = [number for number, (start, end) in enumerate(self.periods) if start <= step < end]
        if given is None or not active:
            return args, {**kwargs, _FEATURES: None}
        timestep = float(args[1])
        factors = [_factor(schedule, timestep) for schedule in self.schedules]
        positive = self._features(given, active, factors)
        if self.separates:
            # The pass that is added carries the adapters that are not amplified, and the others do so in all passes.
            plain = [number for number in active if self.controls[number] == 1]
            if len(plain) < len(active):
                self.added = rows // 2 if self.has_negative else rows
                args, kwargs = _with_first_rows(args, rows, self.added), _with_first_rows(kwargs, rows, self.added)
                first = (
                    self._features(given, plain, factors)
                    if plain
                    else [torch.zeros_like(feature) for feature in positive]
                )
                positive = [torch.cat([a[: self.added], b]) for a, b in zip(first, positive, strict=True)]
            return args, {**kwargs, _FEATURES: positive}
        if any(self.controls[number] != 1 for number in active):
            shares = [(self.guidance - control) / (self.guidance - 1) for control in self.controls]
            half = rows // 2
            if len({shares[number] for number in active}) == 1:
                negative = [feature[:half] * shares[active[0]] for feature in positive]
            else:
                weights = [share * factor for share, factor in zip(shares, factors, strict=True)]
                negative = [feature[:half] for feature in self._features(given, active, weights)]
            positive = [torch.cat([a, b[half:]]) for a, b in zip(negative, positive, strict=True)]
        return args, {**kwargs, _FEATURES: positive}

    def after(self, _unet: Any, _args: Any, output: Any) -> Any:
        """Changes the UNet's output of one step, (2B,4,h,w) in a tuple, into what the pipeline expects of it."""
        if not self.added:
            return output
        prediction, *others = output
        without, with_adapter = prediction[: self.added], prediction[self.added : 2 * self.added]
        if not self.has_negative:
            return (torch.lerp(without, with_adapter, self.control), *others)
        share = (self.control - 1) / (self.guidance - 1)
        negative = torch.lerp(with_adapter, without, share)
        return (torch.cat([negative, prediction[2 * self.added :]]), *others)

    def _features(self, given: list[Tensor], active: list[int], factors: list[float]) -> list[Tensor]:
        """Returns the sum of the features of the adapters that are `active`, each times its scale and its factor, for
        all rows. given: the sum over all adapters, without factors."""
        if len({factors[number] for number in active}) > 1:
            total = self._sum(active, [s.scale * factor for s, factor in zip(self.strengths, factors, strict=True)])
        else:
            is_all = len(active) == len(self.strengths)
            total = given if is_all else self._sum(active, [strength.scale for strength in self.strengths])
            factor = factors[active[0]]
            total = total if factor == 1 else [feature * factor for feature in total]
        return total

    def _sum(self, active: list[int], weights: list[float]) -> list[Tensor]:
        """Returns the weighted sum of several adapters' features, in the order and arithmetic of MultiAdapter."""
        total: list[Tensor] = []
        for number in active:
            weight = torch.tensor(weights[number])
            weighed = [weight * feature for feature in self.features[number]]
            total = [a + b for a, b in zip(total, weighed, strict=True)] if total else weighed
        return [torch.cat([feature] * 2) for feature in total] if self.has_negative else total


def count_calls(pipeline: AdapterPipeline, steps: int) -> int:
    """Returns how often the pipeline calls the UNet in so many steps: some schedulers need it twice a step."""
    scheduler: Any = pipeline.scheduler
    scheduler.set_timesteps(steps)
    return len(scheduler.timesteps)


def _factor(schedule: Sequence[tuple[int, float]], timestep: float) -> float:
    """Returns a schedule's factor at a timestep; 1 without a schedule."""
    return float(np.interp(timestep, [t for t, _ in schedule], [f for _, f in schedule])) if schedule else 1.0


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _with_first_rows(value: Any, rows: int, count: int) -> Any:
    """Repeats the first `count` rows of every batch of `rows` rows in front of it, in nested containers."""
    if isinstance(value, Tensor):
        return torch.cat([value[:count], value]) if value.ndim and len(value) == rows else value
    if isinstance(value, dict):
        return {key: item if key == _FEATURES else _with_first_rows(item, rows, count) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_first_rows(item, rows, count) for item in value)
    return value
