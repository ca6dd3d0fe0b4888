"""Builds batches in the training process if there are no loader processes: several at a time, one ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from t2i_adapter.errors import UserError
from t2i_adapter.types import Batch, PartialBatch

BURST = 8
"""Batches built at once."""

Finish = Callable[[Iterable[PartialBatch]], Iterator[Batch]]


def build_in_process(partial_batches: Iterable[PartialBatch], finish: Finish, *, ranks: int) -> Iterator[Batch]:
    """The batches that `finish` makes of the partial ones. With one rank a thread builds the next batch ahead.

    With several ranks there is no thread: some ranks abort (SIGABRT) if they end while it runs.
    """
    batches = finish(in_bursts(partial_batches))
    return one_ahead(batches) if ranks == 1 else batches


def in_bursts(partial_batches: Iterable[PartialBatch]) -> Iterator[PartialBatch]:
    """Builds BURST batches one after the other before it yields them. Built one by one between steps they run on cold
    CPU caches, which takes longer."""
    source = iter(partial_batches)
    while True:
        burst: list[PartialBatch] = []
        try:
            burst.extend(islice(source, BURST))
        except UserError:  # raised after the batches that were built before it
            yield from burst
            raise
        if not burst:
            return
        yield from burst


def one_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yields the batches; a thread builds the next one while the caller uses the last."""
    with ThreadPoolExecutor(1, "batches") as thread:
        upcoming = thread.submit(next, batches, None)
        while (batch := upcoming.result()) is not None:
            upcoming = thread.submit(next, batches, None)
            yield batch
