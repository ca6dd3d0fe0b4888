"""Running sums that stay on the device until somebody asks."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor

from t2i_adapter.types import Batch


class Meter:
    """Loss, gradient norm, bad steps, rate and share of the time spent waiting for batches, since the last reading;
    only reading waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(3, device=device)  # loss, gradient norm, steps whose numbers are not finite
        self._loss = torch.zeros((), device=device)  # of the step that is being made
        self._steps = 0
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
        self._loss += loss

    def add_step(self, norm: Tensor, *, scaled: bool) -> None:
        """Ends a step with its gradient norm (); one whose numbers are not finite is counted apart. Under loss scaling
        an infinite norm is part of finding the scale."""
        finite = torch.isfinite(norm)
        good = torch.isfinite(self._loss) & (finite | scaled)
        self._sums += torch.stack([torch.where(good, self._loss, 0.0), torch.where(finite, norm, 0.0), (~good).float()])
        self._loss.zero_()
        self._steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count towards the rate."""
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began

    def read(self, accelerator: Accelerator, samples_per_step: int) -> dict[str, float]:
        """Means since the last reading, over all processes, and starts anew. The loss is nan where no step was good."""
        loss, norm, bad = accelerator.reduce(self._sums, "mean").tolist()  # pyright: ignore[reportAttributeAccessIssue]
        steps, seconds = max(self._steps, 1), time.perf_counter() - self._started
        self._sums.zero_()
        waited, self._waited = self._waited, 0.0
        self._steps, self._started = 0, time.perf_counter()
        return {
            "loss": loss / (steps - bad) if bad < steps else math.nan,
            "grad_norm": norm / steps,
            "nonfinite_steps": bad,
            "samples_per_s": steps * samples_per_step / seconds,
            "wait_share": waited / seconds,  # this process' own
        }
