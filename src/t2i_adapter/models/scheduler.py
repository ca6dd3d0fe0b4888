"""Checks a base's scheduler file, which states the noise schedule that the base was trained with.

Many schedulers of diffusers sample from one process, DDPM (2006.11239), in different ways. They read its variances from
the same keys. The other schedulers belong to other processes, such as EDM or flow matching, which training does not
follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

from t2i_adapter.diffusion.schedule import Prediction
from t2i_adapter.errors import UserError

DDPM_SCHEDULERS = (
    *("DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler", "DEISMultistepScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler"),
    *("EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler", "LMSDiscreteScheduler"),
    *("PNDMScheduler", "SASolverScheduler", "TCDScheduler", "UniPCMultistepScheduler"),
)
"""Classes whose process is DDPM with the betas of `trained_betas`, or else of `beta_schedule`, `beta_start` and
`beta_end`."""


def check_class(name: object, where: str) -> None:
    """Raises UserError unless the scheduler's class is one of DDPM. where: the file that names the class."""
    if name not in DDPM_SCHEDULERS:
        named = f"the scheduler's class is {str(name)[:80]}" if name else "no class of a scheduler is named"
        raise UserError(
            f"{where}: {named}. Training follows DDPM's noise schedule only, which these classes have: "
            f"{', '.join(DDPM_SCHEDULERS)}. {_ADVICE}.",
            kind="schedule",
        )


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raises UserError unless the scheduler file's content states a schedule that training follows.

    Keys without which no schedule is known must be in the file, because their defaults differ from class to class.

    Args:
        where: the file's name, for the message.
    """
    check_class(config.get("_class_name"), where)
    checks = _CHECKS if config.get("trained_betas") is None else _CHECKS | _TRAINED_BETAS
    for key, (is_allowed, allowed) in checks.items():
        if not is_allowed(config.get(key), config):
            got = f"is {str(config[key])[:80]}" if key in config else "is missing"
            raise UserError(f"{where}: {key} {got}; allowed is {allowed}. {_ADVICE}.", kind="schedule")


def _is_beta(value: object) -> bool:
    return isinstance(value, float) and 0 < value < 1


def _are_betas(values: object, count: object) -> bool:
    return isinstance(values, list) and len(values) == count and all(map(_is_beta, values))


_ADVICE = "Use a base that was trained with DDPM's schedule"
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
_PREDICTIONS = get_args(Prediction)
_Checks = dict[str, tuple[Callable[[Any, Mapping[str, Any]], bool], str]]
"""Key -> whether its value (None if it is missing) is allowed, given all values; what is allowed, in words."""

_CHECKS: _Checks = {
    "num_train_timesteps": (lambda got, _: type(got) is int and 2 <= got <= 100_000, "a whole number, 2 to 100000"),
    # Files of the first releases of diffusers have no such key, and mean epsilon.
    "prediction_type": (lambda got, _: got in (None, *_PREDICTIONS), " or ".join(_PREDICTIONS)),
    "beta_schedule": (lambda got, _: got in _BETA_SCHEDULES, ", ".join(_BETA_SCHEDULES)),
    "beta_start": (lambda got, _: _is_beta(got), "a number between 0 and 1"),
    "beta_end": (lambda got, _: _is_beta(got), "a number between 0 and 1"),
    "rescale_betas_zero_snr": (lambda got, _: got in (None, False, True), "true or false"),
    "timestep_type": (lambda got, _: got in (None, "discrete"), "discrete"),
    "use_flow_sigmas": (lambda got, _: got in (None, False), "false, because training knows no flow matching"),
}
_TRAINED_BETAS: _Checks = {
    "trained_betas": (
        lambda got, config: _are_betas(got, config.get("num_train_timesteps")),
        "null, or num_train_timesteps numbers between 0 and 1",
    ),
    **{key: (lambda got, _: True, "") for key in ("beta_schedule", "beta_start", "beta_end")},
}
"""What `trained_betas` changes: it replaces the three other keys."""
