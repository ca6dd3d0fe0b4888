"""Parts that the training stages share: time limit, learning rate, checkpoints, device and process group.

Under `torchrun` the processes split the batch and average their gradients once a step. On a CPU that other programs
use too, two processes of one thread are faster than one process of two threads: the threads wait for each other at
every layer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nano_maker import checkpoint

_WARMUP = 100  # steps
_DECAY_FROM = 0.6  # share of the time with the full learning rate; a cosine lowers it afterwards
_SAVE_EVERY = 120.0  # seconds
_LOG_EVERY = 20.0  # seconds
_ADAMW = partial(torch.optim.AdamW, betas=(0.9, 0.99), weight_decay=1e-4)


def device() -> torch.device:
    return (
        torch.device("cuda", rank() % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
    )


def join_group() -> None:
    """Joins the process group if `torchrun` started several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def checkpoint_file(work: Path, stage: str) -> Path:
    return work / f"{stage}.safetensors"


class TrainingStage:
    """The loop of one training stage: it takes a number of minutes, resumed runs included.

    The learning rate follows the share of the time that is used, so that a slower machine makes fewer
    steps of the same schedule.
    """

    def __init__(
        self,
        work: Path,
        name: str,
        minutes: float,
        rate: float,
        modules: dict[str, nn.Module],
        trained: list[str],
        optimizer: Callable[..., torch.optim.Optimizer] = _ADAMW,
    ) -> None:
        self.name, self.file = name, checkpoint_file(work, name)
        self.seconds, self.rate, self.modules = minutes * 60, rate, modules
        parameters = [p for name in trained for p in modules[name].parameters() if p.requires_grad]
        self.optimizer = optimizer(parameters, lr=rate)
        self.parameters = parameters
        self.step, self.used = 0, 0.0
        self.losses: list[Tensor] = []
        if self.file.exists():
            progress = checkpoint.load(self.file, modules, self.optimizer)
            self.step, self.used = progress["step"], progress["seconds"]
        self._logged = self._saved = self.used

    @property
    def progress(self) -> float:
        """The share of the time that is used, 0 to 1."""
        return min(1.0, self.used / self.seconds)

    def __iter__(self) -> Iterator[int]:
        """Yields step numbers until the time is used; saves checkpoints in between and at the end."""
        self._started = time.monotonic() - self.used
        while self.used < self.seconds:
            self._set_rate()
            yield self.step
            self.step += 1
            if self.used - self._logged > _LOG_EVERY:
                self._log()
            if self.used - self._saved > _SAVE_EVERY:
                self.save()
        self.save()

    def update(self, loss: Tensor) -> None:
        """Makes one optimiser step on the mean loss of all processes; clips the gradient's norm at 1."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._average_gradients()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.losses.append(loss.detach())

    def _average_gradients(self) -> None:
        """Averages the gradients over the processes, and the time used: all processes then stop after the same step."""
        self.used = time.monotonic() - self._started
        if world() == 1:
            return
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        clock = torch.tensor([self.used], device=gradients[0].device)
        flat = torch.cat([clock, *(g.reshape(-1) for g in gradients)])
        dist.all_reduce(flat)
        flat /= world()
        self.used = flat[0].item()
        for gradient, mean in zip(gradients, flat[1:].split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def save(self) -> None:
        self._saved = self.used
        if rank() == 0:
            progress = {"step": self.step, "seconds": round(self.used, 1)}
            checkpoint.save(self.file, self.modules, self.optimizer, progress)

    def _set_rate(self) -> None:
        late = max(0.0, (self.progress - _DECAY_FROM) / (1 - _DECAY_FROM))
        scale = min(1.0, (self.step + 1) / _WARMUP) * (0.02 + 0.49 * (1 + _cosine(late)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * scale

    def _log(self) -> None:
        self._logged = self.used
        if rank() > 0:
            self.losses.clear()
            return
        loss = torch.stack(self.losses).mean().item() if self.losses else float("nan")
        self.losses.clear()
        rate = self.optimizer.param_groups[0]["lr"]
        print(f"{self.name}: step {self.step}  {self.used:.0f} s  loss {loss:.5f}  rate {rate:.2e}", flush=True)


def _cosine(share: float) -> float:
    """Returns cos(pi share): 1 at share 0, -1 at share 1."""
    return float(torch.cos(torch.tensor(torch.pi * share)))
