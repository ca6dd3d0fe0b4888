"""Steps whose gradient is no finite number: kept from the optimiser, named, and kept for another look.

On the CPU, and with optimisers that cannot be told otherwise, the host looks at each step's gradient norm before the
optimiser is called. PyTorch's fused optimisers on a GPU take the verdict as a tensor and leave all as it is where it is
bad, so the host need not wait for the device; it reads the verdicts when it next logs or saves. Under loss scaling
(fp16) such steps are part of finding the scale, and the scaler passes them over.
"""

from __future__ import annotations

import json
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
LEAST_SCALE = 2.0**-24
"""Where fp16's loss scale has come below this, every step has been passed over for long: it starts at 2^16, and each
halves it."""


class Guard:
    """Says of each step whether the optimiser may take it, and remembers those it may not."""

    def __init__(self, optimizer: Any, *, told: bool, scaled: bool) -> None:
        """optimizer: PyTorch's own, not accelerate's wrapper of it. told: whether it `supports_found_inf`. scaled:
        whether gradients are scaled, and a scaler judges them."""
        self._optimizer, self._told, self._scaled = optimizer, told, scaled
        self._verdicts: list[tuple[int, Tensor]] = []
        self._bad: list[int] = []

    def allows(self, norm: Tensor, step: int) -> bool:
        """Whether to call the optimiser, from the gradient's norm (). Where it can be told by a tensor it is called in
        any case, and told."""
        if self._scaled:
            return True
        finite = torch.isfinite(norm)
        if self._told:
            self._optimizer.grad_scale, self._optimizer.found_inf = None, (~finite).float()
            self._verdicts.append((step, finite))
            return True
        if not finite:
            self._bad.append(step)
        return bool(finite)

    def known(self) -> list[int]:
        """Bad steps that the host knows of without asking the device, once."""
        bad, self._bad = self._bad, []
        return bad

    def all(self) -> list[int]:
        """Bad steps since the last time, once; waits for the device."""
        verdicts, self._verdicts = self._verdicts, []
        finite = torch.stack([verdict for _, verdict in verdicts]).tolist() if verdicts else []
        return self.known() + [step for (step, _), good in zip(verdicts, finite, strict=True) if not good]


def supports_found_inf(optimizer: Any) -> bool:
    """Whether an optimiser leaves everything as it is where its `found_inf`, a tensor on the device, is 1; and whether
    that spares anything, as it does on a GPU."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and all(p.is_cuda for group in optimizer.param_groups for p in group["params"])


@dataclass(frozen=True)
class Suspect:
    """A sample of a bad step: its key, its timesteps, and its loss as it is when computed again."""

    key: str
    timesteps: tuple[int, ...]
    loss: float

    def __str__(self) -> str:
        times = ", ".join(map(str, self.timesteps))
        return f"{self.key} (timestep {times}, loss {self.loss:.4g})"


@torch.no_grad()
def suspects(batches: Sequence[Batch], losses: Callable[[Batch], Tensor]) -> list[Suspect]:
    """The samples whose loss is no finite number; where all are finite, and only the gradient is not, all."""
    found = []
    for batch in batches:
        times = batch.timesteps.view(len(batch), -1).tolist()
        values = losses(batch).tolist()
        found += [Suspect(key, tuple(t), loss) for key, t, loss in zip(batch.keys, times, values, strict=True)]
    # nan and the infinities are what a number less itself does not make 0 of
    bad = [suspect for suspect in found if suspect.loss - suspect.loss != 0]
    return bad or found


def keep(file: Path, step: int, batches: Sequence[Batch], weights: dict[str, Tensor]) -> None:
    """Writes a step's micro-batches, and the adapter's weights where they are given. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"adapter.{name}": value.detach().cpu() for name, value in weights.items()}
    for number, batch in enumerate(batches):
        for name, value in vars(batch).items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{name}"] = value.detach().cpu()
    keys = [list(batch.keys) for batch in batches]
    write_tensors(file, tensors, {"step": str(step), "keys": json.dumps(keys)})


def read(file: Path) -> tuple[list[Batch], dict[str, Tensor]]:
    """(micro-batches, the adapter's weights or {}) that `keep` wrote, on the CPU."""
    with safe_open(file, "pt") as stored:
        keys = json.loads(stored.metadata()["keys"])
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  (it is no dict)
    kept = {field.name for field in fields(Batch)} - {"keys"}
    batches = [
        Batch(
            keys=tuple(names), **{name: tensors[f"{number}.{name}"] for name in kept if f"{number}.{name}" in tensors}
        )
        for number, names in enumerate(keys)
    ]
    return batches, {name.removeprefix("adapter."): t for name, t in tensors.items() if name.startswith("adapter.")}
