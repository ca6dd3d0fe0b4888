"""The micro-batches of one process, in order, built by loader workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from t2i_adapter.batches.item import Item, make_item
from t2i_adapter.batches.order import draws_of
from t2i_adapter.cache.prepare import Prepared
from t2i_adapter.config import Config
from t2i_adapter.errors import UserError
from t2i_adapter.types import Batch


def make_batches(
    prepared: Prepared,
    config: Config,
    *,
    rank: int,
    world: int,
    start_step: int,
    num_timesteps: int,
    stop_step: int,
) -> Iterator[Batch]:
    """Yields (stop_step - start_step) * gradient_accumulation_steps micro-batches, on the CPU, pinned where there is
    CUDA. They are the same for any number of workers, and a run that starts at step k gets what one that came there
    got. `config.train.seed` must be set. Raises UserError where a prepared file is damaged."""
    seed = config.train.seed
    assert seed is not None, "the seed is drawn before the run starts"
    train = config.train
    accumulate = train.gradient_accumulation_steps
    plan = (
        draws_of(step, micro, rank, batch_size=train.batch_size, accumulate=accumulate, world=world)
        for step in range(start_step, stop_step)
        for micro in range(accumulate)
    )
    loader = DataLoader(
        MicroBatches(prepared, config, seed, num_timesteps),
        batch_size=None,
        sampler=plan,  # any iterable of indices will do; ours are ranges of draws
        num_workers=config.data.num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else it takes a number from torch's global generator
    )
    for parts in loader:
        if isinstance(parts, str):
            raise UserError(parts)
        yield Batch(**{**parts, "keys": tuple(parts["keys"])})


class MicroBatches(Dataset[Any]):
    """Indexed by a range of draws, gives the fields of their batch, or the message of a UserError: an exception that
    crosses a worker's border becomes a page of traceback."""

    def __init__(self, prepared: Prepared, config: Config, seed: int, num_timesteps: int) -> None:
        self._prepared = prepared
        self._config = config
        self._seed = seed
        self._num_timesteps = num_timesteps

    def __getitem__(self, draws: range) -> dict[str, Any] | str:
        try:
            return collate([self._item(draw) for draw in draws])
        except UserError as fault:
            return str(fault)

    def _item(self, draw: int) -> Item:
        return make_item(self._prepared, self._config, draw, seed=self._seed, num_timesteps=self._num_timesteps)


def collate(items: list[Item]) -> dict[str, Any]:
    """The fields of `types.Batch`: everything float32 but time ids and timesteps, the condition in [0,1]."""

    def floats(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(item, name) for item in items])).float()

    return {
        "moments": floats("moments"),
        "condition": floats("condition").div_(255),
        "text": floats("text"),
        "pooled": floats("pooled"),
        "time_ids": torch.from_numpy(np.stack([item.time_ids for item in items])).long(),
        "timesteps": torch.tensor([item.timestep for item in items]),
        "noise": floats("noise"),
        "latent_noise": floats("latent_noise"),
        "keys": tuple(item.key for item in items),
    }
