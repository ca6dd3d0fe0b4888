"""Checkpoints: whole or not at all, and no pickle.

    checkpoint-500/
      t2iadapter/             the adapter as it would be published: opens with T2IAdapter.from_pretrained
      training.safetensors    what else the run needs: the optimiser's tensors, and the raw weights beside an average
      state.json              schema, step, plan, options, plain numbers, sha256 of every file and of itself

A checkpoint is written aside, flushed to disk, read again and renamed. What is older than the newest ones goes only
then; what is newer than the one a run goes on from is set aside, so that the newest is always of the present run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from t2i_adapter.errors import UserError
from t2i_adapter.files import move_atomic, parse_json, sha256
from t2i_adapter.tensors import write_tensors

SCHEMA = 2
PREFIX = "checkpoint-"
CONFIG = "t2iadapter/config.json"
WEIGHTS = "t2iadapter/diffusion_pytorch_model.safetensors"
TENSORS = "training.safetensors"
_SET_ASIDE = ".set-aside"
_WRITING = ".writing"


@dataclass(frozen=True)
class TrainingState:
    """What a run needs to go on as if it had not stopped.

    tensors: flat names to tensors; state: plain JSON, whose parts `_NEEDED` names.
    """

    tensors: dict[str, Tensor]
    state: dict[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """One moment of a run in host memory, sharing nothing with what trains on.

    config: the adapter's config.json; weights: the adapter as published.
    """

    config: str
    weights: dict[str, Tensor]
    training: TrainingState

    @property
    def step(self) -> int:
        return self.training.state["step"]

    @property
    def nbytes(self) -> int:
        """About what it takes on disk."""
        return sum(tensor.nbytes for part in (self.weights, self.training.tensors) for tensor in part.values())


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the `last` newest (None: all), and those of every `every`-th update."""

    last: int | None = None
    every: int | None = None


def take(adapter: Any, training: TrainingState) -> Snapshot:
    """Copies to host memory; the one part of saving that training waits for."""
    config = json.loads(adapter.to_json_string())
    config.pop("_name_or_path", None)  # where it was loaded from concerns this machine only
    weights = _copied(adapter.state_dict())
    return Snapshot(
        json.dumps(config, indent=2) + "\n", weights, TrainingState(_copied(training.tensors), training.state)
    )


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def write(output_dir: Path, snapshot: Snapshot) -> Path:
    """Writes checkpoint-{step} and returns its folder. Raises OSError, also where the disk holds something else than
    what was written; there is then no folder of that name that was not there before."""
    final = output_dir / f"{PREFIX}{snapshot.step}"
    aside = output_dir / f".{final.name}{_WRITING}"
    try:
        _write(aside, snapshot)
        fault = damage(aside, from_disk=True)
        if fault:
            raise OSError(f"it was written, but {fault}")
        if final.exists():
            _set_aside(final)
        move_atomic(aside, final)
    finally:
        _remove(aside)
    return final


def _write(aside: Path, snapshot: Snapshot) -> None:
    tidy(aside.parent)  # also what could not be removed when an earlier one failed
    (aside / WEIGHTS).parent.mkdir(parents=True)
    (aside / CONFIG).write_text(snapshot.config, encoding="utf-8")
    files = {
        CONFIG: hashlib.sha256(snapshot.config.encode()).hexdigest(),
        TENSORS: write_tensors(aside / TENSORS, snapshot.training.tensors),
        WEIGHTS: write_tensors(aside / WEIGHTS, snapshot.weights, {"format": "pt"}),
    }
    state = {"schema": SCHEMA, **snapshot.training.state, "files": files}
    text = json.dumps({**state, "sha256": _digest(state)}, indent=1)
    (aside / "state.json").write_text(text, encoding="utf-8")


def rotate(output_dir: Path, keep: Keep, best: int | None = None) -> None:
    """Removes the checkpoints that are neither among the newest, nor of a kept update, nor the best."""
    if keep.last is None:
        return
    for step, folder in list_checkpoints(output_dir)[: -keep.last]:
        if step != best and (keep.every is None or step % keep.every):
            _remove(folder)


def _remove(folder: Path) -> None:
    """A link is taken away itself, and never what it leads to."""
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def tidy(output_dir: Path) -> None:
    """Removes what was being written when a process was killed, or a disk failed. The folder must be locked."""
    for left in output_dir.glob(f".{PREFIX}*{_WRITING}"):
        _remove(left)


def set_aside_after(output_dir: Path, step: int) -> list[str]:
    """Renames the checkpoints after `step`, which the run will make anew; a line about each."""
    return [
        f"{folder.name} comes after step {step} and is kept as {_set_aside(folder).name}"
        for newer, folder in list_checkpoints(output_dir)
        if newer > step
    ]


def _set_aside(folder: Path) -> Path:
    place = folder.with_name(f"{folder.name}{_SET_ASIDE}")
    _remove(place)
    return folder.rename(place)


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, oldest first; other names are passed over."""
    found = []
    for path in output_dir.glob(f"{PREFIX}*"):
        number = path.name.removeprefix(PREFIX)
        if path.is_dir() and number.isascii() and number.isdecimal():
            found.append((int(number), path))
    return sorted(found)


def find(output_dir: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint that `resume` names, and a line about each newer one that had to be skipped.

    `auto`, or `latest`, takes the newest whole one, or None if there is none at all. A path, or a name inside the
    output folder, must exist and be whole. Raises UserError, also where it was written by a newer version.
    """
    if resume in ("auto", "latest"):
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
        f"--resume_from_checkpoint {resume}: no such folder; in {output_dir} there are: {known}. Name one, or `auto`."
    )


def damage(folder: Path, *, from_disk: bool = False) -> str | None:
    """What is wrong with a checkpoint, or None if it is whole. Raises UserError for one of a newer version."""
    try:
        state = parse_json(_regular(folder / "state.json").read_bytes())
        # Before the version: a flipped bit makes schema 3 of schema 2. Every later schema keeps this checksum.
        if "sha256" in state and state.pop("sha256") != _digest(state):
            return "state.json does not have the checksum it was written with"
        _check_version(state, folder)
        state = _migrated(state)
        fault = _malformed(state)
        if fault:
            return f"state.json cannot be read ({fault})"
        for name, digest in state["files"].items():
            if sha256(_regular(folder / name), from_disk=from_disk) != digest:
                return f"{name} does not have the checksum it was written with"
    except FileNotFoundError as fault:
        return f"{Path(str(fault.filename)).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ArithmeticError) as fault:
        return f"state.json cannot be read ({fault})"
    return None


def _regular(file: Path) -> Path:
    """Raises ValueError for a link, a device and whatever else is no plain file."""
    if not stat.S_ISREG(file.lstat().st_mode):
        raise ValueError(f"{file.name} is no plain file")
    return file


_NEEDED: dict[str, type] = {"step": int, "numbers": dict, "scaler": dict, "options": dict, "plan": dict, "files": dict}
"""Parts of state.json and what each is."""
_PLANNED = ("seed", "global_batch", "samples")
"""Whole numbers of the plan that a run which goes on is held to."""


def _malformed(state: dict[str, Any]) -> str | None:
    for name, kind in _NEEDED.items():
        if type(state.get(name)) is not kind:
            return f"{name} is no {kind.__name__}"
    if state["step"] < 0 or any(type(state["plan"].get(name)) is not int for name in _PLANNED):
        return "step or plan is none of this program"
    if state["files"].keys() != {CONFIG, WEIGHTS, TENSORS}:
        return "files lists others than those of a checkpoint"
    return None


def _digest(state: Mapping[str, Any]) -> str:
    """Of state.json's content without its own checksum, whatever its spaces."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _check_version(state: Any, folder: Path) -> None:
    schema = state["schema"]
    if type(schema) is int and schema > SCHEMA:
        raise UserError(
            f"{folder}: it was written by a newer version (schema {schema}, this one reads up to {SCHEMA}): "
            "update the package, or resume from another checkpoint by name."
        )


def _from_1(state: dict[str, Any]) -> dict[str, Any]:
    """Schema 1 kept the seed and a count of samples where 2 keeps the plan."""
    step = state["step"]
    plan = {"seed": state["seed"], "global_batch": state["samples"] // step if step else 0, "samples": 0}
    return {**state, "plan": plan}


MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1}
"""Schema -> what makes its state one of the next schema. A number of 0 in a plan means: was not kept."""


def _migrated(state: dict[str, Any]) -> dict[str, Any]:
    while state["schema"] != SCHEMA:
        state = {**MIGRATIONS[state["schema"]](state), "schema": state["schema"] + 1}
    return state


def load(folder: Path) -> tuple[dict[str, Tensor], TrainingState]:
    """(adapter weights as published, training state). Raises UserError if a file cannot be read."""
    try:
        weights = load_file(folder / WEIGHTS)
        tensors = load_file(folder / TENSORS)
    except (OSError, SafetensorError) as fault:
        raise UserError(f"{folder}: {fault}; resume from another checkpoint.") from fault
    return weights, TrainingState(tensors, read_state(folder))


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint that `find` has found whole, in the present schema."""
    return _migrated(parse_json((folder / "state.json").read_bytes()))


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
