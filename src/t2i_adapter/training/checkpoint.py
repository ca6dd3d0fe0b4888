"""Checkpoints: complete or not there at all, and without pickle.

    checkpoint-500/
      t2iadapter/             the adapter (the EMA, if there is one): opens with T2IAdapter.from_pretrained;
                              of several adapters t2iadapter-0/, t2iadapter-1/, ...
      training.safetensors    what else a resume needs: the optimiser's tensors, and the raw weights beside an EMA
      state.json              schema, step, plan, options, numbers, sha256 of every file and of itself

A checkpoint is written to a temporary folder, flushed, read back from the disk and renamed. Old checkpoints are removed
only after that. On a resume, checkpoints newer than the one in use are renamed, so the newest is always of this run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from t2i_adapter.errors import UserError
from t2i_adapter.export.adapter import adapter_config, write_adapter_files
from t2i_adapter.files import move_atomic, parse_json, sha256
from t2i_adapter.models import record
from t2i_adapter.models.joint import adapters_in
from t2i_adapter.tensors import write_tensors

SCHEMA = 2
PREFIX = "checkpoint-"
ADAPTER = "t2iadapter"
TENSORS = "training.safetensors"
STATE = "state.json"
_SET_ASIDE = ".set-aside"
_WRITING = ".writing"


@dataclass(frozen=True)
class TrainingState:
    """What a resume needs besides the adapter. tensors: by flat names; state: JSON with at least `_STATE_TYPES`."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """A copy of a run's state in host memory. adapters: (config.json, weights) of the EMA or the adapter, or of each of
    several."""

    adapters: tuple[tuple[str, dict[str, Tensor]], ...]
    training: TrainingState

    @property
    def step(self) -> int:
        return self.training.state["step"]

    @property
    def nbytes(self) -> int:
        """Approximate size on disk."""
        parts = (self.training.tensors, *(weights for _, weights in self.adapters))
        return sum(tensor.nbytes for part in parts for tensor in part.values())


@dataclass(frozen=True)
class KeepPolicy:
    """Which checkpoints stay: the `last` newest (None: all), and those of every `every`-th step."""

    last: int | None = None
    every: int | None = None


def snapshot(adapter: Any, training: TrainingState) -> Snapshot:
    """Copies everything to host memory; training waits for this part of saving alone."""
    adapters = tuple((adapter_config(part), _copied(part.state_dict())) for part in adapters_in(adapter))
    return Snapshot(adapters, TrainingState(_copied(training.tensors), training.state))


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def write(output_dir: Path, snapshot: Snapshot) -> Path:
    """Writes checkpoint-{step} and returns its folder.

    Raises OSError, also if the disk holds other bytes than were written; no new folder of that name exists then.
    """
    final = output_dir / f"{PREFIX}{snapshot.step}"
    temporary = output_dir / f".{final.name}{_WRITING}"
    try:
        _write(temporary, snapshot)
        fault = damage(temporary, from_disk=True)
        if fault:
            raise OSError(f"it was written, but {fault}")
        if final.exists():
            _set_aside(final)
        move_atomic(temporary, final)
    finally:
        _remove(temporary)
    return final


def _write(temporary: Path, snapshot: Snapshot) -> None:
    tidy(temporary.parent)  # frees the space of earlier saves that failed
    files = {}
    for name, (config, weights) in zip(folders_of(len(snapshot.adapters)), snapshot.adapters, strict=True):
        (temporary / name).mkdir(parents=True)
        written = write_adapter_files(temporary / name, config, weights)
        files |= {f"{name}/{file}": digest for file, digest in written.items()}
    files[TENSORS] = write_tensors(temporary / TENSORS, snapshot.training.tensors)
    state = {"schema": SCHEMA, **snapshot.training.state, "files": files}
    text = json.dumps({**state, "sha256": _digest(state)}, indent=1)
    (temporary / STATE).write_text(text, encoding="utf-8")


def folders_of(count: int) -> list[str]:
    """Names of the folders of a checkpoint's adapters."""
    return [ADAPTER] if count == 1 else [f"{ADAPTER}-{number}" for number in range(count)]


def _folders(files: Collection[str]) -> list[str]:
    """The folders of the adapters that a checkpoint's list of files has."""
    return folders_of(max(1, (len(files) - 1) // 2))  # each has its config and its weights


def rotate(output_dir: Path, keep: KeepPolicy, kept: Collection[int] = ()) -> None:
    """Removes the checkpoints that the policy does not keep. kept: steps of those that stay in any case."""
    if keep.last is None:
        return
    for step, folder in list_checkpoints(output_dir)[: -keep.last]:
        if step not in kept and (keep.every is None or step % keep.every):
            _remove(folder)


def _remove(folder: Path) -> None:
    """Removes a folder; of a link, the link itself and not its target."""
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def tidy(output_dir: Path) -> None:
    """Removes checkpoints that a killed process or a failed disk left half written. The folder must be locked."""
    for leftover in output_dir.glob(f".{PREFIX}*{_WRITING}"):
        _remove(leftover)


def set_aside_after(output_dir: Path, step: int) -> list[str]:
    """Renames the checkpoints after `step`, which the resumed run writes again; returns a line about each."""
    return [
        f"{folder.name} is newer than step {step} and is renamed to {_set_aside(folder).name}"
        for newer, folder in list_checkpoints(output_dir)
        if newer > step
    ]


def _set_aside(folder: Path) -> Path:
    place = folder.with_name(f"{folder.name}{_SET_ASIDE}")
    _remove(place)
    return folder.rename(place)


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, oldest first; other names are skipped."""
    found = []
    for path in output_dir.glob(f"{PREFIX}*"):
        number = path.name.removeprefix(PREFIX)
        if path.is_dir() and number.isascii() and number.isdecimal():
            found.append((int(number), path))
    return sorted(found)


def find(output_dir: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint that `resume` names, and a line about each newer one that is damaged and was skipped.

    `auto` or `latest` is the newest complete one, or None if there is none at all. A path, or a name inside the output
    folder, must exist and be complete. Raises UserError, also if a newer version of this package wrote it.
    """
    if resume in ("auto", "latest"):
        skipped = []
        for _, folder in reversed(list_checkpoints(output_dir)):
            fault = damage(folder)
            if fault is None:
                return folder, skipped
            skipped.append(f"{folder} is skipped: {fault}")
        if skipped:
            raise UserError("No complete checkpoint to resume from. " + " ".join(skipped))
        return None, []
    for folder in (Path(resume), output_dir / resume):
        if folder.is_dir():
            fault = damage(folder)
            if fault is not None:
                raise UserError(f"{resume}: {fault}", option="checkpoint.resume")
            return folder, []
    known = ", ".join(path.name for _, path in list_checkpoints(output_dir)) or "none"
    raise UserError(
        f"{resume}: no such folder; checkpoints in {output_dir}: {known}. Name one, or `auto`.",
        option="checkpoint.resume",
    )


def damage(folder: Path, *, from_disk: bool = False) -> str | None:
    """What is wrong with a checkpoint, or None if it is complete. Raises UserError if a newer version wrote it."""
    try:
        state = parse_json(_regular_file(folder / STATE).read_bytes())
        # Before the version: a flipped bit makes schema 3 of schema 2. Every later schema keeps this checksum.
        if "sha256" in state and state.pop("sha256") != _digest(state):
            return f"{STATE} does not have the checksum it was written with"
        _check_version(state, folder)
        fault = _malformed(state)
        if fault:
            return f"{STATE} cannot be read ({fault})"
        for name, digest in state["files"].items():
            if sha256(_regular_file(folder / name), from_disk=from_disk) != digest:
                return f"{name} does not have the checksum it was written with"
    except FileNotFoundError as fault:
        return f"{Path(str(fault.filename)).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ArithmeticError) as fault:
        return f"{STATE} cannot be read ({fault})"
    return None


def _regular_file(file: Path) -> Path:
    """Returns `file`. Raises ValueError for a link, a device or anything else that is not a regular file."""
    if not stat.S_ISREG(file.lstat().st_mode):
        raise ValueError(f"{file.name} is not a regular file")
    return file


_STATE_TYPES: dict[str, type] = {
    "step": int,
    "numbers": dict,
    "scaler": dict,
    "options": dict,
    "plan": dict,
    "files": dict,
}
"""Required parts of state.json and the type of each."""
_ADAPTER_FILES = (record.CONFIG, record.WEIGHTS)
_PLAN_INTEGERS = ("seed", "global_batch", "samples")
"""Integers of the plan that a resume compares."""


def _malformed(state: dict[str, Any]) -> str | None:
    for name, kind in _STATE_TYPES.items():
        if type(state.get(name)) is not kind:
            return f"{name} is not of type {kind.__name__}"
    if state["step"] < 0 or any(type(state["plan"].get(name)) is not int for name in _PLAN_INTEGERS):
        return "malformed step or plan"
    folders = _folders(state["files"])
    if state["files"].keys() != {f"{name}/{file}" for name in folders for file in _ADAPTER_FILES} | {TENSORS}:
        return "files lists other files than those of a checkpoint"
    return None


def _digest(state: Mapping[str, Any]) -> str:
    """Checksum of state.json's content without its "sha256", independent of white space and the order of keys."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _check_version(state: Any, folder: Path) -> None:
    schema = state["schema"]
    if type(schema) is int and schema > SCHEMA:
        raise UserError(
            f"{folder}: a newer version of this package wrote it (schema {schema}, this one reads up to {SCHEMA}): "
            "update the package, or resume from another checkpoint by name."
        )
    if schema != SCHEMA:
        raise ValueError(f"unknown schema {schema!r}")


def load(folder: Path) -> tuple[dict[str, Tensor], TrainingState]:
    """(weights of the EMA or the adapter, training state); of several adapters, the weights of a `JointAdapter`.

    Raises UserError if a file cannot be read.
    """
    state = read_state(folder)
    try:
        parts = [load_file(folder / name / record.WEIGHTS) for name in _folders(state["files"])]
        tensors = load_file(folder / TENSORS)
    except (OSError, SafetensorError) as fault:
        raise UserError(f"{folder}: {fault}; resume from another checkpoint.") from fault
    joined = {f"adapters.{i}.{name}": tensor for i, part in enumerate(parts) for name, tensor in part.items()}
    return parts[0] if len(parts) == 1 else joined, TrainingState(tensors, state)


def read_tensors(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Those tensors of training.safetensors that exist. Raises UserError if the file cannot be read."""
    try:
        with safe_open(folder / TENSORS, "pt") as file:
            return {name: file.get_tensor(name) for name in set(names) & set(file.keys())}
    except (OSError, SafetensorError) as fault:
        raise UserError(f"{folder}: {fault}; resume from another checkpoint.") from fault


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint that `find` returned."""
    state = parse_json((folder / STATE).read_bytes())
    old_name = "passed_over"  # of checkpoints written before `skipped_steps`
    return {"skipped_steps": state.get(old_name, 0), **state}


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state under names "optimizer.{parameter}.{key}": its tensors, and its other values as JSON."""
    tensors, numbers = {}, {}
    for index, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            (tensors if isinstance(value, Tensor) else numbers)[f"optimizer.{index}.{key}"] = value
    return tensors, numbers


def unpack_optimizer(optimizer: torch.optim.Optimizer, packed: Mapping[str, Any]) -> None:
    """Restores what `pack_optimizer` returned: `packed` holds its tensors and numbers together."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in packed.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, key = rest.partition(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
