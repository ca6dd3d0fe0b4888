"""Gradient accumulation: adds up the gradients of one global batch, in parts that fit into the device's memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from t2i_adapter.devices import is_out_of_memory, release
from t2i_adapter.errors import UserError, first_line, flag
from t2i_adapter.training.profile import BACKWARD, DATA, mark
from t2i_adapter.types import Batch

AddGradients = Callable[[Batch, float], Tensor]
"""(samples, share) -> share times the sum of the samples' losses, (); adds its gradients to the adapter's."""


@dataclass
class Accumulation:
    """Adds gradients to the adapter's, micro-batch by micro-batch.

    wrapped: the adapter as accelerate wraps it. count: micro-batches of an update. on_loss: receives each part's share
    of the update's mean loss.
    """

    accelerator: Accelerator
    wrapped: Any
    add_gradients: AddGradients
    count: int
    on_loss: Callable[[Tensor], None]
    at_once: int | None = None
    """Most samples computed together; None until memory runs out, then halved each time it does."""

    def add(self, batches: Iterator[Batch]) -> None:
        """Adds the gradients of one global batch; ranks exchange them once, with its last part."""
        for micro in range(self.count):
            with mark(DATA):
                batch = next(batches)
            self._add_micro_batch(batch, is_last=micro == self.count - 1)

    def _add_micro_batch(self, batch: Batch, *, is_last: bool) -> None:
        """Computes the batch in parts of `at_once` samples. A sample's share of the loss does not depend on the parts,
        so their gradients sum to those of the whole batch."""
        start, size = 0, len(batch)
        while start < size:
            stop = min(size, start + (self.at_once or size))
            fault = self._try(part(batch, start, stop), 1 / (size * self.count), exchange=is_last and stop == size)
            if fault is None:
                start = stop
            else:
                self._halve(stop - start, fault)

    def _try(self, samples: Batch, share: float, *, exchange: bool) -> str | None:
        """Adds these samples' gradients and returns None; or, out of memory, adds nothing and returns the error's
        first line."""
        before = self._gradient_versions()
        try:
            with contextlib.nullcontext() if exchange else self.accelerator.no_sync(self.wrapped):
                loss = self.add_gradients(samples, share)
        except (RuntimeError, MemoryError) as fault:  # torch.OutOfMemoryError is a RuntimeError
            if not is_out_of_memory(fault) or not self._restored(before, exchange):
                raise
            return first_line(fault)
        self.on_loss(loss)
        return None

    def _gradient_versions(self) -> list[int]:
        """How often each gradient tensor was written; -1 if a parameter has no gradient yet."""
        return [-1 if p.grad is None else p.grad._version for p in self._parameters]

    def _restored(self, before: list[int], exchange: bool) -> bool:
        """Whether the adapter's gradients are what they were before a part ran out of memory.

        Memory usually runs out in the UNet's backward pass, before any adapter gradient is written. Later, the part
        can be undone only if there were no gradients before it and no exchange between ranks has begun.
        """
        if self._gradient_versions() == before:
            return True
        if set(before) != {-1} or (exchange and self.accelerator.num_processes > 1):
            return False
        for parameter in self._parameters:
            parameter.grad = None
        return True

    @cached_property
    def _parameters(self) -> list[Any]:
        return trained(self.wrapped)

    def _halve(self, tried: int, fault: str) -> None:
        """Halves `at_once`. Raises UserError if a single sample was tried."""
        release(self.accelerator.device)
        if tried == 1:
            raise UserError(
                f"Out of memory for a single sample ({fault}): use {flag('train.gradient_checkpointing')}, "
                f"{flag('base.quantize')}, a lower {flag('data.resolution')}, or a device with more memory.",
                kind="out_of_memory",
            )
        self.at_once = tried // 2
        tqdm.write(
            f"Out of memory for {tried} samples at once: from here on {self.at_once} are computed at a time, "
            "for the same update."
        )


def plain_gradients(accelerator: Accelerator, losses: Callable[[Batch], Tensor]) -> AddGradients:
    """One forward and one backward pass in this thread. losses: batch -> each sample's loss (B,)."""

    def add_gradients(samples: Batch, share: float) -> Tensor:
        loss = losses(samples).sum() * share
        with mark(BACKWARD):
            accelerator.backward(loss)
        return loss.detach()

    return add_gradients


def trained(adapter: Any) -> list[Any]:
    """The parameters that training changes."""
    return [parameter for parameter in adapter.parameters() if parameter.requires_grad]


def part(batch: Batch, start: int, stop: int) -> Batch:
    """The samples from `start` up to `stop` of a batch."""
    if (start, stop) == (0, len(batch)):
        return batch
    fields = {name: value for name, value in vars(batch).items() if value is not None}
    rows = {name: len(value) // len(batch) for name, value in fields.items()}  # a sample has K noise samples
    return replace(batch, **{name: value[start * rows[name] : stop * rows[name]] for name, value in fields.items()})
