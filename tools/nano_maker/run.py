"""What the training stages share: the clock that bounds them, the learning rate, the averaged weights, the device.

Under `torchrun` the processes split the batch and average their gradients once a step. On a CPU that others use
too, two processes of one thread are faster than one process of two, which waits for its slower thread at every layer.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nano_maker import checkpoint

_WARMUP = 100  # steps
_DECAY_FROM = 0.6  # of the time: until here the full rate, then a cosine down
_SAVE_EVERY = 120.0  # seconds
_LOG_EVERY = 20.0  # seconds
_ADAMW = partial(torch.optim.AdamW, betas=(0.9, 0.99), weight_decay=1e-4)


def device() -> torch.device:
    return (
        torch.device("cuda", rank() % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
    )


def join_group() -> None:
    """Meet the other processes where `torchrun` started several; alone otherwise."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class PairTransform:
    """One training stage: steps within a number of minutes, across any number of resumed runs.

    The learning rate follows the share of the time that is used, so that a slower machine makes fewer
    steps but the same curve.
    """

    def __init__(
        self,
        folder: Path,
        minutes: float,
        rate: float,
        modules: dict[str, nn.Module],
        trained: list[str],
        optimizer: Callable[..., torch.optim.Optimizer] = _ADAMW,
    ) -> None:
        self.folder, self.seconds, self.rate = folder, minutes * 60, rate
        self.modules = modules
        parameters = [p for name in trained for p in modules[name].parameters() if p.requires_grad]
        self.optimizer = optimizer(parameters, lr=rate)
        self.parameters = parameters
        self.step, self.used = 0, 0.0
        self.losses: list[Tensor] = []
        if checkpoint.exists(folder):
            state = checkpoint.load(folder, modules, self.optimizer)
            self.step, self.used = state["step"], state["seconds"]
        self._logged = self._saved = self.used

    @property
    def progress(self) -> float:
        """0 at the start, 1 when the time is used up."""
        return min(1.0, self.used / self.seconds)

    def __iter__(self) -> Iterator[int]:
        """Step numbers until the time is used up; saves on the way and at the end."""
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
        """One optimiser step on the mean loss of all processes, with the gradient clipped at 1."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._share_gradients()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.losses.append(loss.detach())

    def _share_gradients(self) -> None:
        """Average the gradients over the processes, and the clock with them: all stop after the same step."""
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

    def save(self, **more: Any) -> None:
        self._saved = self.used
        if rank() > 0:
            return
        checkpoint.save(
            self.folder, self.modules, self.optimizer, {"step": self.step, "seconds": round(self.used, 1), **more}
        )

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
        print(f"{self.folder.name}: step {self.step}  {self.used:.0f} s  loss {loss:.5f}  rate {rate:.2e}", flush=True)


def averaged(module: nn.Module) -> nn.Module:
    """A frozen copy, to be moved by `follow`."""
    return copy.deepcopy(module).requires_grad_(False).eval()


@torch.no_grad()
def follow(average: nn.Module, module: nn.Module, step: int, horizon: int = 1000) -> None:
    """Move the average towards the module: over all steps while young, over about `horizon` steps later."""
    decay = min(1 - 1 / horizon, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)


def _cosine(share: float) -> float:
    """1 at 0, -1 at 1."""
    return float(torch.cos(torch.tensor(torch.pi * share)))
