"""Numbers of each step, which stay on the device until somebody asks."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from t2i_adapter.types import Batch


class Meter:
    """Loss, gradient norm, bad steps, rate and share of the time spent waiting for batches, since the last reading;
    only reading waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._shares: list[Tensor] = []  # () each, of the loss of the step that is being made
        self._losses: list[Tensor] = []  # () each, a step's
        self._norms: list[Tensor] = []
        self._scaled = False
        self._waited = 0.0
        self._started = time.perf_counter()

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; the host's time until each was there counts as waiting. It never waits for the device."""
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

    def add_step(self, norm: Tensor, *, scaled: bool) -> None:
        """Ends a step with its gradient norm (); one whose numbers are not finite is counted apart. Under loss scaling
        an infinite norm is part of finding the scale."""
        self._losses.append(self._shares[0] if len(self._shares) == 1 else torch.stack(self._shares).sum())
        self._norms.append(norm)
        self._shares, self._scaled = [], scaled

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count towards the rate."""
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began

    def read(self, accelerator: Accelerator, samples_per_step: int) -> dict[str, float]:
        """Means since the last reading, over all processes, and starts anew. The loss is nan where no step was good."""
        sums: Any = accelerator.reduce(self._sums(), "mean")
        loss, norm, bad = sums.tolist()
        steps, seconds = max(len(self._losses), 1), time.perf_counter() - self._started
        waited, self._waited = self._waited, 0.0
        self._losses, self._norms, self._started = [], [], time.perf_counter()
        return {
            "loss": loss / (steps - bad) if bad < steps else math.nan,
            "grad_norm": norm / steps,
            "nonfinite_steps": bad,
            "samples_per_s": steps * samples_per_step / seconds,
            "wait_share": waited / seconds,  # this process' own
        }

    def _sums(self) -> Tensor:
        """(3,) loss, gradient norm, and steps whose numbers are not finite, which the other two leave out."""
        if not self._losses:
            return torch.zeros(3, device=self._device)
        losses, norms = torch.stack(self._losses), torch.stack(self._norms)
        finite = torch.isfinite(norms)
        good = torch.isfinite(losses) & (finite | self._scaled)
        rows = [losses.where(good, 0.0), norms.where(finite, 0.0), (~good).float()]
        return torch.stack(rows).sum(1)
