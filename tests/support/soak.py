"""The soak campaign: one run of very many short epochs, whose memory, open files and threads are read from outside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from support.tiny import write_circles, write_tiny_sdxl

EIGHT_HOURS = {"updates": 28_800, "saves": 57, "validations": 288, "log_entries": 2_880}
"""Counts of eight hours at one update a second, with the default intervals (500, 100, 10 updates)."""
SAVE_EVERY, VALIDATE_EVERY, PAIRS = 50, 100, 8
WARM_UP = 0.3
"""Share of the first readings that is skipped, while allocators and caches fill."""
BLOCKS = 10
T_975 = 2.306
"""Student's t for a two-sided 95 % interval with BLOCKS - 2 degrees of freedom."""
SMALL = 0.02
"""Growth over eight hours relative to the mean that counts as flat, whatever its interval."""
WATCHED = ("rss_mib", "files", "threads", "processes", "shared_mib")


@dataclass(frozen=True)
class Reading:
    """Sums over the run and all its descendants at one moment. updates: those done so far."""

    updates: int
    rss_mib: float
    files: int
    threads: int
    processes: int
    shared_mib: float


@dataclass(frozen=True)
class Trend:
    """A line fitted to the means of equal blocks: its growth over the updates of eight hours, with a 95 % interval."""

    mean: float
    growth: float
    low: float
    high: float

    @property
    def flat(self) -> bool:
        """Whether the 95 % interval contains 0 or less, or its upper end is small relative to the mean."""
        return self.low <= 0 or self.high <= SMALL * self.mean


def soak(folder: Path, minutes: float) -> dict[str, Any]:
    """Trains for `minutes` in `folder`; returns counts, trends and the verdict as JSON types."""
    words = prepare(folder, minutes)
    log = (folder / "soak.log").open("w")
    run = subprocess.Popen([sys.executable, "-m", "t2i_adapter", *words], cwd=folder, stdout=log, stderr=log)
    try:
        readings = watch(run, folder / "run", deadline=time.monotonic() + 60 * minutes + 600)
    finally:
        run.kill()
        code = run.wait()
        log.close()
    if code not in (0, 75):  # 75: the time was up before the last update
        raise RuntimeError(f"the run ended with exit code {code}:\n{(folder / 'soak.log').read_text()[-3000:]}")
    updates = readings[-1].updates
    counts = {
        "updates": updates,
        "epochs": updates // PAIRS,
        "saves": updates // SAVE_EVERY,
        "validations": updates // VALIDATE_EVERY,
        "log_entries": updates,
    }
    trends = {name: trend(readings, name) for name in WATCHED}
    return {
        "minutes": minutes,
        "readings": len(readings),
        "counts": counts,
        "eight_hours": EIGHT_HOURS,
        "share_of_eight_hours": {name: round(counts[name] / count, 3) for name, count in EIGHT_HOURS.items()},
        "trends": {
            name: {**{key: round(value, 4) for key, value in vars(found).items()}, "flat": found.flat}
            for name, found in trends.items()
        },
        "flat": all(found.flat for found in trends.values()),
    }


def prepare(folder: Path, minutes: float) -> list[str]:
    """Writes base and data; returns the words of the run."""
    write_tiny_sdxl(folder / "base")
    write_circles(folder / "data", num=PAIRS)
    shutil.copy(folder / "data" / "train" / "00000_outline.png", folder / "condition.png")
    return [
        *("train", "--base.name", "base", "--data", "data", "--data.resolution", "64"),
        *("--output_dir", "run", "--data.prepared_dir", "cache", "--train.batch_size", "1", "--train.seed", "0"),
        *("--train.max_steps", str(EIGHT_HOURS["updates"]), "--train.max_time", f"{int(60 * minutes)}"),
        *("--tracking.log_every", "1"),
        *("--checkpoint.every", str(SAVE_EVERY), "--checkpoint.keep", "2"),
        *("--validation.prompts", "circle", "--validation.images", "condition.png", "--validation.num_images", "1"),
        *("--validation.every", str(VALIDATE_EVERY), "--validation.steps", "1"),
    ]


def watch(run: subprocess.Popen[bytes], out: Path, deadline: float) -> list[Reading]:
    """Takes a reading each second, from the first update until the run ends."""
    readings = []
    while run.poll() is None and time.monotonic() < deadline:
        updates = last_step(out / "metrics.jsonl")
        if updates:
            readings.append(read_usage(run.pid, updates))
        time.sleep(1)
    return readings


def last_step(metrics: Path) -> int:
    with suppress(OSError, ValueError, IndexError):
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - 4096))
            lines = file.read().decode().rpartition("\n")[0]
        return json.loads(lines.splitlines()[-1])["step"]
    return 0


def read_usage(process: int, updates: int) -> Reading:
    family = [process, *children(process)]
    rss, files, threads = 0.0, 0, 0
    for one in family:
        with suppress(OSError):  # the process may just have ended
            proc = Path("/proc") / str(one)
            rss += int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
            files += len(list((proc / "fd").iterdir()))
            threads += len(list((proc / "task").iterdir()))
    state = os.statvfs("/dev/shm")
    shared = (state.f_blocks - state.f_bfree) * state.f_frsize / 2**20
    return Reading(updates, rss, files, threads, len(family), shared)


def children(process: int) -> list[int]:
    found = []
    with suppress(OSError):
        for task in (Path("/proc") / str(process) / "task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *children(child)]
    return found


def trend(readings: list[Reading], name: str) -> Trend:
    """Growth of one quantity over the updates of eight hours, with its 95 % interval.

    Neighbouring readings are correlated, so the line is fitted to the means of BLOCKS equal blocks.
    """
    steady = readings[int(WARM_UP * len(readings)) :]
    blocks = [block for block in np.array_split(np.arange(len(steady)), BLOCKS) if len(block)]
    x = np.array([np.mean([steady[i].updates for i in block]) for block in blocks])
    y = np.array([np.mean([getattr(steady[i], name) for i in block]) for block in blocks])
    spread = ((x - x.mean()) ** 2).sum()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / spread
    rest = y - y.mean() - slope * (x - x.mean())
    error = T_975 * np.sqrt((rest**2).sum() / (len(x) - 2) / spread)
    scale = EIGHT_HOURS["updates"]
    return Trend(float(y.mean()), float(scale * slope), float(scale * (slope - error)), float(scale * (slope + error)))
