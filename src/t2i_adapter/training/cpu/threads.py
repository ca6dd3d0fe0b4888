"""CPU threads that share a micro-batch: each computes some of its samples on an equal part of the cores."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from t2i_adapter.devices import cores_of, on_cores, sharing_cores
from t2i_adapter.training.accumulate import part, trained
from t2i_adapter.training.cpu.trace import TraceCache
from t2i_adapter.types import Batch


def count_cpu_threads(wanted: int | None, device: torch.device, samples: int, processes: int) -> int:
    """How many threads share a micro-batch of `samples`: `wanted`, or one a core; at most one a sample.

    1 on a GPU, and if several processes share the cores already.
    """
    if device.type != "cpu" or processes > 1:
        return 1
    return min(wanted or cores_of(device), samples)


class CpuThreads:
    """Computes the gradients of a batch's parts side by side and sums them in the order of the parts: the same bits in
    every call, and equal to the whole batch's up to rounding."""

    def __init__(
        self, count: int, adapter: Any, losses: Callable[[Any, Batch], Tensor], traces: TraceCache | None = None
    ) -> None:
        """adapter: the network to train, float32, on the CPU. losses: (adapter, batch) -> each sample's (B,).
        traces: replays what the threads compute; None runs the operations one by one in every call.
        """
        self._losses, self._traces = losses, traces
        self._cores = torch.get_num_threads()
        self._weights = trained(adapter)
        self._twins = [(twin, trained(twin)) for twin in (_twin(adapter) for _ in range(count))]
        self._pool = sharing_cores(count)

    def add(self, batch: Batch, share: float) -> Tensor:
        """Adds the gradients of `share` times the sum of the batch's losses to the adapter's, and returns that sum.

        If a thread raises, its exception is raised here and no gradient is changed.
        """
        parts = _split(batch, len(self._twins))
        results = list(self._pool.map(self._part_gradients, self._twins, parts, [share] * len(parts)))
        for _, *gradients in results:
            for weight, gradient in zip(self._weights, gradients, strict=True):
                weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
        return torch.stack([loss for loss, *_ in results]).sum()

    def feeding(self) -> AbstractContextManager[None]:
        """The context to call `add` in: the calling thread uses one core, and leaves the others to these threads."""
        return on_cores(1)

    def pausing(self) -> AbstractContextManager[None]:
        """Inside `feeding`, the context for other work: the calling thread uses all cores again."""
        return on_cores(self._cores)

    def _part_gradients(self, twin: tuple[Any, list[Any]], batch: Batch, share: float) -> Sequence[Tensor]:
        """The loss (), then the gradient of each weight."""
        adapter, weights = twin

        def gradients() -> list[Tensor]:
            loss = self._losses(adapter, batch).sum() * share
            return [loss.detach(), *torch.autograd.grad(loss, weights)]

        if self._traces is None:
            return gradients()
        inputs = [value for value in vars(batch).values() if isinstance(value, Tensor)]
        return self._traces.call(gradients, inputs, share)


def _twin(adapter: Any) -> Any:
    """A copy of the network that shares its weights' memory but has parameters, and so gradients, of its own."""
    twin = copy.deepcopy(adapter)
    for own, weight in zip(twin.parameters(), adapter.parameters(), strict=True):
        own.data = weight.data
    return twin


def _split(batch: Batch, count: int) -> list[Batch]:
    """The batch's samples in their order, in at most `count` parts whose sizes differ by one at most."""
    count = min(count, len(batch))
    bounds = [number * len(batch) // count for number in range(count + 1)]
    return [part(batch, start, stop) for start, stop in pairwise(bounds)]
