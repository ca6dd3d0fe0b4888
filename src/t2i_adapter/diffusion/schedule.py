"""The noise schedule of a variance-preserving model, as a table over timesteps.

x_t = alpha_t x_0 + sigma_t eps, with alpha_t^2 + sigma_t^2 = 1 (DDPM, 2006.11239, equation 4). Euler's input
x / sqrt(sigma^2 + 1), in its own sigma = sigma_t / alpha_t, is this same x_t, and stays finite where alpha_t is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import EulerDiscreteScheduler

Prediction = Literal["epsilon", "v_prediction"]
"""Euler ancestral steps, with which adapters are used, know these two and not `sample`."""


@dataclass(frozen=True)
class NoiseSchedule:
    """Tables (T,) float32 of alpha_t and sigma_t, and what the model predicts."""

    alphas: Tensor
    sigmas: Tensor
    prediction: Prediction

    @classmethod
    def of(cls, scheduler: EulerDiscreteScheduler) -> NoiseSchedule:
        """Reads the diffusers scheduler of a base, whose file models/scheduler.py has checked."""
        prediction = scheduler.config["prediction_type"]
        assert prediction in get_args(Prediction), prediction
        cumulative = scheduler.alphas_cumprod.double()
        if scheduler.config.get("rescale_betas_zero_snr"):
            # diffusers stores 2^-24 at the last step, so that its sigma stays finite; the schedule itself ends at 0.
            cumulative[-1] = 0.0
        return cls(cumulative.sqrt().float(), (1 - cumulative).sqrt().float(), prediction)

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        return NoiseSchedule(self.alphas.to(device), self.sigmas.to(device), self.prediction)

    def at(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at timesteps (B,), each (B,1,1,1)."""
        return self.alphas[timesteps].view(-1, 1, 1, 1), self.sigmas[timesteps].view(-1, 1, 1, 1)

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2 at timesteps (B,), (B,)."""
        return (self.alphas[timesteps] / self.sigmas[timesteps]) ** 2
