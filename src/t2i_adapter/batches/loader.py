"""Builds the micro-batches of one process in order, in loader processes (`data.num_workers`) or in this one."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from t2i_adapter.batches.choices import DrawnSample, draw_sample
from t2i_adapter.batches.order import Order, draws_of
from t2i_adapter.batches.packing import PREFETCH, Packed, SharedSlots, pack, unpack
from t2i_adapter.cache.dataset import PairDataset
from t2i_adapter.config.tree import Config
from t2i_adapter.devices import hardware_of
from t2i_adapter.errors import UserError
from t2i_adapter.types import PartialBatch

CPU = torch.device("cpu")


def make_partial_batches(
    dataset: PairDataset,
    config: Config,
    *,
    rank: int,
    world: int,
    start_step: int,
    num_timesteps: int,
    stop_step: int,
    device: torch.device = CPU,
) -> Iterator[PartialBatch]:
    """Yields (stop_step - start_step) * gradient_accumulation_steps micro-batches in CPU memory, pinned if the
    device copies from it.

    They do not depend on the number of workers, and a run that starts at step k gets the batches that an uninterrupted
    run gets from step k on. `config.train.seed` must be set. `device` is where they are trained on. Raises UserError if
    a row or a file of the cache cannot be read.
    """
    train = config.train
    accumulate = train.gradient_accumulation_steps
    plan = (
        draws_of(step, micro, rank, batch_size=train.batch_size, accumulate=accumulate, world=world)
        for step in range(start_step, stop_step)
        for micro in range(accumulate)
    )
    pin = hardware_of(device).can("pinned")
    workers = count_workers(config.data.num_workers, device)
    loader = DataLoader(
        MicroBatches(dataset, config, train.batch_size * accumulate * world, num_timesteps, pin=pin),
        batch_size=None,
        sampler=plan,  # DataLoader accepts any iterable of indices; ours are ranges of draws
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        collate_fn=_identity,
        worker_init_fn=partial(_ignore_signals, train.stop_signals),
        generator=torch.Generator(),  # otherwise it draws from torch's global generator
    )
    slots: dict[tuple[int, int], Tensor] = {}
    for packed in loader:
        if isinstance(packed, UserError):
            raise packed
        yield unpack(packed, slots, dataset.key, pin=pin)


def count_workers(wanted: int | None, device: torch.device) -> int:
    """Number of loader processes: `wanted`, or if that is None 1, and 0 if training is on a CPU."""
    if wanted is None:
        return 0 if device.type == "cpu" else 1
    return wanted


class MicroBatches(Dataset[Any]):
    """Maps a range of draws to their batch, or to a UserError, which the training process raises: DataLoader would
    turn an exception that a worker raises into a page of traceback."""

    def __init__(
        self, dataset: PairDataset, config: Config, global_batch: int, num_timesteps: int, *, pin: bool
    ) -> None:
        seed = config.train.seed
        assert seed is not None, "the seed is drawn before the run starts"
        self._dataset = dataset
        self._config = config
        self._seed = seed
        self._order = Order(dataset.groups, dataset.shards, seed, global_batch)
        self._num_timesteps = num_timesteps
        self._pin = pin
        self._slots: SharedSlots | None = None

    def __getitem__(self, draws: range) -> Packed | UserError:
        try:
            return self._pack([self._sample(draw) for draw in draws])
        except UserError as fault:
            return fault

    def _sample(self, draw: int) -> DrawnSample:
        return draw_sample(
            self._dataset, self._order, self._config, draw, seed=self._seed, num_timesteps=self._num_timesteps
        )

    def _pack(self, samples: list[DrawnSample]) -> Packed:
        worker = get_worker_info()
        if worker is None:
            return pack(samples, pin=self._pin)
        if self._slots is None:
            self._slots = SharedSlots(worker.id)
        return self._slots.pack(samples)


def _identity(parts: Any) -> Any:
    return parts


def _ignore_signals(names: Sequence[str], _: int) -> None:
    """Schedulers signal every process of a job, but the training process still needs batches to finish its step. A
    worker ends with the training process."""
    for name in names:
        signal.signal(signal.Signals[f"SIG{name}"], signal.SIG_IGN)
