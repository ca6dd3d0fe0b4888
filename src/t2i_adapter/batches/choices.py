"""Builds the sample of one draw: makes its random choices (caption, timestep, noise, view) and fetches its records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from t2i_adapter.batches.order import AGAIN_STREAM, DRAW_STREAM, VIEW_STREAM, WEIGHTS_STREAM, Order
from t2i_adapter.cache.dataset import PairDataset
from t2i_adapter.cache.records import add_prefix
from t2i_adapter.config.tree import Config, DataOptions
from t2i_adapter.diffusion import timesteps
from t2i_adapter.errors import UserError
from t2i_adapter.types import ImageRecord, TextRecord

MAX_BAD_ROWS = 100
"""If this many consecutive rows cannot be read, the run ends: then the whole source is missing, not a few rows."""

SHARE_ALL, SHARE_NONE = 0.1, 0.1
"""With several adapters: shares of the samples that have all conditions, and none. In the rest each condition is there
with probability 0.5. CoAdapter and Uni-ControlNet (arXiv 2305.16322) train with these shares."""
WEIGHT_RANGE = 0.5, 1.5
"""With several adapters: range of the factor of a condition that is there, uniform."""


class Choices(NamedTuple):
    """The random choices of a draw.

    Attributes:
        caption: in [0,1), picks one of the sample's captions.
        drop: in [0,1); the caption is dropped if it is below the share of empty prompts.
        timestep: in [0,1), for the timestep sampler.
        noise: (4,h,w) float32 standard normal, plus the noise offset.
        latent_noise: (4,h,w) float32 standard normal, for the sample from the VAE's posterior.
    """

    caption: float
    drop: float
    timestep: float
    noise: np.ndarray
    latent_noise: np.ndarray


@dataclass(frozen=True)
class DrawnSample:
    """One sample of a batch: its number in the dataset, its records and its choices.

    Fields as in `types.PartialBatch`, with K noise samples on the first axis. `text` is None if `caption` is still to
    be encoded. `weights` has one number for each of several adapters, and is None if one is trained.
    """

    number: int
    record: ImageRecord
    text: TextRecord | None
    caption: str
    time_ids: tuple[int, ...]
    timesteps: tuple[int, ...]
    noise: np.ndarray
    latent_noise: np.ndarray
    bad: tuple[tuple[int, str], ...]
    weights: tuple[float, ...] | None = None


def choose(seed: int, draw: int, latent: tuple[int, int], noise_offset: float = 0.0, again: int = 0) -> Choices:
    """The choices of a draw, a function of (seed, draw, again). `again` counts further noise samples of the draw.

    The scalars are drawn first, so that they do not depend on the size. The noise offset is drawn even if it is 0, so
    that it changes no other choice.
    """
    key = [AGAIN_STREAM, seed, draw, again] if again else [DRAW_STREAM, seed, draw]
    generator = np.random.Generator(np.random.PCG64(key))
    caption, drop, timestep = generator.random(3)
    offset = generator.standard_normal((4, 1, 1), dtype=np.float32)
    noise, latent_noise = generator.standard_normal((2, 4, *latent), dtype=np.float32)
    if noise_offset:
        noise = noise + np.float32(noise_offset) * offset
    return Choices(float(caption), float(drop), float(timestep), noise, latent_noise)


def choose_view(seed: int, draw: int) -> tuple[float, int]:
    """The view, in [0,1), and the seed of the tags' order: a function of (seed, draw).

    They come from a stream of their own, because the view must be known before the size of the noise is.
    """
    generator = np.random.Generator(np.random.PCG64([VIEW_STREAM, seed, draw]))
    return float(generator.random()), int(generator.integers(2**63))


def choose_weights(seed: int, draw: int, count: int) -> tuple[float, ...]:
    """The factors of the features of `count` adapters, 0 for one that the sample leaves out: a function of (seed,
    draw).

    They come from a stream of their own, so that they change no other choice.
    """
    generator = np.random.Generator(np.random.PCG64([WEIGHTS_STREAM, seed, draw]))
    case, coins, factors = generator.random(), generator.random(count), generator.uniform(*WEIGHT_RANGE, count)
    if case < SHARE_ALL:
        is_there = np.ones(count, bool)
    elif case < SHARE_ALL + SHARE_NONE:
        is_there = np.zeros(count, bool)
    else:
        is_there = coins < 0.5
    return tuple(np.where(is_there, factors, 0.0).tolist())


def choose_caption(captions: Sequence[str], options: DataOptions, *, pick: float, drop: float, tags: int) -> str:
    """The caption of one draw; "" if it is dropped.

    Args:
        captions: the sample's, one or more.
        pick: in [0,1), picks one of them.
        drop: in [0,1); the caption is dropped if this is below `options.proportion_empty_prompts`.
        tags: seed of the tags' order.
    """
    if drop < options.proportion_empty_prompts:
        return ""
    caption = captions[int(pick * len(captions))]
    if options.shuffle_tags:
        caption = shuffle_tags(caption, options.keep_tags, tags)
    return add_prefix(caption, options.caption_prefix)


def shuffle_tags(caption: str, keep: int, seed: int) -> str:
    """The tags between a caption's commas, shuffled; the first `keep` stay in place."""
    tags = [tag for tag in map(str.strip, caption.split(",")) if tag]
    rest = np.random.default_rng(seed).permutation(len(tags[keep:]))
    return ", ".join([*tags[:keep], *(tags[keep + index] for index in rest)])


def draw_sample(
    dataset: PairDataset, order: Order, config: Config, draw: int, *, seed: int, num_timesteps: int
) -> DrawnSample:
    """The sample of draw `draw`. Raises UserError if its row cannot be read and may not be skipped."""
    has_choice = dataset.views > 1 or config.data.shuffle_tags
    view, tags = choose_view(seed, draw) if has_choice else (0.0, 0)
    number, record, captions, bad = _fetch(
        dataset, order, draw, int(view * dataset.views), seed=seed, skip=_may_skip(config)
    )
    height, width = record.condition.shape[-2:]
    latent, offset = (height // 8, width // 8), config.objective.noise_offset
    first, *_ = every = [choose(seed, draw, latent, offset, again) for again in range(config.train.noise_draws)]
    caption = choose_caption(captions, config.data, pick=first.caption, drop=first.drop, tags=tags)
    quantiles = [choices.timestep for choices in every]
    if config.objective.stratify:
        quantiles = order.stratified(draw, quantiles)
    original_h, original_w, top, left, *target = record.geometry.time_ids()
    top, left = top + config.data.crops_coords_top_left_h, left + config.data.crops_coords_top_left_w
    return DrawnSample(
        number=number,
        record=record,
        text=dataset.text(caption),
        caption=caption,
        time_ids=(original_h, original_w, top, left, *target),
        timesteps=tuple(timesteps.sample(config.objective, quantile, num_timesteps) for quantile in quantiles),
        noise=_stacked([choices.noise for choices in every]),
        latent_noise=_stacked([choices.latent_noise for choices in every]),
        bad=bad,
        weights=choose_weights(seed, draw, count) if (count := len(config.adapter.compose)) else None,
    )


def _stacked(arrays: list[np.ndarray]) -> np.ndarray:
    """The arrays along a new first axis. A single array is not copied."""
    return np.stack(arrays) if len(arrays) > 1 else arrays[0][None]


def _may_skip(config: Config) -> bool:
    """With a cache, bad rows were skipped when it was prepared: a read error now is a fault of the cache."""
    return config.data.on_bad_sample == "skip" and config.data.cache == "none"


def _fetch(
    dataset: PairDataset, order: Order, draw: int, view: int, *, seed: int, skip: bool
) -> tuple[int, ImageRecord, tuple[str, ...], tuple[tuple[int, str], ...]]:
    """Number, record and captions of the draw's sample, or of the next readable sample of its group; and (number,
    reason) of the samples that were skipped."""
    group, index = order.place(draw)
    numbers = dataset.groups[group]
    bad: list[tuple[int, str]] = []
    for further in range(min(len(numbers), MAX_BAD_ROWS)):
        number = int(numbers[(index + further) % len(numbers)])
        try:
            return number, dataset.fetch(number, view, f"{seed}/{draw}"), dataset.captions(number), tuple(bad)
        except UserError as fault:
            if not skip:
                raise
            bad.append((number, str(fault)))
    raise UserError(f"{len(bad)} rows one after another cannot be read. The last of them: {bad[-1][1]}")
