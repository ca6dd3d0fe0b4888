"""A run's pairs: prepared before it, and made batches of on its way."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from t2i_adapter.batches.encoders import Encoders
from t2i_adapter.batches.loader import count_workers, make_partial_batches
from t2i_adapter.cache.context import PrepareContext
from t2i_adapter.cache.dataset import CachedDataset, LiveDataset
from t2i_adapter.cache.prepare import prepare
from t2i_adapter.config.tree import Config
from t2i_adapter.data.bad_rows import BadRow, BadRows, list_bad_rows
from t2i_adapter.data.source import Source
from t2i_adapter.errors import UserError
from t2i_adapter.files import cache_root
from t2i_adapter.models.base import Base
from t2i_adapter.types import Batch, PartialBatch

BURST = 8
"""Batches made at once where a thread of the trainer makes them."""
BAD_SAMPLES = "bad_samples.jsonl"
"""In a run's folder: a line {"key", "reason"} for each row left out."""


def prepare_data(
    config: Config, accelerator: Accelerator, base: Base, source: Source, dtype: torch.dtype, prompts: Sequence[str]
) -> CachedDataset | LiveDataset:
    """The run's pairs, what can be kept of them made and kept; rows left out are listed in the run's folder.

    dtype: arithmetic of the text encoders. prompts: captions to have besides the source's and the empty one.
    """
    run_id = [secrets.token_hex(8)]
    broadcast_object_list(run_id)
    context = PrepareContext(
        base,
        accelerator.device,
        dtype,
        cache_root(config.data.prepared_dir),
        # Each machine prepares for itself: they may not share a disk.
        rank=accelerator.local_process_index,
        world=int(os.environ.get("LOCAL_WORLD_SIZE") or accelerator.num_processes),
        run_id=run_id[0],
    )
    return prepare(
        source,
        config.data,
        context,
        in_channels=config.adapter.in_channels,
        extra_captions=("", *prompts),
        bad_list=Path(config.output_dir) / BAD_SAMPLES,
    )


def make_batches(
    facts: CachedDataset | LiveDataset,
    config: Config,
    encoders: Encoders,
    accelerator: Accelerator,
    *,
    start_step: int,
    stop_step: int,
    num_timesteps: int,
) -> Iterator[Batch]:
    """This process's micro-batches from step `start_step` on, complete, on the device. Raises UserError."""
    drafts = make_partial_batches(
        facts,
        config,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        start_step=start_step,
        stop_step=stop_step,
        num_timesteps=num_timesteps,
        device=accelerator.device,
    )
    has_workers = count_workers(config.data.num_workers, accelerator.device) > 0
    listed = _listed(drafts if has_workers else in_bursts(drafts), facts, config)
    batches = (encoders.complete(to_device(draft, accelerator.device)) for draft in listed)
    # Of several processes some abort at their end (SIGABRT) while such a thread is about.
    yield from batches if has_workers or accelerator.num_processes > 1 else one_ahead(batches)


def in_bursts(drafts: Iterable[PartialBatch]) -> Iterator[PartialBatch]:
    """The same, several made at once: each by itself finds the cores' caches full of the step's numbers, and takes
    longer."""
    source = iter(drafts)
    while True:
        burst: list[PartialBatch] = []
        try:
            burst.extend(islice(source, BURST))
        except UserError:  # not before those that were made
            yield from burst
            raise
        if not burst:
            return
        yield from burst


def one_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same, the next one made by a thread while the last is worked on."""
    with ThreadPoolExecutor(1, "batches") as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


def _listed(
    drafts: Iterable[PartialBatch], facts: CachedDataset | LiveDataset, config: Config
) -> Iterator[PartialBatch]:
    """The drafts; rows that turned out bad only now are listed. Raises UserError where there are too many."""
    bad = BadRows(config.data, len(facts))
    for draft in drafts:
        for number, reason in draft.bad:
            if number not in bad.found:
                row = BadRow.of(facts.source, int(facts.numbers[number]), UserError(reason))
                list_bad_rows(Path(config.output_dir) / BAD_SAMPLES, [(row.key, row.reason)])
                bad.add(row._replace(number=number))
        yield draft


def to_device(draft: PartialBatch, device: torch.device) -> PartialBatch:
    """The draft with its tensors on the device, copied without waiting where its memory is pinned."""
    moved = {name: _moved(value, device) for name, value in vars(draft).items() if isinstance(value, torch.Tensor)}
    return replace(draft, **moved)


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Channels that are views of one cross over as one: torch would spread them out first, in memory that is not
    pinned."""
    if tensor.ndim == 4 and tensor.stride(1) == 0:
        return tensor[:, :1].to(device, non_blocking=True).expand_as(tensor)
    return tensor.to(device, non_blocking=True)
