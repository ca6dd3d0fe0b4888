"""NaN and inf: skips updates whose gradient is not finite, names their samples and saves their batches.

On a CPU, and with an optimiser that does not read `found_inf` (adamw8bit), the host tests each step's gradient norm
before it calls the optimiser. On a GPU PyTorch's fused optimisers and Muon read `found_inf`, a tensor, and change
nothing if it is 1: the host need not wait for the device, and reads which steps were skipped when it next logs or
saves. Under loss scaling (fp16) inf is part of finding the scale, and accelerate's scaler skips such steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from t2i_adapter.tensors import write_tensors
from t2i_adapter.types import Batch

FOLDER = "nonfinite"
"""In a run's folder: the batches of skipped steps."""
LEAST_SCALE = 2.0**-24
"""A run stops if fp16's loss scale is below this. It starts at 2^16 and each skipped step halves it."""


class Guard:
    """Decides for each step whether the optimiser may take it, and keeps the numbers of the steps it may not."""

    def __init__(self, optimizer: Any, *, supports_found_inf: bool, is_scaled: bool) -> None:
        """optimizer: PyTorch's own, not accelerate's wrapper. supports_found_inf: it skips a step itself if its
        `found_inf` is 1. is_scaled: a loss scaler decides instead of this class."""
        self._optimizer, self._supports_found_inf, self._is_scaled = optimizer, supports_found_inf, is_scaled
        self._unread: list[tuple[int, Tensor]] = []  # steps whose () bool, finite or not, is still on the device
        self._bad: list[int] = []

    def allows(self, norm: Tensor, step: int) -> bool:
        """Whether to call the optimiser for a gradient of this norm (). An optimiser that supports `found_inf` is
        always called, and skips the step itself."""
        if self._is_scaled:
            return True
        finite = torch.isfinite(norm)
        if self._supports_found_inf:
            self._optimizer.grad_scale, self._optimizer.found_inf = None, (~finite).float()
            self._unread.append((step, finite))
            return True
        if not finite:
            self._bad.append(step)
        return bool(finite)

    def known(self) -> list[int]:
        """Skipped steps since the last call, as far as the host knows them without waiting for the device."""
        bad, self._bad = self._bad, []
        return bad

    def all(self) -> list[int]:
        """Skipped steps since the last call; waits for the device."""
        unread, self._unread = self._unread, []
        finite = torch.stack([value for _, value in unread]).tolist() if unread else []
        return self.known() + [step for (step, _), is_finite in zip(unread, finite, strict=True) if not is_finite]


def supports_found_inf(optimizer: Any) -> bool:
    """Whether an optimiser skips a step itself if its `found_inf`, a tensor on the device, is 1, and runs on a GPU,
    where this spares the host a wait."""
    reads = getattr(optimizer, "_step_supports_amp_scaling", False)  # torch's name; its GradScaler asks for it, too
    return reads and all(p.is_cuda for group in optimizer.param_groups for p in group["params"])


@dataclass(frozen=True)
class Suspect:
    """A sample of a skipped step: its key, its timesteps, and its loss computed again."""

    key: str
    timesteps: tuple[int, ...]
    loss: float

    def __str__(self) -> str:
        times = ", ".join(map(str, self.timesteps))
        return f"{self.key} (timestep {times}, loss {self.loss:.4g})"


@torch.no_grad()
def suspects(batches: Sequence[Batch], losses: Callable[[Batch], Tensor]) -> list[Suspect]:
    """The samples whose loss is NaN or inf; all samples if every loss is finite and only the gradient is not."""
    found = []
    for batch in batches:
        times = batch.timesteps.view(len(batch), -1).tolist()
        values = losses(batch).tolist()
        found += [Suspect(key, tuple(t), loss) for key, t, loss in zip(batch.keys, times, values, strict=True)]
    return [suspect for suspect in found if not math.isfinite(suspect.loss)] or found


def write(file: Path, step: int, batches: Sequence[Batch], weights: dict[str, Tensor]) -> None:
    """Writes a step's micro-batches and, if `weights` is not empty, the adapter's weights. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"adapter.{name}": value.detach().cpu() for name, value in weights.items()}
    for number, batch in enumerate(batches):
        for name, value in vars(batch).items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{name}"] = value.detach().cpu()
    keys = [list(batch.keys) for batch in batches]
    write_tensors(file, tensors, {"step": str(step), "keys": json.dumps(keys)})


def read(file: Path) -> tuple[list[Batch], dict[str, Tensor]]:
    """(micro-batches, the adapter's weights or {}) that `write` wrote, on the CPU."""
    with safe_open(file, "pt") as stored:
        keys = json.loads(stored.metadata()["keys"])
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  (it is not a dict)
    names = {field.name for field in fields(Batch)} - {"keys"}
    batches = [
        Batch(
            keys=tuple(samples),
            **{name: tensors[f"{number}.{name}"] for name in names if f"{number}.{name}" in tensors},
        )
        for number, samples in enumerate(keys)
    ]
    return batches, {name.removeprefix("adapter."): t for name, t in tensors.items() if name.startswith("adapter.")}
