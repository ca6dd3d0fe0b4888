"""The schedulers of diffusers by the names that people use, each with the noise schedule of the base.

Importing this module loads no torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from t2i_adapter.errors import UserError, first_line, flag

KARRAS = "_karras"
"""Ending of a name that takes the noise levels of Karras et al. (2206.00364, eq. 5) instead of the base's timesteps."""


class Sampler(NamedTuple):
    """One of the schedulers.

    Attributes:
        kind: its class in diffusers.
        title: how A1111's web UI writes it in a picture's text.
        options: what it needs beside the base's schedule.
    """

    kind: str
    title: str
    options: Mapping[str, Any] = {}


DEFAULT = "euler_a"
SAMPLERS = {
    "euler_a": Sampler("EulerAncestralDiscreteScheduler", "Euler a"),
    "euler": Sampler("EulerDiscreteScheduler", "Euler"),
    "dpmpp_2m": Sampler("DPMSolverMultistepScheduler", "DPM++ 2M"),
    "dpmpp_2m_sde": Sampler("DPMSolverMultistepScheduler", "DPM++ 2M SDE", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_2s": Sampler("DPMSolverSinglestepScheduler", "DPM++ 2S"),
    "unipc": Sampler("UniPCMultistepScheduler", "UniPC"),
    "ddim": Sampler("DDIMScheduler", "DDIM"),
    "ddpm": Sampler("DDPMScheduler", "DDPM"),
    "heun": Sampler("HeunDiscreteScheduler", "Heun"),
    "dpm2": Sampler("KDPM2DiscreteScheduler", "DPM2"),
    "dpm2_a": Sampler("KDPM2AncestralDiscreteScheduler", "DPM2 a"),
    "lms": Sampler("LMSDiscreteScheduler", "LMS"),
    "pndm": Sampler("PNDMScheduler", "PLMS", {"skip_prk_steps": True}),
    "deis": Sampler("DEISMultistepScheduler", "DEIS"),
    "sa_solver": Sampler("SASolverScheduler", "SA Solver"),
    "lcm": Sampler("LCMScheduler", "LCM"),
    "tcd": Sampler("TCDScheduler", "TCD"),
}
_WITHOUT_KARRAS = {"euler_a", "ddim", "ddpm", "pndm", "lcm", "tcd"}
_ZERO_SNR = {"euler_a", "euler", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "ddim", "ddpm", "lcm", "tcd"}
"""Those that can rescale the betas to zero terminal SNR."""
_CLASSES = {sampler.kind: name for name, sampler in reversed(SAMPLERS.items())}
_LATENTS = {"clip_sample": False, "thresholding": False}
"""Latents are not pixels: some classes clip their prediction to [-1, 1] unless these options turn it off."""


def find_sampler(name: str) -> tuple[str, bool]:
    """Returns the short name, and whether Karras' noise levels are taken, of a short name or a class of diffusers.

    Raises UserError.
    """
    stem = name.removesuffix(KARRAS)
    short = _CLASSES.get(stem, stem)
    if short not in SAMPLERS:
        with_ending = [known for known in SAMPLERS if known not in _WITHOUT_KARRAS]
        raise UserError(
            f"{name}: no such scheduler; allowed are {', '.join(SAMPLERS)}, their classes in diffusers, and with the "
            f"ending {KARRAS} {', '.join(with_ending)}.",
            option="scheduler",
        )
    if stem != name and short in _WITHOUT_KARRAS:
        raise UserError(f"{name}: {short} has no other noise levels; write {short}.", option="scheduler")
    return short, stem != name


def sampler_title(name: str) -> str:
    """Returns what a picture's text says, as A1111's web UI writes it."""
    short, is_karras = find_sampler(name)
    return SAMPLERS[short].title + (" Karras" if is_karras else "")


def make_scheduler(name: str, config: Mapping[str, Any], steps: int = 1) -> Any:
    """Returns a scheduler with the noise schedule of a base.

    Args:
        name: as `find_sampler` takes it.
        config: of the base's scheduler, or of another one with its schedule.
        steps: steps that it is to make.

    Raises UserError if it cannot follow that schedule or make so many steps.
    """
    import diffusers

    short, is_karras = find_sampler(name)
    if config.get("rescale_betas_zero_snr") and short not in _ZERO_SNR:
        raise UserError(
            f"{name}: does not begin at pure noise, as this base was trained to (rescale_betas_zero_snr); allowed are "
            f"{', '.join(known for known in SAMPLERS if known in _ZERO_SNR)}.",
            option="scheduler",
        )
    options = {**_LATENTS, **SAMPLERS[short].options}
    if short not in _WITHOUT_KARRAS:
        options["use_karras_sigmas"] = is_karras
    kind: Any = getattr(diffusers, SAMPLERS[short].kind)
    known = inspect.signature(kind.__init__).parameters
    try:
        scheduler = kind(**{key: value for key, value in {**config, **options}.items() if key in known})
        scheduler.set_timesteps(steps)
    except ImportError as fault:
        raise UserError(
            f"{name}: needs the package scipy, which is not installed; `pip install scipy`, or choose another.",
            option="scheduler",
        ) from fault
    except ValueError as fault:
        raise UserError(
            f"{name}: cannot make {steps} steps ({first_line(fault)}); set other {flag('steps')}.", option="scheduler"
        ) from fault
    return scheduler
