"""Compares the mathematics of a training step with independent formulas, in float64 where possible."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler

from t2i_adapter.config.read import with_values
from t2i_adapter.config.tree import ObjectiveOptions
from t2i_adapter.diffusion import objective, timesteps
from t2i_adapter.diffusion.schedule import NoiseSchedule

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def schedule(prediction: str = "epsilon", zero_snr: bool = False) -> NoiseSchedule:
    return NoiseSchedule.of(EulerDiscreteScheduler(**SDXL, prediction_type=prediction, rescale_betas_zero_snr=zero_snr))


def draw(batch: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 4, 8, 8)
    steps = torch.tensor([0, 1, 250, 500, 900, 999])[:batch]
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator), steps


def test_tables_are_those_of_sdxl_computed_in_float64():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = np.sqrt(np.cumprod(1 - betas))
    ours = schedule()
    # diffusers forms its product of 1000 factors in float32: a few hundred roundings of 6e-8
    np.testing.assert_allclose(ours.alphas.numpy(), alphas, rtol=2e-5)
    np.testing.assert_allclose(ours.sigmas.numpy(), np.sqrt(1 - alphas**2), rtol=2e-5)


def test_noise_is_added_as_diffusers_does_for_ddpm_and_for_euler():
    latents, noise, steps = draw()
    ours = objective.add_noise(latents, noise, steps, schedule())
    ddpm = DDPMScheduler(**SDXL).add_noise(latents, noise, steps)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(ours, ddpm, rtol=1e-5, atol=1e-6)
    euler = EulerDiscreteScheduler(**SDXL)
    added = euler.add_noise(latents, noise, steps)
    sigmas = euler.sigmas[[int((euler.timesteps == t).nonzero()) for t in steps]].view(-1, 1, 1, 1)
    torch.testing.assert_close(ours, added / (sigmas**2 + 1).sqrt(), rtol=1e-5, atol=1e-5)


def test_loss_is_the_diffusers_scripts_loss():
    """The script computes x_0 from the prediction and weights its error by sigma^-2, with sigma = sigma_t / alpha_t."""
    latents, noise, steps = (t.double() if t.is_floating_point() else t for t in draw())
    table = schedule()
    alpha, sigma = (x.double() for x in table.at(steps))
    guess = torch.randn_like(noise)
    ratio = sigma / alpha
    rebuilt = (latents + ratio * noise) - ratio * guess
    theirs = (ratio**-2 * (rebuilt - latents) ** 2).flatten(1).mean(1)
    goal = objective.target(latents, noise, steps, table)
    ours = (guess - goal).square().flatten(1).mean(1)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    in_float32 = objective.losses(guess.float(), goal.float(), torch.ones(len(steps)))
    torch.testing.assert_close(in_float32.double(), theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_perfect_prediction_rebuilds_the_latents(prediction: str, zero_snr: bool):
    """For every prediction type, the right prediction determines x_0 and eps; this test solves for both."""
    latents, noise, steps = draw()
    table = schedule(prediction, zero_snr)
    noisy = objective.add_noise(latents, noise, steps, table)
    goal = objective.target(latents, noise, steps, table)
    alpha, sigma = table.at(steps)
    if prediction == "v_prediction":
        torch.testing.assert_close(alpha * noisy - sigma * goal, latents, rtol=0, atol=2e-6)
        torch.testing.assert_close(sigma * noisy + alpha * goal, noise, rtol=0, atol=2e-6)
    else:
        torch.testing.assert_close(noisy - sigma * goal, alpha * latents, rtol=0, atol=2e-6)


def test_zero_terminal_snr_ends_in_pure_noise():
    latents, noise, _ = draw(1)
    table = schedule("v_prediction", zero_snr=True)
    last = torch.tensor([999])
    assert table.alphas[-1] == 0 and table.sigmas[-1] == 1
    torch.testing.assert_close(objective.add_noise(latents, noise, last, table), noise, rtol=0, atol=0)
    torch.testing.assert_close(objective.target(latents, noise, last, table), -latents, rtol=0, atol=0)


def test_velocity_target_is_diffusers():
    latents, noise, steps = draw()
    theirs = DDPMScheduler(**SDXL).get_velocity(latents, noise, steps)  # pyright: ignore[reportArgumentType]
    ours = objective.target(latents, noise, steps, schedule("v_prediction"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weighs_the_error_in_x0_by_the_clipped_snr(prediction: str):
    """For an equal error in x_0, both prediction types must give an equal loss."""
    latents, noise, steps = draw()
    table = schedule(prediction)
    alpha, sigma = table.at(steps)
    wrong_latents = latents + 0.1
    wrong_noise = noise - alpha / sigma * 0.1  # the noise that, with the wrong latents, gives the same x_t
    answer = objective.target(wrong_latents, wrong_noise, steps, table)
    goal = objective.target(latents, noise, steps, table)
    got = objective.losses(answer, goal, objective.weights(steps, table, 5.0))
    expected = ((alpha / sigma) ** 2).flatten().clamp(max=5.0) * 0.01
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=0)  # differences of float32 numbers near 1, at t=0


def test_min_snr_is_finite_at_zero_terminal_snr():
    for prediction in ("epsilon", "v_prediction"):
        weight = objective.weights(torch.tensor([0, 999]), schedule(prediction, zero_snr=True), 5.0)
        assert torch.isfinite(weight).all()


GRID = (np.arange(100_000) + 0.5) / 100_000


def test_cubic_sampling_follows_its_distribution():
    """P(t < x T) = 1 - (1 - x)^(1/3), inverted from t = (1 - u^3) T; checked at 99 places on a fine grid of u."""
    draws = np.array([timesteps.sample(ObjectiveOptions(timesteps="cubic"), u, 1000) for u in GRID])
    for percent in range(1, 100):
        below = (draws < percent * 10).mean()
        assert below == pytest.approx(1 - (1 - percent / 100) ** (1 / 3), abs=2e-5)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.0, 0.5), (-0.7, 2.0)])
def test_logit_normal_sampling_follows_its_density(mean: float, std: float):
    """p(x) = exp(-(logit(x) - m)^2 / 2 s^2) / (s sqrt(2 pi) x (1 - x)) with x = t / T, integrated over 20 bins."""
    options = ObjectiveOptions(timesteps="logit_normal", logit_mean=mean, logit_std=std)
    draws = np.array([timesteps.sample(options, u, 1000) for u in GRID])
    x = (np.arange(1_000_000) + 0.5) / 1_000_000
    logit = np.log(x / (1 - x))
    density = np.exp(-((logit - mean) ** 2) / (2 * std**2)) / (std * np.sqrt(2 * np.pi) * x * (1 - x))
    expected = density.reshape(20, -1).mean(1) / 20
    assert expected.sum() == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(np.histogram(draws, 20, (0, 1000))[0] / len(draws), expected, atol=2e-4)


@pytest.mark.parametrize("name", ["cubic", "uniform", "logit_normal"])
def test_samplers_stay_in_range_and_reach_both_ends(name: str):
    options = with_values(ObjectiveOptions(), {"timesteps": name})
    ends = {timesteps.sample(options, u, 1000) for u in (0.0, 1e-12, 0.5, np.nextafter(1.0, 0.0), 1.0)}
    assert min(ends) == 0 and max(ends) == 999
