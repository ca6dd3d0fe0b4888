"""One draw: a sample's facts, and every random choice made about them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from t2i_adapter.batches.order import DRAW_STREAM, sample_of
from t2i_adapter.cache.prepare import Prepared
from t2i_adapter.config import Config
from t2i_adapter.diffusion import timesteps


@dataclass(frozen=True)
class Choices:
    """What chance decides about a draw.

    Attributes:
        caption: in [0,1), which of the sample's captions.
        drop: in [0,1), below the share of empty prompts the caption is dropped.
        timestep: in [0,1), for the timestep sampler.
        noise: (4,h,w) float32 standard normal, plus the noise offset.
        latent_noise: (4,h,w) float32 standard normal, the draw from the VAE's posterior.
    """

    caption: float
    drop: float
    timestep: float
    noise: np.ndarray
    latent_noise: np.ndarray


@dataclass(frozen=True)
class Item:
    """One sample of a batch; fields as in `types.Batch`, the condition still u8, moments and text still float16."""

    key: str
    moments: np.ndarray
    condition: np.ndarray
    text: np.ndarray
    pooled: np.ndarray
    time_ids: np.ndarray
    timestep: int
    noise: np.ndarray
    latent_noise: np.ndarray


def choose(seed: int, draw: int, latent: tuple[int, int], noise_offset: float = 0.0) -> Choices:
    """A function of (seed, draw) alone. The scalars are drawn first, so that they are the same at any size, and the
    offset is drawn even where it is 0, so that it changes nothing else."""
    generator = np.random.Generator(np.random.PCG64([DRAW_STREAM, seed, draw]))
    caption, drop, timestep = generator.random(3)
    offset = generator.standard_normal((4, 1, 1), dtype=np.float32)
    noise, latent_noise = generator.standard_normal((2, 4, *latent), dtype=np.float32)
    if noise_offset:
        noise = noise + np.float32(noise_offset) * offset
    return Choices(float(caption), float(drop), float(timestep), noise, latent_noise)


def make_item(prepared: Prepared, config: Config, draw: int, *, seed: int, num_timesteps: int) -> Item:
    """The item that draw `draw` of the run gives."""
    record = prepared[sample_of(draw, len(prepared), seed)]
    choices = choose(seed, draw, record.moments.shape[-2:], config.objective.noise_offset)
    caption = record.captions[int(choices.caption * len(record.captions))]
    if choices.drop < config.data.proportion_empty_prompts:
        caption = prepared.text_key("")
    text = prepared.text(caption)
    crop = (0, 0, config.data.crops_coords_top_left_h, config.data.crops_coords_top_left_w, 0, 0)
    return Item(
        key=record.key,
        moments=record.moments,
        condition=record.condition,
        text=text.states,
        pooled=text.pooled,
        time_ids=np.array(record.geometry.time_ids()) + np.array(crop),
        timestep=timesteps.sample(config.objective.timesteps, choices.timestep, num_timesteps),
        noise=choices.noise,
        latent_noise=choices.latent_noise,
    )
