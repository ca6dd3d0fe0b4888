"""Training state on disk: safetensors for tensors, JSON for the rest, replaced in one move."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def save(
    folder: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer | None, facts: Mapping[str, Any]
) -> None:
    """Write everything beside `folder`, then put it in its place: a kill leaves the old or the new one."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for name, module in modules.items():
        save_file({k: v.contiguous() for k, v in module.state_dict().items()}, fresh / f"{name}.safetensors")
    if optimizer is not None:
        save_file(_flatten(optimizer), fresh / "optimizer.safetensors")
    (fresh / "state.json").write_text(json.dumps(dict(facts), indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def load(
    folder: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Fill modules and optimiser from a folder that `save` wrote; returns the state."""
    for name, module in modules.items():
        module.load_state_dict(load_file(folder / f"{name}.safetensors"))
    if optimizer is not None:
        _unflatten(optimizer, load_file(folder / "optimizer.safetensors"))
    return state(folder)


def state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text())


def exists(folder: Path) -> bool:
    return (folder / "state.json").exists()


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """{"<parameter>.<name>": tensor} of an Adam-like optimiser's moments and step counts."""
    states = optimizer.state_dict()["state"]
    return {f"{i}.{name}": value.contiguous() for i, state in states.items() for name, value in state.items()}


def _unflatten(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".")
        states.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
