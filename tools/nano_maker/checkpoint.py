"""Checkpoints of a training stage: one safetensors file with the weights, the optimiser's state and the progress."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from t2i_adapter.files import move_atomic
from t2i_adapter.tensors import write_tensors


def save(
    file: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer | None, progress: Mapping[str, Any]
) -> None:
    """Replaces `file` by a rename: after a kill it holds the old or the new checkpoint.

    A module's weight is stored as MODULE/NAME, the optimiser's state as optimizer/PARAMETER.NAME, `progress` as JSON.
    """
    tensors = {f"{name}/{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    if optimizer is not None:
        states = optimizer.state_dict()["state"]
        tensors |= {f"optimizer/{i}.{key}": value for i, state in states.items() for key, value in state.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    write_tensors(
        temporary, {key: value.cpu() for key, value in tensors.items()}, {"progress": json.dumps(dict(progress))}
    )
    move_atomic(temporary, file)


def load(
    file: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Loads modules and optimiser from a file that `save` wrote; returns the progress."""
    tensors = load_file(file)
    for name, module in modules.items():
        module.load_state_dict(_below(f"{name}/", tensors))
    if optimizer is not None:
        states: dict[int, dict[str, Tensor]] = {}
        for key, value in _below("optimizer/", tensors).items():
            index, name = key.split(".")
            states.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    return progress(file)


def progress(file: Path) -> dict[str, Any]:
    """Returns the progress that `save` stored, without loading the weights."""
    with safe_open(file, "pt") as content:
        return json.loads(content.metadata()["progress"])


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors whose name begins with the prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
