"""The data of a run: prepares it before training, and builds each rank's batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from t2i_adapter.batches.encoders import Encoders
from t2i_adapter.batches.loader import count_workers, make_partial_batches
from t2i_adapter.cache.context import PrepareContext, cache_place
from t2i_adapter.cache.dataset import CachedDataset, LiveDataset
from t2i_adapter.cache.prepare import prepare
from t2i_adapter.config.tree import Config
from t2i_adapter.data.bad_rows import BadRow, BadRows, list_bad_rows
from t2i_adapter.data.source import Source
from t2i_adapter.errors import UserError
from t2i_adapter.models.base import Base
from t2i_adapter.training.cpu.feeding import build_in_process
from t2i_adapter.training.data_record import DataCheck
from t2i_adapter.training.sharing import Group, find_group
from t2i_adapter.types import Batch, PartialBatch

BAD_SAMPLES = "bad_samples.jsonl"
"""In a run's folder: a line {"key", "reason"} for each skipped row."""


def prepare_data(
    config: Config,
    accelerator: Accelerator,
    base: Base,
    source: Source,
    dtype: torch.dtype,
    prompts: Sequence[str],
    check: DataCheck | None = None,
) -> CachedDataset | LiveDataset:
    """Encodes what the cache does not have, and returns the dataset; skipped rows are listed in the run's folder.

    dtype: arithmetic of the text encoders. prompts: captions to encode besides the source's and the empty one.
    check: compares the pictures with those of the checkpoint to resume from, before any is encoded. Raises UserError.
    """
    place = cache_place(config.data)
    if config.data.cache == "disk" or config.data.text_cache == "disk":
        group = find_group(accelerator, place)
    else:
        group = Group(accelerator.local_process_index, 1, "")  # nothing is stored
    context = PrepareContext(
        base,
        accelerator.device,
        dtype,
        place.root,
        rank=group.rank,
        world=group.world,
        run_id=group.run_id,
        mirror=place.mirror,
    )
    return prepare(
        source,
        config.data,
        context,
        in_channels=config.adapter.in_channels,
        extra_captions=("", *prompts),
        bad_list=Path(config.output_dir) / BAD_SAMPLES,
        check=check and check.check_pictures,
    )


def make_batches(
    dataset: CachedDataset | LiveDataset,
    config: Config,
    encoders: Encoders,
    accelerator: Accelerator,
    *,
    start_step: int,
    stop_step: int,
    num_timesteps: int,
) -> Iterator[Batch]:
    """This process's micro-batches from step `start_step` on, complete, on the device. Raises UserError."""
    partial_batches = make_partial_batches(
        dataset,
        config,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        start_step=start_step,
        stop_step=stop_step,
        num_timesteps=num_timesteps,
        device=accelerator.device,
    )

    def finish(built: Iterable[PartialBatch]) -> Iterator[Batch]:
        for partial in _listed(built, dataset, config):
            yield encoders.complete(to_device(partial, accelerator.device))

    if count_workers(config.data.num_workers, accelerator.device):
        yield from finish(partial_batches)
    else:
        yield from build_in_process(partial_batches, finish, ranks=accelerator.num_processes)


def _listed(
    partial_batches: Iterable[PartialBatch], dataset: CachedDataset | LiveDataset, config: Config
) -> Iterator[PartialBatch]:
    """The batches; rows that prove bad only now are listed in the run's folder. Raises UserError for too many."""
    bad = BadRows(config.data, len(dataset))
    for partial in partial_batches:
        for number, reason in partial.bad:
            if number not in bad.found:
                row = BadRow.of(dataset.source, int(dataset.numbers[number]), UserError(reason))
                list_bad_rows(Path(config.output_dir) / BAD_SAMPLES, [(row.key, row.reason)])
                bad.add(row._replace(number=number))
        yield partial


def to_device(partial: PartialBatch, device: torch.device) -> PartialBatch:
    """The batch with its tensors on the device; from pinned memory they are copied asynchronously."""
    moved = {name: _moved(value, device) for name, value in vars(partial).items() if isinstance(value, torch.Tensor)}
    return replace(partial, **moved)


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies an expanded grey condition as one channel and expands it on the device. torch would expand it first, in
    memory that is not pinned."""
    if tensor.ndim == 4 and tensor.stride(1) == 0:
        return tensor[:, :1].to(device, non_blocking=True).expand_as(tensor)
    return tensor.to(device, non_blocking=True)
