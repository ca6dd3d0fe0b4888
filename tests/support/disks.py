"""Campaigns of disks: full for a while, read-only for a while, and keeping something else than they were given."""

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

from support.forks import Forks, is_there
from support.kills import Result, curve, differences, left_alone, left_behind, look, moment_to_kill, outlived, start

from t2i_adapter.training import checkpoint

FULL_DISK = "96m"
"""Room for a run of three checkpoints and its adapter, and some."""
MOST_STARTS = 12
"""Starts of a run on a failing disk; then it has a good one."""
KILLED = 0.25
"""Share of the starts on a failing disk that are killed too."""


class Disk(Protocol):
    """A folder whose disk fails when it is told to."""

    folder: Path

    def spoil(self, choices: random.Random) -> None: ...

    def mend(self) -> None: ...


@dataclass
class FullDisk:
    """A small disk of its own, filled up to a random rest: nothing, or less than two checkpoints take."""

    folder: Path
    room: int = 0
    """Bytes of two checkpoints, once that is known."""

    def spoil(self, choices: random.Random) -> None:
        rest = choices.choice((0, choices.randint(0, self.room)))
        with (self.folder / "ballast").open("ab") as ballast:
            for _ in range(20):  # the run writes beside, so that what was free is not any more
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
    """A folder over which, for a while, lies itself as it is where nothing can be written; for root too."""

    folder: Path
    view: Path
    """A read-only mount of the folder."""

    def spoil(self, choices: random.Random) -> None:
        mount("--bind", self.view, self.folder)

    def mend(self) -> None:
        unmount(self.folder)


@contextmanager
def full_disk(folder: Path) -> Iterator[FullDisk]:
    """Raises OSError where nothing can be mounted."""
    disk = folder / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", f"size={FULL_DISK}", "tmpfs", disk)
    try:
        yield FullDisk(disk)
    finally:
        unmount(disk)


@contextmanager
def read_only_folder(folder: Path) -> Iterator[ReadOnly]:
    """Raises OSError where nothing can be mounted."""
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
    """Spoils a disk and mends it, again and again at random moments of a run, until it is told to end."""

    def __init__(self, disk: Disk, choices: random.Random, out: Path, span: float) -> None:
        super().__init__(name="spells", daemon=True)
        self._disk, self._choices, self._out, self._span = disk, choices, out, span
        self._over = threading.Event()
        self.count = 0

    def run(self) -> None:
        while not self._over.is_set():
            seconds, once = moment_to_kill(self._choices, self._out, self._span)
            while once and not is_there(once) and not self._over.wait(0.005):
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
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Runs `words` alone, then on a disk that fails for a while, again and again; some starts are killed besides.

    What is prepared lies on another disk. A start that this one ends must say so in a line; the same command goes on.
    What a run without room may lose is a checkpoint that could not be written, and lines of its curve. Ends after so
    many `spells`, or minutes.
    """
    choices, found, counts = random.Random(seed), Result(), Counter[str]()
    alone, span = left_alone(forks, words)
    if isinstance(disk, FullDisk):
        disk.room = 2 * size_of(checkpoint.list_checkpoints(alone)[-1][1])
    last = time.monotonic() + 60 * minutes
    while counts["spells"] < spells and time.monotonic() < last and not found.faults:
        out = disk.folder / f"run-{found.runs}"
        counts.update(_run_on(forks, words, disk, out, choices, span, found))
        end = start(forks, words, out)  # the disk is whole again
        found.starts, found.runs = found.starts + 1, found.runs + 1
        look(out, 0, found)
        if end.code:
            found.failed_starts.append(f"{out.name}: exit code {end.code}: {end.output[-2000:]}")
            break
        found.differing += [f"{out.name}: {line}" for line in differences(alone, out, lines_may_miss=True)]
        counts["log_lines_lost"] += len(curve(alone)) - len(curve(out))
        found.left_behind += left_behind(out) + outlived(forks.log)
        tell(f"run {found.runs}: {dict(counts)}, {len(found.faults)} faults")
        shutil.rmtree(out)
        shutil.rmtree(forks.folder / f"{out.name}-cache")
    found.kills = counts.pop("kills", 0)
    return {**counts, **found.to_json(), "moments": found.moments}


def _run_on(
    forks: Forks, words: Sequence[str], disk: Disk, out: Path, choices: random.Random, span: float, found: Result
) -> Counter[str]:
    """Starts of one run while the disk fails now and then, until it is through; what happened."""
    counts, newest = Counter[str](), 0
    spells = Spells(disk, random.Random(choices.random()), out, span)
    spells.start()
    try:
        for _ in range(MOST_STARTS):
            kill = moment_to_kill(choices, out, span) if choices.random() < KILLED else (None, "")
            end = start(forks, words, out, *kill)
            found.starts += 1
            newest = look(out, newest, found)
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
    forks: Forks, words: Sequence[str], *, rounds: int, seed: int = 0, tell: Callable[[str], None] = print
) -> dict[str, Any]:
    """Runs `words` alone, keeping every checkpoint; then, `rounds` times, damages the last one or two of some moment of
    that run and lets the same command go on from there: it names what is damaged, uses the one before, and comes to
    the same end."""
    words = [*words, "--checkpoint.keep_every", "2"]
    choices, found, kinds = random.Random(seed), Result(), Counter[str]()
    alone, _ = left_alone(forks, words)
    steps = [step for step, _ in checkpoint.list_checkpoints(alone)]
    for number in range(rounds):
        out = forks.folder / f"run-{number}"
        at = choices.randrange(2, len(steps))
        as_it_was(alone, out, steps[at])
        damaged = [steps[at], *([steps[at - 1]] if choices.random() < 0.3 else [])]
        files = [(step, *damage(out / f"checkpoint-{step}", choices)) for step in damaged]
        kinds.update(kind for _, _, kind in files)
        end = start(forks, words, out)
        found.starts, found.runs = found.starts + 1, found.runs + 1
        wanted = [f"checkpoint-{step} is skipped: {file} " for step, file, _ in files]
        wanted.append(f"Resuming from {out}/checkpoint-{steps[at - len(damaged)]}.")
        unsaid = [line for line in wanted if line not in end.output]
        if end.code or unsaid:
            found.failed_starts.append(f"{files}: exit code {end.code}, not said: {unsaid}: {end.output[-2000:]}")
            break
        found.differing += [f"{out.name}: {line}" for line in differences(alone, out)]
        found.left_behind += left_behind(out) + outlived(forks.log)
        tell(f"round {number + 1} of {rounds}: {files}, {len(found.faults)} faults")
        shutil.rmtree(out)
        shutil.rmtree(out.with_name(f"{out.name}-cache"))
    return {"damaged": sum(kinds.values()), **found.to_json(), "moments": dict(kinds)}


def as_it_was(alone: Path, out: Path, step: int) -> None:
    """A copy of a run's folder and cache as they were after a checkpoint, when the run had not ended."""
    shutil.copytree(alone, out, ignore=shutil.ignore_patterns("diffusion_*", "config.json", "t2i_adapter.json"))
    shutil.copytree(alone.with_name(f"{alone.name}-cache"), out.with_name(f"{out.name}-cache"))
    for later, folder in checkpoint.list_checkpoints(out):
        shutil.rmtree(folder)
        if later <= step:
            shutil.copytree(alone / folder.name, folder)


def damage(folder: Path, choices: random.Random) -> tuple[str, str]:
    """Cuts a random file of a checkpoint, changes a bit of it, or empties a block; (what will be named, how)."""
    name = choices.choice((checkpoint.CONFIG, checkpoint.WEIGHTS, checkpoint.TENSORS, "state.json"))
    file = folder / name
    before = file.read_bytes()
    while True:
        kind, after = _spoilt(before, choices)
        if not _means_the_same(name, before, after):
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


def _means_the_same(name: str, before: bytes, after: bytes) -> bool:
    """Whether it is no damage: zeros where zeros were, or, in state.json, 1E-3 for 1e-3."""
    try:
        return before == after or (name == "state.json" and json.loads(before) == json.loads(after))
    except ValueError:
        return False


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
