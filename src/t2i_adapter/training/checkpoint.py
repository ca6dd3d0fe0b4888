"""Checkpoints: whole or not at all, and no pickle.

    checkpoint-500/
      t2iadapter/             the adapter as it would be published: opens with T2IAdapter.from_pretrained
      training.safetensors    what else the run needs: the optimiser's tensors, and the raw weights beside an average
      state.json              schema, step, samples seen, seed, options, plain numbers, sha256 of every file

A checkpoint is written aside, flushed to disk and renamed; state.json's checksums tell a whole one from a damaged one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2i_adapter.errors import UserError
from t2i_adapter.files import move_whole

SCHEMA = 1
PREFIX = "checkpoint-"


@dataclass(frozen=True)
class TrainingState:
    """What a run needs to go on as if it had not stopped.

    tensors: flat names to tensors; state: plain JSON with at least {"step": int}.
    """

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save(output_dir: Path, adapter: Any, training: TrainingState, keep: int | None) -> Path:
    """Writes checkpoint-{step}, then removes the oldest ones beyond `keep`. Returns its folder."""
    final = output_dir / f"{PREFIX}{training.state['step']}"
    aside = output_dir / f".{final.name}.writing"
    try:
        _write(aside, adapter, training)
        if final.exists():  # the same step again, after a resume from before it
            shutil.rmtree(final)
        move_whole(aside, final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    if keep is not None:
        for _, old in list_checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)
    return final


def _write(aside: Path, adapter: Any, training: TrainingState) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    adapter.save_pretrained(aside / "t2iadapter")
    save_file({name: tensor.contiguous() for name, tensor in training.tensors.items()}, aside / "training.safetensors")
    files = {str(p.relative_to(aside)): _sha256(p) for p in sorted(aside.rglob("*")) if p.is_file()}
    state = json.dumps({"schema": SCHEMA, **training.state, "files": files}, indent=1)
    (aside / "state.json").write_text(state, encoding="utf-8")


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, oldest first; other names are passed over."""
    found = []
    for path in output_dir.glob(f"{PREFIX}*"):
        number = path.name.removeprefix(PREFIX)
        if path.is_dir() and number.isdecimal():
            found.append((int(number), path))
    return sorted(found)


def find(output_dir: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint that `resume` names, and a line about each newer one that had to be skipped.

    `latest` takes the newest whole one, or None if there is none at all. A path, or a name inside the output folder,
    must exist and be whole. Raises UserError.
    """
    if resume == "latest":
        skipped = []
        for _, folder in reversed(list_checkpoints(output_dir)):
            fault = damage(folder)
            if fault is None:
                return folder, skipped
            skipped.append(f"{folder} is skipped: {fault}")
        if skipped:
            raise UserError("No whole checkpoint to resume from. " + " ".join(skipped))
        return None, []
    for folder in (Path(resume), output_dir / resume):
        if folder.is_dir():
            fault = damage(folder)
            if fault is not None:
                raise UserError(f"--resume_from_checkpoint {resume}: {fault}")
            return folder, []
    known = ", ".join(path.name for _, path in list_checkpoints(output_dir)) or "none"
    raise UserError(
        f"--resume_from_checkpoint {resume}: no such folder; in {output_dir} there are: {known}. Name one, or `latest`."
    )


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if it is whole."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = state["files"]
        if state["schema"] > SCHEMA:
            return f"it was written by a newer version (schema {state['schema']}, this one reads up to {SCHEMA})"
        for name, digest in files.items():
            if _sha256(folder / name) != digest:
                return f"{name} does not have the checksum it was written with"
    except FileNotFoundError as fault:
        return f"{Path(str(fault.filename)).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        return f"state.json cannot be read ({fault})"
    return None


def load(folder: Path, device: torch.device) -> tuple[dict[str, Tensor], TrainingState]:
    """(adapter weights as published, training state). Raises UserError if a file cannot be read."""
    try:
        weights = load_file(folder / "t2iadapter" / "diffusion_pytorch_model.safetensors", device=str(device))
        tensors = load_file(folder / "training.safetensors", device=str(device))
    except (OSError, SafetensorError) as fault:
        raise UserError(f"{folder}: {fault}; resume from another checkpoint.") from fault
    return weights, TrainingState(tensors, read_state(folder))


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint that `find` has found whole."""
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as tensors named "optimizer.{parameter}.{key}", and what is no tensor as JSON alike."""
    tensors, numbers = {}, {}
    for index, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            (tensors if isinstance(value, Tensor) else numbers)[f"optimizer.{index}.{key}"] = value
    return tensors, numbers


def unpack_optimizer(optimizer: torch.optim.Optimizer, packed: Mapping[str, Any]) -> None:
    """Puts back what pack_optimizer took: `packed` holds its tensors and numbers together."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in packed.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, key = rest.partition(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
