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


@contextmanager
def steer(pipeline: AdapterPipeline, sampling: SamplingOptions, strengths: Sequence[Strength]) -> Iterator[None]:
    """While it is open, one call of the pipeline applies what its own arguments cannot say.

    These are the control guidance, the schedule, and the steps of each adapter. The call has the scales of `strengths`
    as its adapter_conditioning_scale and, if the pipeline `takes_end`, their largest `end` as its
    adapter_conditioning_factor. If they say it all, no hook is set.

    Raises UserError.
    """
    steering = _Steering(pipeline, sampling, strengths)
    if not steering.is_needed:
        yield
        return
    unet = pipeline.unet
    with ExitStack() as hooks:
        hooks.callback(unet.register_forward_pre_hook(steering.before, with_kwargs=True).remove)
        hooks.callback(unet.register_forward_hook(steering.after).remove)
        if len(strengths) > 1:
            for number, adapter in enumerate(adapters_of(pipeline)):
                hooks.callback(adapter.register_forward_hook(steering.keeper(number)).remove)
        yield


def takes_end(pipeline: AdapterPipeline) -> bool:
    """Whether a call of the pipeline has an adapter_conditioning_factor: only SDXL's has."""
    return isinstance(pipeline, StableDiffusionXLAdapterPipeline)


def adapters_of(pipeline: AdapterPipeline) -> list[Any]:
    """Returns the pipeline's adapters: one, or those of its `MultiAdapter`."""
    adapter: Any = pipeline.adapter
    return list(adapter.adapters) if isinstance(adapter, MultiAdapter) else [adapter]


class _Steering:
    """The hooks of one call of the pipeline, and the number of steps that it has made."""

    def __init__(self, pipeline: AdapterPipeline, sampling: SamplingOptions, strengths: Sequence[Strength]) -> None:
        self.strengths, self.schedule = strengths, parse_schedule(sampling.scale_schedule)
        self.guidance, self.control = sampling.guidance, sampling.control_guidance
        self.separates = sampling.control_passes == 3 and self.control != 1
        self.has_negative = self.guidance > 1 and pipeline.unet.config.get("time_cond_proj_dim") is None
        if self.control != 1 and not self.separates and not self.has_negative:
            raise UserError(
                f"{self.control:g}: this base takes guidance as a number and has no negative branch; set "
                f"{flag('control_passes')} 3.",
                option="control_guidance",
            )
        self.periods = [(int(sampling.steps * s.start), int(sampling.steps * s.end)) for s in strengths]
        self.last = max(end for _, end in self.periods) if takes_end(pipeline) else sampling.steps
        """Steps of the call in which the pipeline itself gives the features to the UNet."""
        self.step = 0
        self.added = 0
        """Rows that the present step has more than the pipeline gave."""
        self.features: dict[int, list[Tensor]] = {}
        """Each of several adapters' features, (B,D,h,w), before they are weighed and summed."""

    @property
    def is_needed(self) -> bool:
        starts, ends = zip(*self.periods, strict=True)
        return self.control != 1 or bool(self.schedule) or any(starts) or set(ends) != {self.last}

    def keeper(self, number: int) -> Any:
        """Returns a hook that keeps the features of an adapter."""

        def keep(_adapter: Any, _inputs: Any, features: list[Tensor]) -> None:
            self.features[number] = list(features)  # the pipeline changes its own list

        return keep

    def before(self, _unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        """Changes the UNet's arguments of one step."""
        features = self._active_features(kwargs[_FEATURES])
        self.step += 1
        self.added = 0
        if features is None:
            return args, {**kwargs, _FEATURES: None}
        rows = len(args[0])
        if self.schedule:
            factor = float(np.interp(float(args[1]), [t for t, _ in self.schedule], [f for _, f in self.schedule]))
            features = [feature * factor for feature in features]
        if self.separates:
            self.added = rows // 2 if self.has_negative else rows
            args, kwargs = _with_first_rows(args, rows, self.added), _with_first_rows(kwargs, rows, self.added)
            features = [torch.cat([torch.zeros_like(feature[: self.added]), feature]) for feature in features]
        elif self.control != 1:
            share = (self.guidance - self.control) / (self.guidance - 1)
            half = rows // 2
            features = [torch.cat([feature[:half] * share, feature[half:]]) for feature in features]
        return args, {**kwargs, _FEATURES: features}

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

    def _active_features(self, given: list[Tensor] | None) -> list[Tensor] | None:
        """Returns the sum over the adapters that act in this step; None if none does. given: the sum over all."""
        active = [number for number, (start, end) in enumerate(self.periods) if start <= self.step < end]
        if given is None or not active:
            return None
        if len(active) == len(self.strengths):
            return given
        # In the order and arithmetic of MultiAdapter.
        total: list[Tensor] = []
        for number in active:
            weight = torch.tensor(self.strengths[number].scale)
            weighed = [weight * feature for feature in self.features[number]]
            total = [a + b for a, b in zip(total, weighed, strict=True)] if total else weighed
        return [torch.cat([feature] * 2) for feature in total] if self.has_negative else total


def _with_first_rows(value: Any, rows: int, count: int) -> Any:
    """Repeats the first `count` rows of every batch of `rows` rows in front of it, in nested containers."""
    if isinstance(value, Tensor):
        return torch.cat([value[:count], value]) if value.ndim and len(value) == rows else value
    if isinstance(value, dict):
        return {key: item if key == _FEATURES else _with_first_rows(item, rows, count) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_first_rows(item, rows, count) for item in value)
    return value
