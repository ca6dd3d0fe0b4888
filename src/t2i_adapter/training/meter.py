"""Running sums that stay on the device until somebody asks."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor


class Meter:
    """Loss, gradient norm, bad steps and rate since the last reading; only reading waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(3, device=device)  # loss, gradient norm, steps whose numbers are not finite
        self._steps = 0
        self._started = time.perf_counter()

    def add_loss(self, loss: Tensor) -> None:
        """A share () of this step's mean loss."""
        self._sums[0] += loss

    def add_step(self, norm: Tensor, *, scaled: bool) -> None:
        """Ends a step with its gradient norm (). Under loss scaling an infinite norm is part of finding the scale."""
        finite = torch.isfinite(norm)
        self._sums[1] += torch.where(finite, norm, 0.0)
        if not scaled:
            self._sums[2] += ~finite
        self._steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count towards the rate."""
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began

    def read(self, accelerator: Accelerator, samples_per_step: int) -> dict[str, float]:
        """Means since the last reading, over all processes, and starts anew."""
        loss, norm, bad = accelerator.reduce(self._sums, "mean").tolist()  # pyright: ignore[reportAttributeAccessIssue]
        steps, seconds = max(self._steps, 1), time.perf_counter() - self._started
        self._sums.zero_()
        self._steps, self._started = 0, time.perf_counter()
        return {
            "loss": loss / steps,
            "grad_norm": norm / steps,
            "nonfinite_steps": bad,
            "samples_per_s": steps * samples_per_step / seconds,
        }

    def is_finite(self, accelerator: Accelerator) -> bool:
        """Whether everything since the last reading was a number, on every process; waits for the device."""
        loss, _, bad = accelerator.reduce(self._sums, "mean").tolist()  # pyright: ignore[reportAttributeAccessIssue]
        return bad == 0 and math.isfinite(loss)
