"""The strength of least loss at each noise level: on synthetic losses, and on the tiny base of both predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny import write_tiny_sdxl

from t2i_adapter.config.tree import AdapterOptions, BaseOptions
from t2i_adapter.diffusion.schedule import NoiseSchedule
from t2i_adapter.evaluation.bands import (
    STRENGTHS,
    fit_bands,
    fixed_noise,
    measure_losses,
    middle_timesteps,
    schedule_text,
)
from t2i_adapter.evaluation.metrics import Truth
from t2i_adapter.evaluation.pairs import Pair
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.encoders import LatentScale
from t2i_adapter.models.open import open_base

GRID = np.asarray(STRENGTHS)


def quadratic(best: float, *, pairs: int = 40, spread: float = 0.0, seed: int = 0) -> np.ndarray:
    """(N,A) losses whose lowest point is at `best`, or around it by `spread` from pair to pair; curves differ too."""
    choices = np.random.default_rng(seed)
    centres = best + spread * choices.normal(size=(pairs, 1))
    curves = choices.uniform(0.5, 2, (pairs, 1))
    return 0.2 + curves * (GRID - centres) ** 2


@pytest.mark.parametrize("best", [0.0, 0.31, 0.98, 1.2, 1.5])
def test_the_lowest_point_of_a_parabola_is_found(best: float) -> None:
    (band,) = fit_bands(quadratic(best)[:, None], [500])
    assert band.strength.mean == pytest.approx(best, abs=1e-9)
    assert band.strength.high - band.strength.low < 1e-9
    means = quadratic(best).mean(0)
    assert band.benefit.mean == pytest.approx(1 - means[STRENGTHS.index(1.0)] / means[0])
    assert band.best_benefit.mean == pytest.approx(1 - 0.2 / means[0])


def test_a_strength_beyond_the_measured_ones_stays_at_their_end() -> None:
    for best, end in ((-0.4, 0.0), (3.0, 1.5)):
        (band,) = fit_bands(quadratic(best)[:, None], [500])
        assert band.strength.mean == end


def test_the_interval_holds_the_true_strength() -> None:
    """The true ratio is the mean of the centres, weighted by the curves; both are independent here, so it is 0.8."""
    held = 0
    for seed in range(60):
        (band,) = fit_bands(quadratic(0.8, spread=0.15, seed=seed)[:, None], [500], seed)
        held += band.strength.low <= 0.8 <= band.strength.high
    assert 51 <= held <= 60


def test_a_factor_is_offered_only_where_the_interval_excludes_1() -> None:
    losses = np.stack([quadratic(0.98, spread=0.2), quadratic(0.4, spread=0.1)], axis=1)
    bands = fit_bands(losses, [187, 937])
    assert [band.factor for band in bands] == [1.0, pytest.approx(0.4, abs=0.05)]
    assert schedule_text(bands) == f"187:1,937:{bands[1].factor:g}"
    assert schedule_text(bands[:1]) is None


def test_bands_are_measured_in_their_middle() -> None:
    assert middle_timesteps(1000) == [62, 187, 312, 437, 562, 687, 812, 937]
    assert middle_timesteps(1000, 4) == [125, 375, 625, 875]


def test_the_noise_depends_on_all_bits_of_the_seed_and_on_the_timestep() -> None:
    ones = [fixed_noise(seed, t, (4, 8, 8)) for seed in (5, 6, 5 + 2**32, 2**62) for t in (62, 187)]
    assert all(not torch.equal(a, b) for n, a in enumerate(ones) for b in ones[:n])
    assert torch.equal(ones[0], fixed_noise(5, 62, (4, 8, 8)))


def make_pairs(count: int, size: int = 64) -> list[Pair]:
    choices = np.random.default_rng(0)

    def picture() -> Image.Image:
        return Image.fromarray(choices.integers(0, 256, (size, size, 3), np.uint8))

    truth = Truth(np.ones((size, size), bool))
    return [Pair(str(n), "a red circle", picture(), picture(), truth, "picture") for n in range(count)]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_losses_are_those_of_the_training_objective(prediction: str, tmp_path: Path) -> None:
    """Each loss, against an independent statement for one pair, timestep and strength at a time."""
    base = open_base(BaseOptions(name=str(write_tiny_sdxl(tmp_path / "base", prediction_type=prediction))))
    torch.manual_seed(1)
    adapter = build_adapter(AdapterOptions(), base.unet_config)
    pipeline: Any = base.pipeline(adapter, "cpu", torch.float32)
    pairs, seeds, timesteps, strengths = make_pairs(3), [5, 6, 7], [187, 937], (0.0, 0.5, 1.0)
    states, pooled = base.text_encoder("cpu", torch.float32).encode([pair.prompt for pair in pairs])
    losses = measure_losses(pipeline, pairs, states, pooled, seeds, timesteps, strengths=strengths)
    assert losses.shape == (3, 2, 3)
    again = measure_losses(pipeline, pairs[1:], states[1:], pooled[1:], seeds[1:], timesteps, strengths=strengths)
    assert np.allclose(again, losses[1:], rtol=1e-5), "a pair's noise does not depend on the other pairs"

    schedule, scale = NoiseSchedule.of(pipeline.scheduler), LatentScale.of(dict(pipeline.vae.config))
    target, condition = (
        torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
        for picture in (pairs[1].target, pairs[1].condition)
    )
    with torch.no_grad():
        latents = (pipeline.vae.encode(2 * target - 1).latent_dist.mean - scale.shift[0]) * scale.scale[0]
        for number, timestep in enumerate(timesteps):
            alpha, sigma = schedule.alphas[timestep], schedule.sigmas[timestep]
            noise = fixed_noise(seeds[1], timestep, (1, 4, 8, 8))
            for column, strength in enumerate(strengths):
                got = pipeline.unet(
                    alpha * latents + sigma * noise,
                    timestep,
                    encoder_hidden_states=states[1:2],
                    added_cond_kwargs={
                        "text_embeds": pooled[1:2],
                        "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]]),
                    },
                    down_intrablock_additional_residuals=[strength * f for f in pipeline.adapter(condition)],
                ).sample
                goal = noise if prediction == "epsilon" else alpha * noise - sigma * latents
                assert losses[1, number, column] == pytest.approx(float(((got - goal) ** 2).mean()), rel=1e-4)
