"""Many things done one after another: ahead, in batches, with a bar, and shared with other processes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from t2i_adapter.cache.shards import Shards
from t2i_adapter.errors import UserError
from t2i_adapter.models.base import Base

PATIENCE_SECONDS = 1800.0
"""How long a process waits for another's next record before it gives up."""

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True)
class PrepareContext:
    """What encodes, and with whom the work is shared.

    Attributes:
        dtype: arithmetic of the text encoders; the VAE runs in float32.
        root: folder of all prepared records, shared by runs.
        rank, world: processes that share this disk and prepare together: all, or those of one machine where `root` is
            not shared between machines. Each makes its share and waits for the others' by looking at the files: no
            collective call that could time out.
        meeting: a name of this run that its processes have in common, by which they tell each other of bad rows.
        patience: seconds without any new record after which waiting ends in an error.
        progress: whether to show bars.
    """

    base: Base
    device: torch.device | str
    dtype: torch.dtype
    root: Path
    rank: int = 0
    world: int = 1
    meeting: str = ""
    patience: float = PATIENCE_SECONDS
    progress: bool = True

    @property
    def show(self) -> bool:
        return self.progress and self.rank == 0

    def say(self, line: str) -> None:
        if self.rank == 0:
            print(line, flush=True)


def run_ahead(pool: Executor, function: Callable[[In], Out], items: Iterable[In], ahead: int) -> Iterator[Out]:
    """map() in the pool, in order, at most `ahead` results waiting."""
    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def batched(items: Iterable[In], size: int) -> Iterator[list[In]]:
    batch: list[In] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def batched_alike(items: Iterable[In], kind: Callable[[In], Any], size: int) -> Iterator[list[In]]:
    """Batches whose items are of one kind; at most `size - 1` of each kind wait."""
    waiting: dict[Any, list[In]] = {}
    for item in items:
        batch = waiting.setdefault(kind(item), [])
        batch.append(item)
        if len(batch) == size:
            yield waiting.pop(kind(item))
    yield from waiting.values()


def bar(items: Iterable[In], total: int, what: str, show: bool) -> Iterable[In]:
    return tqdm(items, total=total, desc=what, disable=not show, leave=False, delay=0.5)


def wait_for(absent: Callable[[], int], shards: Shards, patience: float) -> None:
    """Returns when nothing is `absent` from the shards any more, made by whichever process. Raises UserError after
    `patience` seconds in which nothing new appeared."""
    pause, left, last_news = 0.05, None, time.monotonic()
    while True:
        shards.refresh()
        count = absent()
        if not count:
            return
        if count != left:
            left, last_news = count, time.monotonic()
        if time.monotonic() - last_news > patience:
            raise UserError(
                f"{shards.folder}: {count} records that other processes should make did not appear in "
                f"{patience:.0f} s. Look at the other processes' messages, then start again: what is there is kept."
            )
        time.sleep(pause)
        pause = min(2.0, pause * 1.5)


def count_absent(shards: Shards, keys: np.ndarray) -> int:
    return int((shards.find(keys) < 0).sum())
