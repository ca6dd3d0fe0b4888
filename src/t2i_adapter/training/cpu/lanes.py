"""A batch shared between threads on a CPU, each computing some of its samples on an equal part of the cores."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from t2i_adapter.devices import cores_of, sharing_cores
from t2i_adapter.training.accumulate import part, trained
from t2i_adapter.training.cpu.trace import TraceCache
from t2i_adapter.types import Batch


def count_cpu_threads(wanted: int | None, device: torch.device, samples: int, processes: int) -> int:
    """How many threads share a micro-batch of so many samples: `wanted`, or one a core; at most one a sample.

    On a GPU, and where several processes share the work already, there is one.
    """
    if device.type != "cpu" or processes > 1:
        return 1
    return min(wanted or cores_of(device), samples)


class CpuThreads:
    """Computes the gradients of a batch's parts side by side and sums them in the parts' order: the same numbers each
    time, and those of the whole batch to rounding."""

    def __init__(
        self, count: int, adapter: Any, losses: Callable[[Any, Batch], Tensor], recorder: TraceCache | None = None
    ) -> None:
        """adapter: the network that learns, float32, on the CPU. losses: (adapter, batch) -> each sample's (B,).
        recorder: replays what the threads do, where that can be; None calls it each time.
        """
        self._losses, self._recorder = losses, recorder
        self._weights = trained(adapter)
        self._twins = [(twin, trained(twin)) for twin in (_twin(adapter) for _ in range(count))]
        self._pool = sharing_cores(count)

    def add(self, batch: Batch, share: float) -> Tensor:
        """Adds the gradients of `share` times the sum of the batch's losses to the adapter's, and returns that sum.

        Where a thread fails its exception is raised, and nothing has been added.
        """
        parts = _cut(batch, len(self._twins))
        done = list(self._pool.map(self._lane, self._twins, parts, [share] * len(parts)))
        for _, *gradients in done:
            for weight, gradient in zip(self._weights, gradients, strict=True):
                weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
        return torch.stack([loss for loss, *_ in done]).sum()

    def _lane(self, twin: tuple[Any, list[Any]], batch: Batch, share: float) -> Sequence[Tensor]:
        """The loss, and the gradient of each weight."""
        adapter, weights = twin

        def gradients() -> list[Tensor]:
            loss = self._losses(adapter, batch).sum() * share
            return [loss.detach(), *torch.autograd.grad(loss, weights)]

        if self._recorder is None:
            return gradients()
        inputs = [value for value in vars(batch).values() if isinstance(value, Tensor)]
        return self._recorder.call(gradients, inputs, share)


def _twin(adapter: Any) -> Any:
    """The same network around the same weights: threads must not share the tensors that gradients hang on."""
    twin = copy.deepcopy(adapter)
    for own, weight in zip(twin.parameters(), adapter.parameters(), strict=True):
        own.data = weight.data
    return twin


def _cut(batch: Batch, count: int) -> list[Batch]:
    """The batch's samples in their order, in at most `count` parts whose sizes differ by one at most."""
    count = min(count, len(batch))
    bounds = [number * len(batch) // count for number in range(count + 1)]
    return [part(batch, start, stop) for start, stop in pairwise(bounds)]
