"""Reads a run from its folder alone: its state, options and numbers. Damaged or missing files never raise."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import yaml

from t2i_adapter.config.recipe import RENAMED, check_depth
from t2i_adapter.config.tree import Config, flat, to_dict
from t2i_adapter.errors import UserError
from t2i_adapter.models import record
from t2i_adapter.runs import lock
from t2i_adapter.runs import metrics as log
from t2i_adapter.runs.metrics import Metrics, finite, integer, number, read_file, read_json, text_of
from t2i_adapter.runs.record import FILE as RECORD
from t2i_adapter.runs.record import RUNNING

State = Literal["running", "finished", "stopped", "failed", "killed", "unfinished", "adapter"]
"""running: a process holds the lock. killed: it ended without a word. unfinished: no record, and no adapter at the end.
adapter: a finished adapter of another trainer, without a log."""
OPTIONS, BEST, CHECKPOINT = "options.yaml", "best.json", "checkpoint-"
WINDOW = 100
"""Updates whose losses are averaged."""
MOST_FILES = 50_000
"""Files whose sizes are added at most."""
_NO_OPTION = ("output_dir", "checkpoint.resume", "checkpoint.allow_changed", "train.seed")
"""Options that do not describe a run: where it is, how it was resumed, a seed that every run has."""


@dataclass(frozen=True)
class Run:
    """A run's folder at the time of reading. Times are seconds since 1970; what is not known is None or empty.

    Attributes:
        state: see `State`.
        record: the content of run.json.
        now: when it was read.
    """

    folder: Path
    state: State
    record: dict[str, Any]
    metrics: Metrics
    now: float = field(default_factory=time.time)

    @property
    def name(self) -> str:
        """The folder's name, with its parent's if it is called `adapter`."""
        whole = self.folder.absolute()
        return f"{whole.parent.name}/{whole.name}" if whole.name == "adapter" else whole.name

    @property
    def reason(self) -> str:
        """Why it stopped or failed, for people."""
        return text_of(self.record.get("reason"))

    @property
    def command(self) -> str:
        """The command line that started it."""
        return text_of(self.record.get("command"))

    @property
    def resume_command(self) -> str:
        """The command line that resumes it, if that makes sense in this state."""
        return text_of(self.record.get("resume")) if self.state in ("stopped", "failed", "killed") else ""

    @cached_property
    def checkpoints(self) -> list[int]:
        """Steps of the checkpoints, oldest first."""
        return sorted(_checkpoint_steps(self.folder))

    @cached_property
    def best(self) -> tuple[int, float] | None:
        """(step, score) of the checkpoint that is marked as the best, if it exists."""
        content = read_json(self.folder / BEST)
        step, score = integer(content.get("step")), number(content.get("score"))
        return (step, score) if step is not None and score is not None and step in self.checkpoints else None

    @cached_property
    def adapter(self) -> dict[str, Any] | None:
        """The content of t2i_adapter.json, empty if the adapter has none; None if the folder holds no adapter."""
        return adapter_of(self.folder)

    @cached_property
    def options(self) -> dict[str, Any]:
        """The run's options by their paths, as options.yaml has them; empty if it cannot be read."""
        found = flat(_options(self.folder / OPTIONS))
        return {RENAMED.get(name, name): value for name, value in found.items()}

    @cached_property
    def changed_options(self) -> dict[str, Any]:
        """The options that differ from their defaults, by their paths."""
        defaults = flat(to_dict(Config()))
        return {
            name: value
            for name, value in self.options.items()
            if name not in _NO_OPTION and defaults.get(name) != value and value is not None
        }

    @cached_property
    def step(self) -> int:
        """Updates made so far."""
        return max(self.metrics.last_step, *self.checkpoints[-1:], *self._adapter_steps(), 0)

    @cached_property
    def steps(self) -> int | None:
        """Updates that the run was to make."""
        planned = integer(self.record.get("steps")) or integer(self.options.get("train.max_steps"))
        return planned or next(iter(self._adapter_steps()), None)

    def _adapter_steps(self) -> list[int]:
        steps = integer((self.adapter or {}).get("steps"))
        return [] if steps is None or self.state == "running" else [steps]

    @property
    def started(self) -> float:
        """When the run began; of a run without run.json, when its oldest file was written."""
        known = number(self.record.get("started"))
        if known is not None:
            return known
        names = (OPTIONS, log.FILE, record.CONFIG, record.FILE_NAME)
        times = [at for name in names if (at := _modified(self.folder / name)) is not None]
        return min(times, default=_modified(self.folder) or 0.0)

    @property
    def ended(self) -> float | None:
        """When the run ended; of a killed one, when it logged last. None while it runs."""
        if self.state == "running":
            return None
        known = number(self.record.get("ended"))
        return known if known is not None else _modified(self.folder / log.FILE) or _modified(self.folder)

    @cached_property
    def loss(self) -> float | None:
        """Mean loss of the last `WINDOW` updates."""
        logged = self.metrics.numbers("loss", last=WINDOW)
        last = [loss for step, loss in logged if step > logged[-1][0] - WINDOW]
        return sum(last) / len(last) if last else None

    @cached_property
    def samples_per_s(self) -> float | None:
        """Mean speed of the last ten log entries."""
        speeds = [speed for _, speed in self.metrics.numbers("samples_per_s", last=10)]
        return sum(speeds) / len(speeds) if speeds else None

    @property
    def seconds_left(self) -> float | None:
        """How long a running run still trains, the time of its looks included."""
        batch, speed = integer(self.record.get("global_batch")), self.samples_per_s
        if self.state != "running" or not batch or not speed or self.steps is None:
            return None
        look = self.metrics.last_look
        share = look.share or 0.0 if look else 0.0
        return max(0, self.steps - self.step) * batch / speed / (1 - min(share, 0.9))

    @cached_property
    def size(self) -> int:
        """Bytes of all files in the folder; links are not followed."""
        return sum(entry.stat(follow_symlinks=False).st_size for entry in islice(_files(self.folder), MOST_FILES))

    def to_json(self) -> dict[str, Any]:
        """Everything that `runs ls` knows, as plain JSON types; numbers that are not finite become null."""
        return {**self.summary(), "options": finite(self.changed_options)}

    def summary(self) -> dict[str, Any]:
        """As `to_json`, without the options: to read their YAML takes ten times as long as all else."""
        look, use, score = self.metrics.last_look, self.metrics.last_use, self.metrics.last_score
        advice = self.metrics.advice[-1:]
        content = {
            "folder": str(self.folder),
            "state": self.state,
            "reason": self.reason,
            "resume": self.resume_command,
            "step": self.step,
            "steps": self.steps,
            "started": self.started,
            "ended": self.ended,
            "seconds_left": self.seconds_left,
            "loss": self.loss,
            "samples_per_s": self.samples_per_s,
            "gain": {
                "step": look.step,
                "on": look.on,
                "use": {"step": use[0], **use[1].to_json()} if use else None,
                "benefit": look.benefit and look.benefit.to_json(),
            }
            if look
            else None,
            "score": {"step": score.step, "metric": score.metric}
            | {name: value.to_json() for name, value in score.columns.items()}
            if score
            else None,
            "advice": vars(advice[0]) if advice else None,
            "warnings": len(self.metrics.warnings),
            "checkpoints": self.checkpoints,
            "best": {"step": self.best[0], "score": self.best[1]} if self.best else None,
            "bytes": self.size,
        }
        return finite(content)


def read_run(folder: Path) -> Run:
    """The run in a folder; of any other folder, a run of which nothing is known."""
    content = read_json(folder / RECORD)
    return Run(folder, _state(folder, content), content, Metrics(folder / log.FILE))


def _state(folder: Path, content: dict[str, Any]) -> State:
    outcome = content.get("outcome")
    if outcome in ("finished", "stopped", "failed"):
        return outcome
    if lock.holder(folder) is not None:
        return "running"
    if outcome == RUNNING:
        return "killed"
    if adapter_of(folder) is None:
        return "unfinished"
    return "finished" if (folder / log.FILE).is_file() else "adapter"


def _checkpoint_steps(folder: Path) -> Iterator[int]:
    try:
        names = [path.name for path in folder.iterdir()]
    except (OSError, ValueError):
        return
    for name in names:
        digits = name.removeprefix(CHECKPOINT)
        if digits != name and digits.isascii() and digits.isdecimal() and len(digits) < 16 and (folder / name).is_dir():
            yield int(digits)


def adapter_of(folder: Path) -> dict[str, Any] | None:
    """The content of t2i_adapter.json, empty if there is none; None if the folder holds no adapter."""
    is_adapter = read_json(folder / record.CONFIG).get("_class_name") == "T2IAdapter"
    return read_json(folder / record.FILE_NAME) if is_adapter else None


def _options(file: Path) -> dict[str, Any]:
    """The content of options.yaml without a check of its options, which may be those of another version. A file with
    references is not one that a run wrote: it could expand without end."""
    try:
        text = read_file(file, 1 << 20).decode()
        check_depth(text, file)
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            return {}
        content = yaml.safe_load(text)
    except (UserError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) and all(isinstance(name, str) for name in flat_names(content)) else {}


def flat_names(tree: dict[Any, Any]) -> Iterator[Any]:
    """Every key of a mapping and of the mappings in it."""
    for name, value in tree.items():
        yield name
        if isinstance(value, dict):
            yield from flat_names(value)


def _modified(path: Path) -> float | None:
    try:
        return path.stat(follow_symlinks=False).st_mtime
    except (OSError, ValueError):
        return None


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    waiting = [str(folder)]
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
        except OSError:
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
            elif entry.is_file(follow_symlinks=False):
                yield entry
