"""How a base that was made for few steps is sampled, as far as its own files say so.

Files say it in three ways: a UNet that takes the guidance as a number (`time_cond_proj_dim`), the scheduler's class,
and the combination of SDXL-Turbo. A single-file base has no such files, and most Lightning and Hyper bases look like
SDXL.

Importing this module loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BaseAdvice:
    """How a base for few steps is sampled.

    Attributes:
        why: what in its files says so.
        scheduler: a short name of `generation.schedulers`; None is the default one.
    """

    why: str
    steps: int
    guidance: float
    scheduler: str | None = None

    def describe(self) -> str:
        """Returns a line for the log."""
        return f"base: made for few steps ({self.why}): steps {self.steps}, guidance {self.guidance:g}"


_TURBO_CELLS = 64
"""Latent cells of a side of SDXL-Turbo's pictures (512 pixels); SDXL has 128."""


def base_advice(unet: Mapping[str, Any], scheduler: Mapping[str, Any]) -> BaseAdvice | None:
    """Returns how a base is sampled whose configs say that it was made for few steps; None of any other.

    The numbers are those of the bases' own cards: LCM-SDXL, and SDXL-Turbo with up to 4 steps.
    """
    kind = scheduler.get("_class_name")
    if unet.get("time_cond_proj_dim") is not None:
        return BaseAdvice("its UNet takes the guidance as a number", 4, 8.0, "lcm")
    if kind in ("LCMScheduler", "TCDScheduler"):
        return BaseAdvice(f"its scheduler is {kind}", 4, 1.0, "lcm" if kind == "LCMScheduler" else "tcd")
    if _is_trailing(scheduler) and unet.get("sample_size") == _TURBO_CELLS:
        return BaseAdvice("its timesteps are trailing and its pictures 512 px, as of SDXL-Turbo", 4, 0.0)
    return None


def may_be_distilled(unet: Mapping[str, Any], scheduler: Mapping[str, Any]) -> str | None:
    """Returns a line for the log if a base may have been made for few steps, but its files do not say for how many."""
    if base_advice(unet, scheduler) or not _is_trailing(scheduler):
        return None
    return (
        "base: its timesteps are trailing, as of many bases for few steps (Lightning, Hyper). If it is one, set "
        "--steps to its number and --guidance 0"
    )


def _is_trailing(scheduler: Mapping[str, Any]) -> bool:
    """Whether the timesteps begin at the last one. Bases of zero terminal SNR do so too, with any number of steps."""
    is_plain = scheduler.get("prediction_type") in (None, "epsilon") and not scheduler.get("rescale_betas_zero_snr")
    return scheduler.get("timestep_spacing") == "trailing" and is_plain
