"""The kill campaign: a short run is killed at random moments, again and again, and the same command resumes it."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from support.forks import End, Forks, session_members
from support.runs import read_metrics

from t2i_adapter.training import checkpoint

WORDS = [
    *("train", "--data", "data", "--data.resolution", "64", "--train.max_steps", "12"),
    *("--train.batch_size", "1", "--train.seed", "3", "--optim.lr", "1e-3", "--checkpoint.every", "2"),
    *("--checkpoint.keep", "2", "--tracking.log_every", "1", "--tracking.report_to", "none"),
    *("--checkpoint.resume", "auto", "--data.num_workers", "1"),
]
"""The command of a short run, without its output and cache folders."""
LEFTOVERS = ("*.writing", "*.tmp", "*.part", ".saving*", "*.trash")
WEIGHTS = "diffusion_pytorch_model.safetensors"
SAVING = 0.3
"""Seconds; longest time of a save in these runs."""
WORKERS_END = 30.0
"""Seconds in which the loader processes of a killed run must end; they check for their parent every 5 s."""


@dataclass
class Result:
    """What a campaign found. Every list holds faults; all are empty if no run was harmed."""

    kills: int = 0
    starts: int = 0
    runs: int = 0
    moments: dict[str, int] = field(default_factory=dict)
    checkpoints_lost: list[str] = field(default_factory=list)
    failed_starts: list[str] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        return [*self.checkpoints_lost, *self.failed_starts, *self.left_behind, *self.differing]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "faults": len(self.faults)}


def make_data(folder: Path) -> None:
    """Writes the data that WORDS train on."""
    words = ["make-data", "shapes", "--out", "data", "--num", "8", "--size", "64", "--seed", "0"]
    subprocess.run([sys.executable, "-m", "t2i_adapter", *words], cwd=folder, check=True, timeout=120)


def campaign(
    forks: Forks,
    words: Sequence[str],
    *,
    kills: int,
    seed: int = 0,
    max_kills_per_run: int = 10,
    minutes: float = 600,
    log: Callable[[str], None] = print,
) -> Result:
    """Runs `words` undisturbed, then kills further runs `kills` times in all, at most `max_kills_per_run` times each.

    No run begins after `minutes`. `words` name neither output folder nor cache folder: each run has new ones, so that
    kills also hit the preparation of the cache. A third of the kills come at any time of the run, uniformly; a third
    after the first losses; a third while a checkpoint is being written.
    """
    choices, found, moments = random.Random(seed), Result(), Counter[str]()
    alone, span = undisturbed(forks, words)
    last = time.monotonic() + 60 * minutes
    while found.kills < kills and time.monotonic() < last:
        out = forks.folder / f"run-{found.runs}"
        left = min(max_kills_per_run, kills - found.kills)
        newest = 0
        while True:
            end = start(forks, words, out, *(moment_to_kill(choices, out, span) if left else (None, "")))
            found.starts += 1
            newest = newest_checkpoint(out, newest, found)
            if not end.killed:
                break
            moments[moment(end.output)] += 1
            left, found.kills = left - 1, found.kills + 1
            log(f"kill {found.kills} of {kills} after {end.seconds:.1f} s, newest checkpoint {newest}")
        found.runs += 1
        if end.code != 0:
            found.failed_starts.append(f"{out.name}: exit code {end.code}: {end.output[-2000:]}")
            break
        found.differing += [f"{out.name}: {line}" for line in differences(alone, out)]
        found.left_behind += left_behind(out) + outlived(forks.log)
        shutil.rmtree(out)
    found.moments = dict(moments)
    return found


def undisturbed(forks: Forks, words: Sequence[str]) -> tuple[Path, float]:
    """Runs `words` without faults; returns the run's folder and its seconds."""
    alone = forks.folder / "alone"
    end = start(forks, words, alone)
    if end.code != 0:
        raise RuntimeError(f"the undisturbed run failed with exit code {end.code}:\n{end.output}")
    return alone, end.seconds


def moment_to_kill(choices: random.Random, out: Path, span: float) -> tuple[float, str]:
    """Draws (kill_after, once) for `Forks.run`. span: seconds of a whole run."""
    kind = choices.choice(("any", "training", "saving"))
    if kind == "any":
        return choices.uniform(0, span), ""
    if kind == "training":
        return choices.uniform(0, span / 2), str(out / "metrics.jsonl")
    return choices.uniform(0, SAVING), str(out / ".checkpoint-*.writing")


def start(forks: Forks, words: Sequence[str], out: Path, kill_after: float | None = None, once: str = "") -> End:
    places = ["--output_dir", str(out), "--data.prepared_dir", str(forks.folder / f"{out.name}-cache")]
    return forks.run([*words, *places], kill_after, once)


def newest_checkpoint(out: Path, before: int, found: Result) -> int:
    """Returns the step of the newest undamaged checkpoint; adds a fault if it is lower than `before`."""
    undamaged = [step for step, folder in checkpoint.list_checkpoints(out) if checkpoint.damage(folder) is None]
    newest = max(undamaged, default=0)
    if newest < before:
        found.checkpoints_lost.append(f"{out.name}: checkpoint-{before} is gone, {newest} is the newest")
    return newest


def moment(output: str) -> str:
    """What a killed start was doing, found from its output."""
    marks = {"Done\n": "after the last step", "training: ": "training", "prepared: ": "loading the base"}
    return next((name for mark, name in marks.items() if mark in output), "starting or preparing")


def differences(alone: Path, out: Path, *, missing_lines: bool = False) -> list[str]:
    """Names what differs in any bit between two finished runs: weights, optimiser, losses, gradient norms, rates.

    missing_lines: allows missing lines of metrics.jsonl, which a full disk costs. The other lines must be equal.
    """
    last = checkpoint.list_checkpoints(alone)[-1][1].name
    found = []
    for name in (WEIGHTS, f"{last}/t2iadapter/{WEIGHTS}", f"{last}/training.safetensors"):
        if not (out / name).is_file():
            found.append(f"{name} is missing")
            continue
        ours, theirs = load_file(alone / name), load_file(out / name)
        if ours.keys() != theirs.keys():
            found.append(f"{name} holds other tensors")
            continue
        found += [f"{name}: {key}" for key, tensor in ours.items() if not torch.equal(tensor, theirs[key])]
    wanted, there = curve(alone), curve(out)
    if there != [row for row in wanted if row in there or not missing_lines]:
        found.append("metrics.jsonl")
    return found


def curve(out: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl without the speed, which depends on the machine."""
    return [
        {key: row[key] for key in ("step", "loss", "grad_norm", "lr")} for row in read_metrics(out) if "loss" in row
    ]


def left_behind(out: Path) -> list[str]:
    """Files that a user would have to remove by hand: half-written files and damaged checkpoints."""
    litter = [path for pattern in LEFTOVERS for path in out.rglob(pattern)]
    broken = [folder for _, folder in checkpoint.list_checkpoints(out) if checkpoint.damage(folder)]
    return [str(path.relative_to(out.parent)) for path in (*litter, *broken)]


def outlived(log: Path) -> list[str]:
    """Processes of a start that still run WORKERS_END seconds after it ended."""
    end = time.monotonic() + WORKERS_END
    while (members := session_members(log)) and time.monotonic() < end:
        time.sleep(0.2)
    return [f"process {member} outlived its run" for member in members]
