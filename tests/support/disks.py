"""Campaigns against disks: full for a while, read-only for a while, and damaged files."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from support.forks import Forks, any_match
from support.kills import (
    Result,
    curve,
    differences,
    left_behind,
    moment_to_kill,
    newest_checkpoint,
    outlived,
    start,
    undisturbed,
)

from t2i_adapter.models.record import CONFIG, WEIGHTS
from t2i_adapter.training import checkpoint

FULL_DISK = "96m"
"""Size of the disk: more than three checkpoints and the adapter of a run take."""
MOST_STARTS = 12
"""Starts of a run on a failing disk; the next start has a good disk."""
KILLED = 0.25
"""Share of the starts on a failing disk that are also killed."""


class Disk(Protocol):
    """A folder whose disk fails between `spoil` and `mend`."""

    folder: Path

    def spoil(self, choices: random.Random) -> None: ...

    def mend(self) -> None: ...


@dataclass
class FullDisk:
    """A small tmpfs. `spoil` fills it up to a random rest: 0 bytes, or less than two checkpoints take."""

    folder: Path
    room: int = 0
    """Bytes of two checkpoints; set after the undisturbed run."""

    def spoil(self, choices: random.Random) -> None:
        rest = choices.choice((0, choices.randint(0, self.room)))
        with (self.folder / "ballast").open("ab") as ballast:
            for _ in range(20):  # again: the run writes at the same time
                state = os.statvfs(self.folder)
                free = state.f_bavail * state.f_frsize
                if free <= rest:
                    break
                try:
                    os.posix_fallocate(ballast.fileno(), 0, ballast.tell() + free - rest)
                except OSError:
                    continue
                ballast.seek(0, os.SEEK_END)

    def mend(self) -> None:
        (self.folder / "ballast").unlink(missing_ok=True)


@dataclass
class ReadOnly:
    """A folder that `spoil` covers with a read-only mount of itself, which root cannot write to either."""

    folder: Path
    view: Path
    """A read-only mount of the folder."""

    def spoil(self, choices: random.Random) -> None:
        mount("--bind", self.view, self.folder)

    def mend(self) -> None:
        unmount(self.folder)


@contextmanager
def full_disk(folder: Path) -> Iterator[FullDisk]:
    """Raises OSError if the mount fails, as it does without root."""
    disk = folder / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", f"size={FULL_DISK}", "tmpfs", disk)
    try:
        yield FullDisk(disk)
    finally:
        unmount(disk)


@contextmanager
def read_only_folder(folder: Path) -> Iterator[ReadOnly]:
    """Raises OSError if the mount fails, as it does without root."""
    disk, view = folder / "disk", folder / "view"
    disk.mkdir()
    view.mkdir()
    mount("--bind", disk, view)
    try:
        mount("-o", "remount,bind,ro", view)
        yield ReadOnly(disk, view)
    finally:
        unmount(view)


def mount(*words: str | Path) -> None:
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"mount: {done.stderr.strip()}")


def unmount(place: Path) -> None:
    subprocess.run(["umount", "--lazy", str(place)], check=True, timeout=60)


class Spells(threading.Thread):
    """A thread that spoils and mends a disk at random moments of a run, until `end`."""

    def __init__(self, disk: Disk, choices: random.Random, out: Path, span: float) -> None:
        super().__init__(name="spells", daemon=True)
        self._disk, self._choices, self._out, self._span = disk, choices, out, span
        self._over = threading.Event()
        self.count = 0

    def run(self) -> None:
        while not self._over.is_set():
            seconds, once = moment_to_kill(self._choices, self._out, self._span)
            while once and not any_match(once) and not self._over.wait(0.005):
                pass
            if self._over.wait(seconds):
                return
            self._disk.spoil(self._choices)
            self.count += 1
            self._over.wait(self._choices.uniform(0.1, self._span))
            self._disk.mend()

    def end(self) -> None:
        self._over.set()
        self.join(60)


def failing_disk(
    forks: Forks,
    words: Sequence[str],
    disk: Disk,
    *,
    spells: int,
    seed: int = 0,
    minutes: float = 600,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Runs `words` undisturbed, then on a disk that fails for a while, again and again; kills some starts too.

    The cache lies on another disk. A start that the failing disk ends must exit with code 2 and one line, and the same
    command must resume. A run on a full disk may lose a checkpoint that could not be written, and lines of
    metrics.jsonl. Ends after `spells` failures or `minutes`.
    """
    choices, found, counts = random.Random(seed), Result(), Counter[str]()
    alone, span = undisturbed(forks, words)
    if isinstance(disk, FullDisk):
        disk.room = 2 * size_of(checkpoint.list_checkpoints(alone)[-1][1])
    last = time.monotonic() + 60 * minutes
    while counts["spells"] < spells and time.monotonic() < last and not found.faults:
        out = disk.folder / f"run-{found.runs}"
        counts.update(_run_on(forks, words, disk, out, choices, span, found))
        end = start(forks, words, out)  # the disk works again
        found.starts, found.runs = found.starts + 1, found.runs + 1
        newest_checkpoint(out, 0, found)
        if end.code:
            found.failed_starts.append(f"{out.name}: exit code {end.code}: {end.output[-2000:]}")
            break
        found.differing += [f"{out.name}: {line}" for line in differences(alone, out, missing_lines=True)]
        counts["log_lines_lost"] += len(curve(alone)) - len(curve(out))
        found.left_behind += left_behind(out) + outlived(forks.log)
        log(f"run {found.runs}: {dict(counts)}, {len(found.faults)} faults")
        shutil.rmtree(out)
        shutil.rmtree(forks.folder / f"{out.name}-cache")
    found.kills = counts.pop("kills", 0)
    return {**counts, **found.to_json(), "moments": found.moments}


def _run_on(
    forks: Forks, words: Sequence[str], disk: Disk, out: Path, choices: random.Random, span: float, found: Result
) -> Counter[str]:
    """Starts one run again and again while the disk fails, until it ends; returns counts of what happened."""
    counts, newest = Counter[str](), 0
    spells = Spells(disk, random.Random(choices.random()), out, span)
    spells.start()
    try:
        for _ in range(MOST_STARTS):
            kill = moment_to_kill(choices, out, span) if choices.random() < KILLED else (None, "")
            end = start(forks, words, out, *kill)
            found.starts += 1
            newest = newest_checkpoint(out, newest, found)
            counts["saves_put_off"] += end.output.count("could not be written (")
            counts["kills"] += end.killed
            if end.code == 0:
                break
            counts["starts_refused"] += end.code == 2
            if "Traceback" in end.output or not (end.killed or end.code == 2):
                found.failed_starts.append(f"{out.name}: exit code {end.code}: {end.output[-3000:]}")
                break
    finally:
        spells.end()
    counts["spells"] += spells.count
    return counts


# Damage ---------------------------------------------------------------------------------------------------------------


def damaged_checkpoints(
    forks: Forks, words: Sequence[str], *, rounds: int, seed: int = 0, log: Callable[[str], None] = print
) -> dict[str, Any]:
    """Runs `words` undisturbed with all checkpoints, then `rounds` times damages copies of the run and resumes them.

    Each copy is the run at a random checkpoint, with its newest one or two checkpoints damaged. The same command must
    name what is damaged, resume from the newest undamaged checkpoint, and reach the same end.
    """
    words = [*words, "--checkpoint.keep_every", "2"]
    choices, found, kinds = random.Random(seed), Result(), Counter[str]()
    alone, _ = undisturbed(forks, words)
    steps = [step for step, _ in checkpoint.list_checkpoints(alone)]
    for number in range(rounds):
        out = forks.folder / f"run-{number}"
        at = choices.randrange(2, len(steps))
        copy_until(alone, out, steps[at])
        damaged = [steps[at], *([steps[at - 1]] if choices.random() < 0.3 else [])]
        files = [(step, *damage(out / f"checkpoint-{step}", choices)) for step in damaged]
        kinds.update(kind for _, _, kind in files)
        end = start(forks, words, out)
        found.starts, found.runs = found.starts + 1, found.runs + 1
        wanted = [f"checkpoint-{step} is skipped: {file} " for step, file, _ in files]
        wanted.append(f"Resuming from {out}/checkpoint-{steps[at - len(damaged)]}.")
        missing = [line for line in wanted if line not in end.output]
        if end.code or missing:
            found.failed_starts.append(f"{files}: exit code {end.code}, not printed: {missing}: {end.output[-2000:]}")
            break
        found.differing += [f"{out.name}: {line}" for line in differences(alone, out)]
        found.left_behind += left_behind(out) + outlived(forks.log)
        log(f"round {number + 1} of {rounds}: {files}, {len(found.faults)} faults")
        shutil.rmtree(out)
        shutil.rmtree(out.with_name(f"{out.name}-cache"))
    return {"damaged": sum(kinds.values()), **found.to_json(), "moments": dict(kinds)}


def copy_until(alone: Path, out: Path, step: int) -> None:
    """Copies a run's folder and cache as they were after checkpoint `step`, before the run ended."""
    shutil.copytree(alone, out, ignore=shutil.ignore_patterns("diffusion_*", "config.json", "t2i_adapter.json"))
    shutil.copytree(alone.with_name(f"{alone.name}-cache"), out.with_name(f"{out.name}-cache"))
    for later, folder in checkpoint.list_checkpoints(out):
        shutil.rmtree(folder)
        if later <= step:
            shutil.copytree(alone / folder.name, folder)


def damage(folder: Path, choices: random.Random) -> tuple[str, str]:
    """Cuts a random file of a checkpoint, changes a bit of it, or zeroes a block of 4096 bytes.

    Returns (file name that the error will contain, kind of damage).
    """
    name = choices.choice(
        (f"{checkpoint.ADAPTER}/{CONFIG}", f"{checkpoint.ADAPTER}/{WEIGHTS}", checkpoint.TENSORS, "state.json")
    )
    file = folder / name
    before = file.read_bytes()
    while True:
        kind, after = _spoilt(before, choices)
        if not _is_equivalent(name, before, after):
            break
    file.write_bytes(after)
    return name, kind


def _spoilt(content: bytes, choices: random.Random) -> tuple[str, bytes]:
    kind, place = choices.choice(("cut", "bit", "zeros")), choices.randrange(len(content))
    if kind == "cut":
        return kind, content[:place]
    if kind == "bit":
        return kind, content[:place] + bytes([content[place] ^ 1 << choices.randrange(8)]) + content[place + 1 :]
    start = place // 4096 * 4096
    block = content[start : start + 4096]
    return kind, content[:start] + bytes(len(block)) + content[start + 4096 :]


def _is_equivalent(name: str, before: bytes, after: bytes) -> bool:
    """Whether the change is harmless: equal bytes, or equal JSON in state.json, such as 1E-3 for 1e-3."""
    try:
        return before == after or (name == "state.json" and json.loads(before) == json.loads(after))
    except ValueError:
        return False


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
