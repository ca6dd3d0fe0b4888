"""Options for several adapters at once: the n-th value of a list belongs to the n-th adapter, one value to all.

Importing this module loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from t2i_adapter.errors import UserError, flag, require
from t2i_adapter.generation.options import ModelOptions, RequestedSampling, SamplingOptions, describe_advice
from t2i_adapter.models.distilled import BaseAdvice

T = TypeVar("T")

EACH = ("scale", "condition_start", "condition_factor", "control_guidance", "scale_schedule")
"""Options of sampling that each adapter has its own value of."""


@dataclass(frozen=True, kw_only=True)
class SeveralAdapters(ModelOptions, RequestedSampling):
    """Adapters that act together, and how pictures are sampled with them."""

    adapter: tuple[str, ...]  # pyright: ignore[reportIncompatibleVariableOverride]
    """The adapter: its folder, or a hub id. Several act together; their features are summed."""
    steps: int | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Denoising steps. None takes what a base for few steps is made for, else 30."""
    scale: tuple[float, ...] = ()  # pyright: ignore[reportIncompatibleVariableOverride]
    """Weight of the adapter's features: 0 is the base alone, 1 is as in training. One value for each adapter, or one
    for all; so for the next three options and --scale_schedule. Empty takes the adapter's recommended value, else 1."""
    condition_start: tuple[float, ...] = ()  # pyright: ignore[reportIncompatibleVariableOverride]
    """Share of the steps, counted from the first, in which the adapter does not act yet; 0 to 1. Empty is 0."""
    condition_factor: tuple[float, ...] = ()  # pyright: ignore[reportIncompatibleVariableOverride]
    """Share of the steps, counted from the first, after which the adapter acts no more; 0 to 1. Empty takes the
    adapter's recommended value, else 1."""
    control_guidance: tuple[float, ...] = ()  # pyright: ignore[reportIncompatibleVariableOverride]
    """Guidance scale of the condition: how strongly guidance amplifies it. 1 is the diffusers pipeline; as large as
    --guidance means that the negative branch carries no adapter. Empty takes the adapter's recommended value, else
    1."""
    scale_schedule: tuple[str, ...] = ()  # pyright: ignore[reportIncompatibleVariableOverride]
    """Factors of --scale at training timesteps, for example 187:0.8,937:1.1; linear between them, constant outside.
    `none` is 1 everywhere. Empty takes the adapter's recommended schedule, else `none`."""

    def __post_init__(self) -> None:
        assert not isinstance(self.adapter, str), "a tuple of adapters"
        require("adapter", bool(self.adapter), "()", "name one adapter or more")
        for name in EACH:
            self.check_count(name, getattr(self, name))
        for number in range(len(self.adapter)):
            self.requested(number)

    def check_count(self, name: str, values: Sequence[Any]) -> None:
        """Raises UserError unless there is no value, one, or one for each adapter."""
        if len(values) not in (0, 1, len(self.adapter)):
            raise UserError(
                f"{len(values)} values for {len(self.adapter)} of {flag('adapter')}; set one for each adapter, in "
                "their order, or a single one for all.",
                option=name,
            )

    def requested(self, number: int, **changes: Any) -> RequestedSampling:
        """Returns what is asked for of one of the adapters. Raises UserError."""
        values = {one.name: getattr(self, one.name) for one in fields(RequestedSampling)}
        values |= {name: of_adapter(values[name], number) for name in EACH}
        values |= changes
        # A default of RequestedSampling stands for None.
        return RequestedSampling(**{name: value for name, value in values.items() if value is not None})

    def model_options(self, number: int) -> ModelOptions:
        """Returns one of the adapters, and where it runs."""
        values = {one.name: getattr(self, one.name) for one in fields(ModelOptions)}
        return ModelOptions(**{**values, "adapter": self.adapter[number]})

    def settle_all(
        self, recommended: Sequence[Mapping[str, Any]], advice: BaseAdvice | None = None
    ) -> list[SamplingOptions]:
        """Returns the sampling with each adapter. All have the same steps, guidance and passes.

        Where an option has no value, the first adapter's record decides about what is common to all. `advice`, that of
        the base, goes before it. Raises UserError.

        Args:
            recommended: `sampling` of each adapter's record.
        """
        common: dict[str, Any] = {}
        if advice:
            common = {"steps": advice.steps} if self.steps is None else {}
            # A record that recommends a guidance measured it on its own base.
            is_measured = self.base is None and "guidance" in recommended[0]
            common |= {"guidance": advice.guidance} if self.guidance is None and not is_measured else {}
        first = self.requested(0, **common).settle(recommended[0])
        common = {"steps": first.steps, "guidance": first.guidance, "control_passes": first.control_passes}
        others = [self.requested(n, **common).settle(recommended[n]) for n in range(1, len(self.adapter))]
        return [first, *others]

    def describe_points(
        self, recommended: Sequence[Mapping[str, Any]], settled: Sequence[SamplingOptions]
    ) -> list[str]:
        """Returns a line for each adapter whose recommended values changed its sampling."""
        lines = []
        for number, (advised, taken) in enumerate(zip(recommended, settled, strict=True)):
            line = describe_advice(self.requested(number).not_given(advised), taken)
            if line:
                lines.append(f"{self.adapter[number]}: {line}" if len(self.adapter) > 1 else line)
        return lines


def of_adapter(values: Sequence[T], number: int) -> T | None:
    """Returns the value of one of the adapters: its own, the single one, or None if there is none."""
    return values[number % len(values)] if values else None
