"""Options of generating pictures, which `generate` and `evaluate` share. Importing this module loads no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import inf
from typing import Any, Literal

from t2i_adapter.config.read import allowed, option_types, read_value
from t2i_adapter.errors import UserError, flag, require
from t2i_adapter.types import MaxTokens

NO_SCHEDULE = "none"
"""The `scale_schedule` of an adapter that acts equally at every timestep."""
_ENTRY = re.compile(r"\s*([0-9]{1,6})\s*:\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How pictures are sampled, for every prompt and condition. Every option has a value."""

    steps: int = 30
    """Denoising steps (Euler ancestral)."""
    guidance: float = 5.0
    """Classifier-free guidance scale; 1 or less turns guidance off."""
    scale: float = 1.0
    """Weight of the adapter's features: 0 is the base alone, 1 is as in training."""
    condition_start: float = 0.0
    """Share of the steps, counted from the first, in which the adapter does not act yet; 0 to 1."""
    condition_factor: float = 1.0
    """Share of the steps, counted from the first, after which the adapter acts no more; 0 to 1."""
    control_guidance: float = 1.0
    """Guidance scale of the condition: how strongly guidance amplifies it. 1 is the diffusers pipeline; as large as
    `guidance` means that the negative branch carries no adapter."""
    control_passes: Literal[2, 3] = 2
    """UNet passes of a step. 2: the negative branch carries a share of the adapter. 3: one pass more, without prompt
    and adapter, separates the two guidances."""
    scale_schedule: str = NO_SCHEDULE
    """Factors of `scale` at training timesteps, for example 187:0.8,937:1.1; linear between them, constant outside.
    `none` is 1 everywhere."""
    batch_size: int | None = None
    """Pictures generated at a time; None takes as many as 512 x 512 pixels hold. It does not change the pictures."""

    def __post_init__(self) -> None:
        require("steps", self.steps >= 1, self.steps, "1 or more")
        require("guidance", 0 <= self.guidance < inf, self.guidance, "allowed is 0 or more")
        require("scale", 0 <= self.scale < inf, self.scale, "allowed is 0 or more")
        for name, share in (("condition_start", self.condition_start), ("condition_factor", self.condition_factor)):
            require(name, 0 <= share <= 1, share, "allowed is a share from 0 to 1")
        start, end = self.condition_start, self.condition_factor
        require(
            "condition_start", start <= end, start, f"allowed is 0 to {end}, the value of {flag('condition_factor')}"
        )
        require("batch_size", self.batch_size is None or self.batch_size >= 1, self.batch_size, "1 or more")
        parse_schedule(self.scale_schedule)
        self._check_control()

    def _check_control(self) -> None:
        """Raises UserError unless `guidance` leaves a negative branch that can carry less of the adapter."""
        control, text = self.control_guidance, self.guidance
        require("control_guidance", 0 <= control < inf, control, "allowed is 0 or more")
        require("control_passes", self.control_passes in (2, 3), self.control_passes, "allowed is 2 or 3")
        if control == 1 or self.control_passes == 3:
            return
        if text <= 1:
            raise UserError(
                f"{control:g} acts on the negative branch, which {flag('guidance')} {text:g} turns off; set "
                f"{flag('guidance')} above 1 or {flag('control_passes')} 3.",
                option="control_guidance",
            )
        if control > text:
            raise UserError(
                f"{control:g}: allowed is 0 to {text:g}, the value of {flag('guidance')}; for more set "
                f"{flag('control_passes')} 3.",
                option="control_guidance",
            )

    @property
    def strength(self) -> Strength:
        """The adapter's strength over the steps."""
        return Strength(
            scale=self.scale,
            start=self.condition_start,
            end=self.condition_factor,
            control_guidance=self.control_guidance,
            scale_schedule=self.scale_schedule,
        )


@dataclass(frozen=True, kw_only=True)
class Strength:
    """How strongly one of several adapters acts, and in which steps.

    Attributes:
        scale: weight of its features.
        start, end: shares of the steps, counted from the first, between which it acts.
        control_guidance, scale_schedule: as in `SamplingOptions`; None takes those of the sampling.
    """

    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    control_guidance: float | None = None
    scale_schedule: str | None = None


def parse_schedule(text: str) -> tuple[tuple[int, float], ...]:
    """Returns the (timestep, factor) entries of "187:0.8,937:1.1" in rising order; none of `NO_SCHEDULE`.

    Raises UserError.
    """
    if text == NO_SCHEDULE:
        return ()
    entries: dict[int, float] = {}
    for part in text.split(","):
        found = _ENTRY.fullmatch(part)
        if found is None:
            raise UserError(
                f"{text!r}: {part!r} is not timestep:factor with a whole timestep and a factor of 0 or more; allowed "
                f"is text such as 187:0.8,937:1.1, or {NO_SCHEDULE}.",
                option="scale_schedule",
            )
        timestep, factor = int(found[1]), float(found[2])
        if timestep in entries:
            raise UserError(f"{text!r}: names timestep {timestep} twice; keep one.", option="scale_schedule")
        entries[timestep] = factor
    return tuple(sorted(entries.items()))


POINT = ("scale", "guidance", "control_guidance", "control_passes", "condition_factor", "scale_schedule")
"""Options that an adapter's record may recommend, under `sampling`."""


@dataclass(frozen=True, kw_only=True)
class RequestedSampling:
    """How pictures are sampled, as a user asks for it. `settle` gives every option a value."""

    steps: int = 30
    """Denoising steps (Euler ancestral)."""
    guidance: float | None = None
    """Classifier-free guidance scale; 1 or less turns guidance off. None takes the adapter's recommended value or, if
    it has none, 5."""
    scale: float | None = None
    """Weight of the adapter's features: 0 is the base alone, 1 is as in training. None takes the adapter's recommended
    value, else 1."""
    condition_start: float = 0.0
    """Share of the steps, counted from the first, in which the adapter does not act yet; 0 to 1."""
    condition_factor: float | None = None
    """Share of the steps, counted from the first, after which the adapter acts no more; 0 to 1. None takes the
    adapter's recommended value, else 1."""
    control_guidance: float | None = None
    """Guidance scale of the condition: how strongly guidance amplifies it. 1 is the diffusers pipeline; as large as
    --guidance means that the negative branch carries no adapter. None takes the adapter's recommended value, else 1."""
    control_passes: Literal[2, 3] | None = None
    """UNet passes of a step. 2: the negative branch carries a share of the adapter. 3: one pass more, without prompt
    and adapter, separates the two guidances. None takes the adapter's recommended value, else 2."""
    scale_schedule: str | None = None
    """Factors of --scale at training timesteps, for example 187:0.8,937:1.1; linear between them, constant outside.
    `none` is 1 everywhere. None takes the adapter's recommended schedule, else `none`."""
    defaults: Literal["recommended", "plain"] = "recommended"
    """What None stands for in the options above: the adapter's recommended values, from its t2i_adapter.json, or the
    plain ones, which every adapter has."""
    batch_size: int | None = None
    """Pictures generated at a time; None takes as many as 512 x 512 pixels hold. It does not change the pictures."""

    def __post_init__(self) -> None:
        values = self._given()
        is_settled = self.defaults == "plain" or {"guidance", "control_passes"} <= values.keys()
        if not is_settled and values.get("control_passes", 2) == 2:
            values["control_passes"] = 3  # which allows every control_guidance: a record may allow it, too
        SamplingOptions(**values)

    def _given(self) -> dict[str, Any]:
        """Returns the options that have a value."""
        values = {f.name: getattr(self, f.name) for f in fields(SamplingOptions)}
        return {name: value for name, value in values.items() if value is not None}

    def settle(self, recommended: Mapping[str, Any]) -> SamplingOptions:
        """Returns the options with the given values, else those of `recommended`, else the plain ones.

        recommended: `sampling` of the adapter's record; keys that are not in `POINT` are skipped. Raises UserError.
        """
        advised = _read_point(recommended) if self.defaults == "recommended" else {}
        try:
            return SamplingOptions(**{**advised, **self._given()})
        except UserError as fault:
            if not advised:
                raise
            raise fault.within(
                f"the options given do not fit the adapter's recommended values, which {flag('defaults')} plain ignores"
            ) from None

    def not_given(self, recommended: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the values of `recommended` that the options take. Raises UserError."""
        advised = _read_point(recommended) if self.defaults == "recommended" else {}
        return {name: value for name, value in advised.items() if getattr(self, name) is None}

    def describe_point(self, recommended: Mapping[str, Any]) -> str | None:
        """Returns a line for the log if recommended values differ from the plain ones."""
        return describe_advice(self.not_given(recommended), self.settle(recommended))


def describe_advice(advised: Mapping[str, Any], taken: SamplingOptions) -> str | None:
    """Returns a line for the log if values that were advised and taken differ from the plain ones."""
    plain = SamplingOptions()
    values = {name: getattr(taken, name) for name in POINT if name in advised}
    changed = [f"{n} {v}" for n, v in values.items() if v == advised[n] and v != getattr(plain, n)]
    if not changed:
        return None
    return f"sampling: {', '.join(changed)}, as the adapter's record recommends (--defaults plain ignores it)"


def _read_point(recommended: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that a record recommends, each of its option's type. Raises UserError."""
    point: dict[str, Any] = {}
    for name, kind in option_types(SamplingOptions).items():
        if name not in POINT or name not in recommended:
            continue
        text = str(recommended[name])
        try:
            point[name] = read_value(text, kind)
        except ValueError:
            raise UserError(f"t2i_adapter.json: sampling.{name} is {text[:40]!r}; {allowed(kind, text)}.") from None
    return point


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The models that generate pictures, and where they run."""

    adapter: str
    """The adapter: its folder, or a hub id."""
    base: str | None = None
    """The text-to-image model: hub id, diffusers folder, single .safetensors file, or `nano`. None takes the
    one that the adapter was trained on, from its t2i_adapter.json."""
    base_config: str | None = None
    """Diffusers folder or hub id with the configs and tokenizers of a single-file base. None takes the one of the
    adapter's training or, if --base is given, guesses it from the file's keys."""
    base_revision: str | None = None
    """Hub revision of the base, if --base is given."""
    base_variant: str | None = None
    """Variant of the base's weight files, for example fp16, if --base is given."""
    base_vae: str | None = None
    """Another VAE for the base: hub id or folder. None takes the one of the adapter's training."""
    max_tokens: MaxTokens | None = None
    """Tokens of a prompt that are read; the rest is cut off. None takes what the adapter's training read or, if that is
    unknown, 75."""
    device: str = "auto"
    """Device to run on: cpu, cuda, cuda:1, xpu, mps, or auto, the first GPU that is found, else the CPU. Of several
    processes each takes the GPU of its own number."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the base; auto is fp16 on cuda and xpu and fp32 elsewhere. The VAE always runs in fp32."""
    offload: Literal["none", "model", "sequential"] = "none"
    """Keep only the running model on the GPU; `sequential` keeps only the running layer: less memory, but slower."""
    xformers: bool = False
    """xFormers' attention instead of torch's scaled dot product attention."""
