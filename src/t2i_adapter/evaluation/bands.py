"""Measures how strong the adapter should be at each noise level, from the diffusion loss alone.

At fixed noise, the loss L(t, a) is measured with the adapter's features multiplied by a. The strength of least loss is
fitted for each timestep, with an interval over the pairs. Steps that share a timestep's strength form a schedule of
strengths, which pictures have to confirm: a lower loss is no proof of better pictures.

Letters: N pairs, T timesteps, A strengths; h, w latent cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t2i_adapter.devices import in_float64
from t2i_adapter.diffusion import objective
from t2i_adapter.diffusion.schedule import NoiseSchedule
from t2i_adapter.evaluation.pairs import Pair
from t2i_adapter.models.encoders import LatentEncoder, LatentScale, batch_size
from t2i_adapter.models.family import added_conditions
from t2i_adapter.statistics import ALPHA, Interval

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
"""Factors of the adapter's features; 0 is the base alone, 1 is as in training."""
BANDS = 8
"""Bands of equal width into which the timesteps are split; each is measured at its middle."""
_RESAMPLES = 2000


@dataclass(frozen=True)
class Band:
    """One noise level.

    Attributes:
        timestep: of the measurement, in training's numbers.
        losses: (A,) mean loss of each strength.
        strength: the strength of least loss.
        benefit: 1 - L(1) / L(0): the share of the loss that the adapter takes away at strength 1.
        best_benefit: 1 - L(strength) / L(0), at the fitted strength.
    """

    timestep: int
    losses: tuple[float, ...]
    strength: Interval
    benefit: Interval
    best_benefit: Interval

    @property
    def factor(self) -> float:
        """What the schedule multiplies the adapter's features by: 1 unless the interval of the strength excludes 1."""
        is_one = self.strength.low <= 1 <= self.strength.high
        return 1.0 if is_one else round(self.strength.mean, 2)

    def to_json(self) -> dict[str, Any]:
        return {
            "t": self.timestep,
            "losses": dict(zip(map(str, STRENGTHS), self.losses, strict=True)),
            "strength": self.strength.to_json(),
            "benefit": self.benefit.to_json(),
            "best_benefit": self.best_benefit.to_json(),
            "factor": self.factor,
        }


def schedule_text(bands: Sequence[Band]) -> str | None:
    """Returns the bands' factors as the option `scale_schedule` takes them; None if all are 1."""
    if all(band.factor == 1 for band in bands):
        return None
    return ",".join(f"{band.timestep}:{band.factor:g}" for band in bands)


def middle_timesteps(num_timesteps: int, bands: int = BANDS) -> list[int]:
    """Returns the middle timestep of each of `bands` bands: 62, 187, ... 937 for 8 bands of 1000 timesteps."""
    return [int((band + 0.5) * num_timesteps / bands) for band in range(bands)]


def fit_bands(losses: np.ndarray, timesteps: Sequence[int], seed: int = 0) -> list[Band]:
    """Fits the strength of least loss of each timestep.

    The fit is the parabola through the lowest mean loss and its two neighbours, and its lowest point; at an end of the
    strengths, that end. It is made of the means over the pairs, so a pair with a larger loss counts more (a ratio
    estimator). Intervals are percentile bootstrap intervals over the pairs, 95 %.

    Args:
        losses: (N,T,A) for the strengths STRENGTHS. seed: decides the resamples.
    """
    choices = np.random.default_rng(seed).integers(len(losses), size=(_RESAMPLES, len(losses)))
    bands = []
    for number, timestep in enumerate(timesteps):
        own = losses[:, number]  # (N,A)
        means = np.concatenate([own.mean(0)[None], own[choices].mean(1)])  # (1+R,A): the estimate, then the resamples
        strength, least = _lowest(means)
        without = means[:, STRENGTHS.index(0.0)]
        benefit = 1 - means[:, STRENGTHS.index(1.0)] / without
        bands.append(
            Band(
                timestep,
                tuple(means[0].tolist()),
                *(_interval(values) for values in (strength, benefit, 1 - least / without)),
            )
        )
    return bands


def _lowest(means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(R,A) losses -> (R,) the strength of least loss and (R,) the loss there."""
    grid = np.asarray(STRENGTHS)
    place = np.clip(means.argmin(1), 1, len(grid) - 2)
    rows = np.arange(len(means))
    left, middle, right = (means[rows, place + offset] for offset in (-1, 0, 1))
    step = grid[1] - grid[0]
    assert np.allclose(np.diff(grid), step), "the parabola needs strengths at equal distances"
    curve = left - 2 * middle + right  # second difference; above 0 around a minimum
    offset = np.where(curve > 0, (left - right) / (2 * np.where(curve > 0, curve, 1)), np.sign(left - right))
    offset = np.clip(offset, -1, 1)
    # The parabola through three equally spaced points, at `offset` steps from the middle one.
    least = middle + offset * (right - left) / 2 + offset**2 * curve / 2
    return grid[place] + offset * step, least


def _interval(values: np.ndarray) -> Interval:
    """values: (1+R,), the estimate and its resamples."""
    low, high = np.quantile(values[1:], [ALPHA / 2, 1 - ALPHA / 2])
    return Interval(float(values[0]), float(low), float(high))


@torch.no_grad()
def measure_losses(
    pipeline: Any,
    pairs: Sequence[Pair],
    states: Tensor,
    pooled: Tensor,
    seeds: Sequence[int],
    timesteps: Sequence[int],
    *,
    strengths: Sequence[float] = STRENGTHS,
    on_pairs: Callable[[int], object] = lambda count: None,
) -> np.ndarray:
    """Returns the diffusion loss of each pair, timestep and strength, (N,T,A) float64, at fixed noise.

    The noise of a pair and timestep is one sample from its seed; all strengths share it. Latents are the means of the
    VAE's moments. For an epsilon base the loss is the squared error in the noise, for a v base the one in v.

    Args:
        pipeline: an `AdapterPipeline`.
        states, pooled: (N,L,D) and (N,P), the states of the pairs' prompts.
        on_pairs: is called with the number of pairs after each batch.
    """
    device, unet = pipeline._execution_device, pipeline.unet
    schedule = NoiseSchedule.of(pipeline.scheduler).to(device)
    size = pairs[0].target.height, pairs[0].target.width
    mode = "L" if pipeline.adapter.config.in_channels == 1 else "RGB"
    encoder, scale = LatentEncoder(pipeline.vae, device), LatentScale.of(dict(pipeline.vae.config))
    count = batch_size(size[0] * size[1], device)
    losses = np.empty((len(pairs), len(timesteps), len(strengths)))
    for start in range(0, len(pairs), count):
        part = slice(start, min(start + count, len(pairs)))
        moments = encoder.encode(_pixels([pair.target for pair in pairs[part]]))
        latents = scale.sample(moments, torch.zeros_like(moments[:, :4]))
        conditions = _pixels([pair.condition.convert(mode) for pair in pairs[part]]).to(device, unet.dtype)
        features = pipeline.adapter(conditions)
        for number, timestep in enumerate(timesteps):
            times = torch.full((len(latents),), timestep, device=device)
            noise = torch.stack([fixed_noise(seed, timestep, latents.shape[1:]) for seed in seeds[part]]).to(device)
            noisy = objective.add_noise(latents, noise, times, schedule)
            goal = objective.target(latents, noise, times, schedule)
            for column, strength in enumerate(strengths):
                added = added_conditions(
                    pooled[part].to(device, unet.dtype),
                    torch.tensor([[*size, 0, 0, *size]] * len(latents), device=device),
                )
                prediction = unet(
                    noisy.to(unet.dtype),
                    times,
                    encoder_hidden_states=states[part].to(device, unet.dtype),
                    added_cond_kwargs=added,
                    down_intrablock_additional_residuals=[strength * feature for feature in features],
                    return_dict=False,
                )[0]
                found = objective.losses(prediction, goal, torch.ones(len(latents), device=device))
                losses[part, number, column] = in_float64(found).cpu().numpy()
        on_pairs(len(latents))
    return losses


def fixed_noise(seed: int, timestep: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of `shape`, a function of the seed and the timestep.

    A CPU generator of torch reads the low 32 bits of its seed only, so both numbers are mixed into these.
    """
    mixed = int(np.random.SeedSequence([seed, timestep]).generate_state(1)[0])
    return torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(mixed))


def _pixels(pictures: Sequence[Any]) -> Tensor:
    """N pictures -> (N,C,H,W) float32 in 0 to 1."""
    arrays = [np.atleast_3d(np.asarray(picture)) for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
