"""One draw: a sample's facts, and every random choice made about them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from t2i_adapter.batches.captions import told
from t2i_adapter.batches.order import AGAIN_STREAM, DRAW_STREAM, VIEW_STREAM, Order
from t2i_adapter.cache.dataset import PairDataset
from t2i_adapter.config.tree import Config
from t2i_adapter.diffusion import timesteps
from t2i_adapter.errors import UserError
from t2i_adapter.types import ImageRecord, TextRecord

MAX_BAD_ROWS = 100
"""So many rows one after another that cannot be read are no bad rows but a source that is gone."""


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
    """One sample of a batch; fields as in `types.PartialBatch`, K noise samples on the first axis."""

    record: ImageRecord
    text: TextRecord | None
    caption: str
    time_ids: tuple[int, ...]
    timesteps: tuple[int, ...]
    noise: np.ndarray
    latent_noise: np.ndarray
    bad: tuple[tuple[int, str], ...]


def choose(seed: int, draw: int, latent: tuple[int, int], noise_offset: float = 0.0, again: int = 0) -> Choices:
    """A function of (seed, draw, again) alone: `again` counts a sample's further draws of noise. The scalars are drawn
    first, so that they are the same at any size, and the offset even where it is 0, so that it changes nothing else."""
    key = [AGAIN_STREAM, seed, draw, again] if again else [DRAW_STREAM, seed, draw]
    generator = np.random.Generator(np.random.PCG64(key))
    caption, drop, timestep = generator.random(3)
    offset = generator.standard_normal((4, 1, 1), dtype=np.float32)
    noise, latent_noise = generator.standard_normal((2, 4, *latent), dtype=np.float32)
    if noise_offset:
        noise = noise + np.float32(noise_offset) * offset
    return Choices(float(caption), float(drop), float(timestep), noise, latent_noise)


def choose_view(seed: int, draw: int) -> tuple[float, int]:
    """Which view, in [0,1), and the seed of the tags' order: a function of (seed, draw), from a stream of its own,
    since the view must be known before the latent's size is."""
    generator = np.random.Generator(np.random.PCG64([VIEW_STREAM, seed, draw]))
    return float(generator.random()), int(generator.integers(2**63))


def make_item(facts: PairDataset, order: Order, config: Config, draw: int, *, seed: int, num_timesteps: int) -> Item:
    """The item that draw `draw` of the run gives. Raises UserError where its row cannot be read and may not be
    skipped."""
    has_choice = facts.views > 1 or config.data.shuffle_tags
    view, tags = choose_view(seed, draw) if has_choice else (0.0, 0)
    fetched = _fetch(facts, order, draw, int(view * facts.views), seed=seed, skip=_may_skip(config))
    record, captions, bad = fetched
    height, width = record.condition.shape[-2:]
    latent, offset = (height // 8, width // 8), config.objective.noise_offset
    first, *_ = every = [choose(seed, draw, latent, offset, again) for again in range(config.train.noise_draws)]
    caption = told(captions, config.data, pick=first.caption, drop=first.drop, tags=tags)
    quantiles = [choices.timestep for choices in every]
    if config.objective.stratify:
        quantiles = order.stratified(draw, quantiles)
    original_h, original_w, top, left, *target = record.geometry.time_ids()
    top, left = top + config.data.crops_coords_top_left_h, left + config.data.crops_coords_top_left_w
    return Item(
        record=record,
        text=facts.text(caption),
        caption=caption,
        time_ids=(original_h, original_w, top, left, *target),
        timesteps=tuple(timesteps.sample(config.objective, quantile, num_timesteps) for quantile in quantiles),
        noise=_stacked([choices.noise for choices in every]),
        latent_noise=_stacked([choices.latent_noise for choices in every]),
        bad=bad,
    )


def _stacked(arrays: list[np.ndarray]) -> np.ndarray:
    """One under another; one alone without a copy."""
    return np.stack(arrays) if len(arrays) > 1 else arrays[0][None]


def _may_skip(config: Config) -> bool:
    """With a cache bad rows were found and left out before; what cannot be read now is the cache itself."""
    return config.data.on_bad_sample == "skip" and config.data.cache == "none"


def _fetch(
    facts: PairDataset, order: Order, draw: int, view: int, *, seed: int, skip: bool
) -> tuple[ImageRecord, tuple[str, ...], tuple[tuple[int, str], ...]]:
    """Record and captions of the draw's sample, or where it cannot be read of the next of its group that can; and
    (number, reason) of those that were passed over."""
    group, index = order.place(draw)
    numbers = facts.groups[group]
    bad: list[tuple[int, str]] = []
    for further in range(min(len(numbers), MAX_BAD_ROWS)):
        number = int(numbers[(index + further) % len(numbers)])
        try:
            return facts.fetch(number, view, f"{seed}/{draw}"), facts.captions(number), tuple(bad)
        except UserError as fault:
            if not skip:
                raise
            bad.append((number, str(fault)))
    raise UserError(f"{len(bad)} rows one after another cannot be read, the last of them: {bad[-1][1]}")
