"""Builds a run's `Control`: prepares the pairs that it measures, their texts and the check of their conditions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from t2i_adapter.annotators.registry import Annotator
from t2i_adapter.batches.encoders import Encoders
from t2i_adapter.cache.context import PrepareContext, cache_place
from t2i_adapter.cache.dataset import CachedDataset
from t2i_adapter.cache.prepare import prepare
from t2i_adapter.cache.records import add_prefix
from t2i_adapter.config.tree import Config, OptimOptions
from t2i_adapter.data.pair import IMAGE_FILTER
from t2i_adapter.data.source import Source
from t2i_adapter.errors import UserError
from t2i_adapter.generation.condition import fit
from t2i_adapter.generation.options import SamplingOptions
from t2i_adapter.models.base import Base
from t2i_adapter.statistics import mean_interval
from t2i_adapter.training.control import PICTURE_STEPS, Control, PicturedPair, PictureTask
from t2i_adapter.training.gain import Gain
from t2i_adapter.training.held_out import HeldOut, some_of
from t2i_adapter.training.looks import LookPlan, plan_looks
from t2i_adapter.training.pictures import Pictures, text_states
from t2i_adapter.training.plan import Plan
from t2i_adapter.training.step import FrozenModel

MOST_CHECKED = 16
"""Pairs that are looked at if the condition is not read."""
LOW_RATE = 0.01
"""A learning rate below this share of the optimiser's usual one is named as a cause."""
USUAL_RATE = {"adamw": OptimOptions.lr, "adamw8bit": OptimOptions.lr, "muon": 10 * OptimOptions.lr}


@dataclass(frozen=True)
class Measured:
    """The pairs that a run measures, in the cache, and pairs of its training to compare them with."""

    pairs: CachedDataset
    seen: CachedDataset | None
    origin: Literal["held-out", "training"]


def make_look_plan(config: Config, plan: Plan, held_out: HeldOut, *, is_scored: bool) -> LookPlan:
    """When the run measures, from its length, its batch and its budget."""
    samples = plan.batch_size * plan.accumulate * config.train.noise_draws
    return plan_looks(
        plan.steps,
        samples,
        config.validation.budget,
        pairs=len(held_out.measured),
        picture_forwards=PICTURE_STEPS * (2 if config.validation.guidance > 1 else 1),
        columns=0 if config.adapter.compose else 2 if is_scored else 1,  # pictures show one condition
    )


def describe_looks(looks: LookPlan, held_out: HeldOut, budget: float) -> str:
    """A row for the plan."""
    if not looks.steps:
        why = "is off" if budget == 0 else f"needs a longer run than {budget:.0%} of this one pays for"
        return f"  {'control':<15}measuring it {why}"
    pictures = f", pictures of {looks.pictures} of them at {len(looks.picture_steps)}" if looks.pictures else ""
    return (
        f"  {'control':<15}measured {len(looks.steps)} times on {looks.pairs} pairs{pictures}, "
        f"for {budget:.0%} of the time\n  {'':<15}pairs: {held_out.line}"
    )


def prepare_measured(
    config: Config, held_out: HeldOut, count: int, base: Base, device: torch.device, dtype: torch.dtype
) -> Measured | None:
    """Encodes what the cache does not have of `count` pairs; None, with a printed line, if none of them can be used."""
    # One size and one crop, whatever the training takes: so another pair's condition fits.
    data = replace(
        config.data,
        cache="disk",
        text_cache="disk",
        buckets="none",
        crop="center",
        flip=False,
        views=1,
        on_bad_sample="skip",
        max_bad_share=0.5,
        shuffle_tags=False,
        part=None,
        on_missing="encode",
    )
    place = cache_place(config.data)

    def cached(source: Source) -> CachedDataset:
        context = PrepareContext(base, device, dtype, place.root, mirror=place.mirror, progress=False, quiet=True)
        dataset = prepare(source, data, context, in_channels=config.adapter.in_channels)
        assert isinstance(dataset, CachedDataset)
        return dataset

    try:
        pairs = cached(some_of(held_out.measured, count))
        seen = cached(some_of(held_out.seen, max(2, count // 2))) if held_out.seen else None
    except UserError as fault:
        print(f"Control is not measured: {fault}", flush=True)
        return None
    return Measured(pairs, seen, held_out.origin) if len(pairs) > 1 else None


def make_control(
    config: Config,
    plan: Plan,
    looks: LookPlan,
    measured: Measured,
    *,
    base: Base,
    frozen: FrozenModel,
    encoders: Encoders,
    pictures: Pictures,
    judge: Annotator | None,
    states: Callable[[CachedDataset, str], tuple[torch.Tensor, torch.Tensor]],
) -> Control | None:
    """The run's looks; None, with a printed line, if all conditions are equal.

    states: a prompt's text states, for pictures.
    """
    samples = plan.batch_size * config.train.noise_draws
    prefix = config.data.caption_prefix

    def gain(dataset: CachedDataset, *, captions: bool = True) -> Gain:
        device = frozen.schedule.alphas.device
        return Gain(
            dataset, frozen, encoders, device, caption_prefix=prefix, most_samples=samples, has_captions=captions
        )

    own = gain(measured.pairs)
    if own.others is None:
        print("Control is not measured: all held-out conditions are the same picture.", flush=True)
        return None
    task = _picture_task(config, looks, measured.pairs, own.others, base, pictures, judge, states)

    def find_causes(adapter: Any) -> list[str]:
        found = _rate_cause(config, plan) + _pair_causes(config, measured.pairs, judge)
        return found or _caption_cause(gain(measured.pairs, captions=False), adapter)

    def find_faults() -> list[str]:
        is_known = judge is None or measured.pairs.source.annotate is not None
        return [] if is_known else _pair_causes(config, measured.pairs, judge)

    return Control(
        looks,
        own,
        gain(measured.seen) if measured.seen and len(measured.seen) > 1 else None,
        task,
        keys=[measured.pairs.key(number) for number in range(len(measured.pairs))],
        origin=measured.origin,
        steps=plan.steps,
        budget=config.validation.budget,
        folder=Path(config.output_dir),
        find_causes=find_causes,
        find_faults=find_faults,
    )


def _picture_task(
    config: Config,
    looks: LookPlan,
    dataset: CachedDataset,
    others: Sequence[int],
    base: Base,
    pictures: Pictures,
    judge: Annotator | None,
    states: Callable[[CachedDataset, str], tuple[torch.Tensor, torch.Tensor]],
) -> PictureTask | None:
    count = min(looks.pictures, len(dataset))
    if count < 2 or config.adapter.compose:
        return None
    pairs = [_pictured(dataset, number, config) for number in range(count)]
    prompts = [pair.prompt for pair in pairs]
    records = {prompt: states(dataset, prompt) for prompt in {"", *prompts}}
    return PictureTask(
        pictures,
        pairs,
        text_states(prompts, records, zeros=base.zeros_for_empty_prompt),
        [_wrapped(others, number, count) for number in range(count)],
        judge,
        SamplingOptions(steps=PICTURE_STEPS, guidance=config.validation.guidance),
        list(range(count)),
        config.data.resolution,
    )


def _wrapped(others: Sequence[int], number: int, count: int) -> int:
    """The pair that lends its condition, among the first `count`."""
    return others[number] if others[number] < count else (number + 1) % count


def _pictured(dataset: CachedDataset, number: int, config: Config) -> PicturedPair:
    """A pair as training sees it."""
    side = config.data.resolution
    sample = dataset.source[int(dataset.numbers[number])]
    planes = dataset.fetch(number, 0, "look").condition
    condition = Image.fromarray(planes[0]) if len(planes) == 1 else Image.fromarray(np.moveaxis(planes, 0, 2).copy())
    prompt = add_prefix(sample.captions[0], config.data.caption_prefix)
    return PicturedPair(sample.key, prompt, condition, fit(sample.image, (side, side), IMAGE_FILTER))


# Causes -------------------------------------------------------------------------------------------------------------


def _rate_cause(config: Config, plan: Plan) -> list[str]:
    usual = USUAL_RATE[config.optim.name]
    if plan.lr >= LOW_RATE * usual:
        return []
    return [f"The learning rate is {plan.lr:g}, and {usual:g} is usual for {config.optim.name}."]


def _pair_causes(config: Config, dataset: CachedDataset, judge: Annotator | None) -> list[str]:
    from t2i_adapter.doctor.pairing import check_pairs  # imports cv2, 15 MB that most runs do not need

    if config.adapter.compose:
        return []  # a pair has several conditions; the run of each adapter alone has checked its own
    pairs = [_pictured(dataset, number, config) for number in range(min(MOST_CHECKED, len(dataset)))]
    found = check_pairs([pair.condition for pair in pairs], [pair.target for pair in pairs], judge)
    return list(found.values())


def _caption_cause(gain: Gain, adapter: Any) -> list[str]:
    """A sentence if the condition lowers the loss without the captions, as `gain` measures."""
    uses = mean_interval(((gain.other(adapter) - gain.right(adapter)) / gain.none(adapter).mean(0)).mean(1))
    if uses.low <= 0:
        return []
    return [
        f"The captions say it all: without them the loss is {uses.mean:.1%} lower with the right condition than with "
        f"another's ({uses.low:.1%} to {uses.high:.1%})."
    ]
