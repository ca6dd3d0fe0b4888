"""What the model is asked to predict, and how each sample's error counts. Legend: B batch, h,w latent cells."""

from __future__ import annotations

import torch
from torch import Tensor

from t2i_adapter.diffusion.schedule import NoiseSchedule


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
    """x_t = alpha_t x_0 + sigma_t eps. latents, noise (B,4,h,w) float32; timesteps (B,); returns (B,4,h,w)."""
    alpha, sigma = schedule.at(timesteps)
    return alpha * latents + sigma * noise


def target(latents: Tensor, noise: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
    """What a perfect model of the schedule's kind would answer, (B,4,h,w).

    epsilon: the noise. v_prediction: v = alpha eps - sigma x_0 (2202.00512, appendix D).
    """
    if schedule.prediction == "epsilon":
        return noise
    alpha, sigma = schedule.at(timesteps)
    return alpha * noise - sigma * latents


def weights(timesteps: Tensor, schedule: NoiseSchedule, min_snr_gamma: float | None) -> Tensor:
    """Each sample's weight, (B,). Min-SNR (2303.09556, section 3.4): min(snr, gamma), over what the target already has.

    Error in epsilon is snr times the error in x_0, error in v (snr + 1) times.
    """
    if min_snr_gamma is None:
        return torch.ones_like(timesteps, dtype=torch.float32)
    snr = schedule.snr(timesteps)
    clipped = snr.clamp(max=min_snr_gamma)
    if schedule.prediction == "epsilon":
        # At zero terminal SNR both vanish and the ratio's limit is 1.
        return torch.where(snr > 0, clipped / snr, 1.0)
    return clipped / (snr + 1)


def losses(prediction: Tensor, goal: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean squared error of each sample, (B,) float32.

    The diffusers script's sigma^-2 |x_t - sigma eps_hat - x_0|^2 equals |eps_hat - eps|^2; formed in bf16 it reads up
    to half too high at small t, so the error is taken here directly, in float32.
    """
    return weight * (prediction.float() - goal.float()).square().flatten(1).mean(1)
