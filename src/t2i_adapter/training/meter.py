"""Collects the numbers of each step on the device, and reads them when the run logs."""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from t2i_adapter.types import Batch


class Work(NamedTuple):
    """What one sample costs. flops: operations; least_seconds: what the card's units need for them, None if the card's
    rate is not known."""

    flops: float
    least_seconds: float | None


class Meter:
    """Loss, gradient norm, skipped steps, samples/s and time spent waiting for batches, since the last `read`.

    Only `read` waits for the device. `work`, if it is set, adds the rate of operations.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.work: Work | None = None
        self._shares: list[Tensor] = []  # () each, parts of the present step's loss
        self._losses: list[Tensor] = []  # () each, one a step
        self._norms: list[Tensor] = []
        self._is_scaled = False
        self._waited = 0.0
        self._started = time.perf_counter()

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yields the batches, and counts the host's time until each is ready as waiting."""
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def add_loss(self, loss: Tensor) -> None:
        """A share () of this step's mean loss."""
        self._shares.append(loss)

    def add_step(self, norm: Tensor, *, is_scaled: bool) -> None:
        """Ends a step with its gradient norm (). A step with NaN or inf counts as non-finite; under loss scaling an
        infinite norm does not, for it is part of finding the scale."""
        self._losses.append(self._shares[0] if len(self._shares) == 1 else torch.stack(self._shares).sum())
        self._norms.append(norm)
        self._shares, self._is_scaled = [], is_scaled

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count towards samples/s."""
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began

    def read(self, accelerator: Accelerator, samples_per_step: int) -> dict[str, float]:
        """Means over all ranks since the last call, then starts anew. The loss is NaN if no step was finite."""
        sums: Any = accelerator.reduce(self._sums(), "mean")
        loss, norm, bad = sums.tolist()
        steps, seconds = max(len(self._losses), 1), time.perf_counter() - self._started
        waited, self._waited = self._waited, 0.0
        self._losses, self._norms, self._started = [], [], time.perf_counter()
        speed = steps * samples_per_step / seconds
        return {
            "loss": loss / (steps - bad) if bad < steps else math.nan,
            "grad_norm": norm / steps,
            "nonfinite_steps": bad,
            "samples_per_s": speed,
            "wait_share": waited / seconds,  # of this rank alone
            **self._rates(speed / accelerator.num_processes),
            **peak_memory(self._device),
        }

    def _rates(self, samples_per_s: float) -> dict[str, float]:
        """The rate of operations of one process that computes so many samples/s, and its share of the card's peak."""
        if self.work is None:
            return {}
        rates = {"tflop_per_s": samples_per_s * self.work.flops / 1e12}
        if self.work.least_seconds is not None:
            rates["peak_share"] = samples_per_s * self.work.least_seconds
        return rates

    def _sums(self) -> Tensor:
        """(3,) sums: loss and gradient norm of the finite steps, and the number of the others."""
        if not self._losses:
            return torch.zeros(3, device=self._device)
        losses, norms = torch.stack(self._losses), torch.stack(self._norms)
        finite = torch.isfinite(norms)
        good = torch.isfinite(losses) & (finite | self._is_scaled)
        rows = [losses.where(good, 0.0), norms.where(finite, 0.0), (~good).float()]
        return torch.stack(rows).sum(1)


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most memory that this process has taken, in GiB: tensors on a GPU and what its allocator reserved, or the
    resident memory of a run on a CPU. The device is not waited for."""
    if device.type == "cuda":
        return {
            "peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30,
            "peak_reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30,
        }
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
