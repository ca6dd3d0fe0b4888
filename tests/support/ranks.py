"""The campaign against processes of a run: one of two is killed, and the same command must resume to the same end."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.kills import WORDS, differences, left_behind, make_data
from support.soak import children

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
GONE_WITHIN = 60.0
"""Seconds after a kill in which all processes of the run must end."""
PATIENCE = 600.0
"""Seconds after which a run hangs."""
MOST_KILLS = 3
"""Kills of one run."""


def kill_ranks(folder: Path, kills: int, seed: int, log: Callable[[str], None]) -> dict[str, Any]:
    """Runs WORDS with two processes undisturbed, then again in new folders with kills; returns counts and faults.

    Each kill hits one of the two processes, chosen at random. A run is killed at most MOST_KILLS times.
    """
    make_data(folder)
    choices, killings, faults, runs = random.Random(seed), list[Killing](), list[str](), 0
    alone = folder / "alone"
    if wait(start(folder, alone), PATIENCE) != 0:
        raise RuntimeError(f"the undisturbed run failed: {(folder / 'alone.log').read_text()[-3000:]}")
    while len(killings) < kills and not faults:
        out, before = folder / f"run-{runs}", len(killings)
        while len(killings) < min(kills, before + MOST_KILLS) and not faults:
            killing = kill_one(folder, out, choices.randint(0, 1), choices.randint(0, 3))
            if killing is None:
                break  # the run has ended
            killings.append(killing)
            faults += [f"kill {len(killings)}: {fault}" for fault in killing.faults]
            log(f"kill {len(killings)} of {kills}: rank {killing.rank}, all gone after {killing.gone_after:.1f} s")
        runs += 1
        code = wait(start(folder, out), PATIENCE)
        if code != 0:
            faults.append(f"the last start ended with {code}: {(folder / f'{out.name}.log').read_text()[-2000:]}")
        else:
            faults += [f"{out.name}: {line}" for line in (*differences(alone, out), *left_behind(out))]
    return {
        "kills": len(killings),
        "of_rank_0": sum(killing.rank == 0 for killing in killings),
        "runs": runs,
        "slowest_end_s": round(max((killing.gone_after for killing in killings), default=0), 1),
        "found": faults,
        "faults": len(faults),
    }


@dataclass(frozen=True)
class Killing:
    """One kill: the rank, seconds until all processes had ended, and the faults found then."""

    rank: int
    gone_after: float
    faults: list[str]


def kill_one(folder: Path, out: Path, rank: int, lines: int) -> Killing | None:
    """Starts the run and kills one process after more than `lines` new lines of metrics.jsonl.

    Returns None if the run ends before that.
    """
    run = start(folder, out)
    members = await_members(run, out, count_lines(out / "metrics.jsonl") + lines)
    if run.poll() is not None:
        return None
    os.kill(members[rank], signal.SIGKILL)
    killed = time.monotonic()
    code = wait(run, GONE_WITHIN)
    gone_after = time.monotonic() - killed
    faults = [] if code not in (0, None) else [f"torchrun ended with {code}"]
    faults += [f"process {one} outlived its run" for one in members if not has_ended(one)]
    log = (folder / f"{out.name}.log").read_text(errors="replace")
    if not re.search(rf"Root Cause.*\brank\s*: {rank} ", log, re.DOTALL):
        faults.append(f"rank {rank} is not named: {log[-1500:]}")
    return Killing(rank, gone_after, faults)


def start(folder: Path, out: Path) -> subprocess.Popen[bytes]:
    places = ["--output_dir", str(out), "--data.prepared_dir", str(out.with_name(f"{out.name}-cache"))]
    with (folder / f"{out.name}.log").open("w") as log:
        return subprocess.Popen(
            [*LAUNCH, "-m", "t2i_adapter", *WORDS, *places],
            cwd=folder,
            stdout=log,
            stderr=log,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )


def await_members(run: subprocess.Popen[bytes], out: Path, lines: int) -> list[int]:
    """Waits until metrics.jsonl has more than `lines` lines; returns the two processes of the run by rank."""
    end = time.monotonic() + PATIENCE
    while run.poll() is None and time.monotonic() < end:
        if count_lines(out / "metrics.jsonl") > lines:
            by_rank = {rank: one for one in children(run.pid) if (rank := rank_of(one)) is not None}
            return [by_rank[0], by_rank[1]]
        time.sleep(0.05)
    return []


def rank_of(process: int) -> int | None:
    """The rank of a process that torchrun has started, else None.

    A loader worker has the environment of its parent too, so the parent must be torchrun.
    """
    try:
        words = (Path("/proc") / str(process) / "environ").read_bytes().split(b"\0")
        parent = int((Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[1])
        command = (Path("/proc") / str(parent) / "cmdline").read_bytes()
    except OSError:
        return None
    ranks = [int(word.removeprefix(b"RANK=")) for word in words if word.startswith(b"RANK=")]
    return ranks[0] if ranks and b"torch.distributed.run" in command else None


def count_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def wait(run: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit code; None if the run was killed after this many seconds."""
    try:
        return run.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        return None


def has_ended(process: int) -> bool:
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
