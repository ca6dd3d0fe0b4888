"""The gradients of one global batch, computed in as many parts as the device's memory asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from t2i_adapter.devices import release
from t2i_adapter.errors import UserError, first_line
from t2i_adapter.types import Batch

_CPU_WORDS = ("not enough memory", "can't allocate memory", "could not create a memory", "could not create a primitive")
"""What torch's CPU allocator and oneDNN say in a plain RuntimeError, for which there is no class of its own."""


@dataclass
class Accumulation:
    """Adds gradients to the adapter's, micro-batch by micro-batch.

    wrapped: the adapter as accelerate wraps it. losses: batch -> each sample's loss (B,). count: micro-batches an
    update. on_loss: takes each part's share of the update's mean loss.
    """

    accelerator: Accelerator
    wrapped: Any
    losses: Callable[[Batch], Tensor]
    count: int
    on_loss: Callable[[Tensor], None]
    at_once: int | None = None
    """Most samples computed together; None until memory has run out, and less each time it does."""
    side_by_side: Callable[[Batch, float], Tensor] | None = None
    """Adds a share of the samples' gradients on several threads (`lanes.CpuThreads.add`); None computes them here."""
    span: Callable[[str], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    """Entered around a part of the step with its name, where somebody measures (`profile.Profile`)."""

    def add(self, batches: Iterator[Batch]) -> None:
        """Adds the gradients of one global batch; processes exchange them once, with its last part."""
        for micro in range(self.count):
            with self.span("waiting for data"):
                batch = next(batches)
            self._add_micro_batch(batch, last=micro == self.count - 1)

    def _add_micro_batch(self, batch: Batch, *, last: bool) -> None:
        """A sample's share of the loss is the same however many are computed together: the parts sum to the whole."""
        start, size = 0, len(batch)
        while start < size:
            stop = min(size, start + (self.at_once or size))
            fault = self._try(part(batch, start, stop), 1 / (size * self.count), exchange=last and stop == size)
            if fault is None:
                start = stop
            else:
                self._halve(stop - start, fault)

    def _try(self, samples: Batch, share: float, *, exchange: bool) -> str | None:
        """Adds these samples' gradients; or adds nothing, and tells in which words memory was refused."""
        before = self._gradients()
        try:
            with contextlib.nullcontext() if exchange else self.accelerator.no_sync(self.wrapped):
                loss = (self.side_by_side or self._here)(samples, share)
        except (RuntimeError, MemoryError) as fault:  # torch.OutOfMemoryError is a RuntimeError
            if not is_out_of_memory(fault) or not self._undone(before, exchange):
                raise
            return first_line(fault)
        self.on_loss(loss)
        return None

    def _here(self, samples: Batch, share: float) -> Tensor:
        loss = self.losses(samples).sum() * share
        with self.span("backward pass"):
            self.accelerator.backward(loss)
        return loss.detach()

    def _gradients(self) -> list[int]:
        """How often each gradient was written, -1 where there is none."""
        return [-1 if p.grad is None else p.grad._version for p in self._parameters]

    def _undone(self, before: list[int], exchange: bool) -> bool:
        """Whether the adapter's gradients are again as they were.

        The UNet's part of the backward pass comes first and needs the most, and writes none. Past it only a first
        part can be taken back, and only from a process that has not begun to exchange.
        """
        if self._gradients() == before:
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
        """Takes half as many samples at once from here on. Raises UserError if it was one already."""
        release(self.accelerator.device)
        if tried == 1:
            raise UserError(
                f"Memory does not suffice for a single sample ({fault}): use --gradient_checkpointing, "
                "--base.quantize, a lower --resolution, or a device with more."
            )
        self.at_once = tried // 2
        tqdm.write(
            f"Memory did not suffice for {tried} samples at once: from here on {self.at_once} are computed at a time, "
            "for the same update."
        )


def trained(adapter: Any) -> list[Any]:
    """The weights that learn."""
    return [parameter for parameter in adapter.parameters() if parameter.requires_grad]


def part(batch: Batch, start: int, stop: int) -> Batch:
    """The samples from `start` up to `stop` of a batch."""
    if (start, stop) == (0, len(batch)):
        return batch
    each = {name: len(value) // len(batch) for name, value in vars(batch).items()}  # a sample may have several noises
    cut = {name: value[start * each[name] : stop * each[name]] for name, value in vars(batch).items()}
    return replace(batch, **cut)


def is_out_of_memory(fault: BaseException) -> bool:
    """Whether an exception says that memory, the device's or the host's, did not suffice."""
    if isinstance(fault, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(fault, RuntimeError) and any(word in str(fault) for word in _CPU_WORDS)
