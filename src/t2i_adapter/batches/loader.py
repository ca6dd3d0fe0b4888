"""The micro-batches of one process, in order, built by loader workers."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from t2i_adapter.batches.item import Item, make_item
from t2i_adapter.batches.order import Order, draws_of
from t2i_adapter.batches.packing import PREFETCH, Packed, SharedSlots, pack, unpack
from t2i_adapter.cache.dataset import PairDataset
from t2i_adapter.config.tree import Config
from t2i_adapter.errors import UserError
from t2i_adapter.types import PartialBatch

CPU = torch.device("cpu")


def make_partial_batches(
    facts: PairDataset,
    config: Config,
    *,
    rank: int,
    world: int,
    start_step: int,
    num_timesteps: int,
    stop_step: int,
    device: torch.device = CPU,
) -> Iterator[PartialBatch]:
    """Yields (stop_step - start_step) * gradient_accumulation_steps micro-batches, on the CPU, pinned where there is
    CUDA. They are the same for any number of workers, and a run that starts at step k gets what one that came there
    got. `config.train.seed` must be set. Raises UserError where a row cannot be read or a prepared file is damaged.

    device: where they will be trained on.
    """
    train = config.train
    accumulate = train.gradient_accumulation_steps
    plan = (
        draws_of(step, micro, rank, batch_size=train.batch_size, accumulate=accumulate, world=world)
        for step in range(start_step, stop_step)
        for micro in range(accumulate)
    )
    pin = torch.cuda.is_available()
    workers = count_workers(config.data.num_workers, device)
    loader = DataLoader(
        MicroBatches(facts, config, train.batch_size * accumulate * world, num_timesteps, pin=pin),
        batch_size=None,
        sampler=plan,  # any iterable of indices will do; ours are ranges of draws
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        collate_fn=_as_it_is,
        worker_init_fn=_leave_signals_to_the_trainer,
        generator=torch.Generator(),  # else it takes a number from torch's global generator
    )
    slots: dict[tuple[int, int], Tensor] = {}
    for packed in loader:
        if isinstance(packed, str):
            raise UserError(packed)
        yield unpack(packed, slots, pin=pin)


def count_workers(wanted: int | None, device: torch.device) -> int:
    """How many processes build batches for a device: `wanted`, or one, or on a CPU none."""
    if wanted is None:
        return 0 if device.type == "cpu" else 1
    return wanted


class MicroBatches(Dataset[Any]):
    """Indexed by a range of draws, gives their batch, or the message of a UserError: an exception that crosses a
    worker's border becomes a page of traceback."""

    def __init__(self, facts: PairDataset, config: Config, global_batch: int, num_timesteps: int, *, pin: bool) -> None:
        seed = config.train.seed
        assert seed is not None, "the seed is drawn before the run starts"
        self._facts = facts
        self._config = config
        self._seed = seed
        self._order = Order(facts.groups, facts.shards, seed, global_batch)
        self._num_timesteps = num_timesteps
        self._pin = pin
        self._slots: SharedSlots | None = None

    def __getitem__(self, draws: range) -> Packed | str:
        try:
            items = [self._item(draw) for draw in draws]
            return self._pack(items)
        except UserError as fault:
            return str(fault)

    def _item(self, draw: int) -> Item:
        return make_item(
            self._facts, self._order, self._config, draw, seed=self._seed, num_timesteps=self._num_timesteps
        )

    def _pack(self, items: list[Item]) -> Packed:
        worker = get_worker_info()
        if worker is None:
            return pack(items, pin=self._pin)
        if self._slots is None:
            self._slots = SharedSlots(worker.id)
        return self._slots.pack(items)


def _as_it_is(parts: Any) -> Any:
    return parts


def _leave_signals_to_the_trainer(_: int) -> None:
    """A scheduler signals every process of a job, and the step that is then finished still needs its batches. A worker
    ends with the process that it works for."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
