"""Two processes, one of them killed: both are gone within a minute, and the same command goes on to the same end."""

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

import pytest
from support.kills import WORDS, differences, left_behind, make_data
from support.soak import children

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
GONE_WITHIN = 60.0
PATIENCE = 600.0
MOST_A_RUN = 3


def kill_ranks(folder: Path, kills: int, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Runs WORDS with two processes alone, then in new folders until `kills` times one of the two, by chance, was
    killed, at most MOST_A_RUN times a run; what was found."""
    make_data(folder)
    choices, killings, faults, runs = random.Random(seed), list[Killing](), list[str](), 0
    alone = folder / "alone"
    if wait(start(folder, alone), PATIENCE) != 0:
        raise RuntimeError(f"the run left alone failed: {(folder / 'alone.log').read_text()[-3000:]}")
    while len(killings) < kills and not faults:
        out, before = folder / f"run-{runs}", len(killings)
        while len(killings) < min(kills, before + MOST_A_RUN) and not faults:
            killing = kill_one(folder, out, choices.randint(0, 1), choices.randint(0, 3))
            if killing is None:
                break  # it is through
            killings.append(killing)
            faults += [f"kill {len(killings)}: {fault}" for fault in killing.faults]
            tell(f"kill {len(killings)} of {kills}: rank {killing.rank}, all gone after {killing.gone_after:.1f} s")
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
    """Which process was killed, seconds until all were gone, and what was wrong then."""

    rank: int
    gone_after: float
    faults: list[str]


def kill_one(folder: Path, out: Path, rank: int, lines: int) -> Killing | None:
    """Starts the run, and kills one process once it has logged more than so many lines more; None where it is through
    before."""
    run = start(folder, out)
    members = await_members(run, out, count_lines(out / "metrics.jsonl") + lines)
    if run.poll() is not None:
        return None
    os.kill(members[rank], signal.SIGKILL)
    killed = time.monotonic()
    code = wait(run, GONE_WITHIN)
    gone_after = time.monotonic() - killed
    faults = [] if code not in (0, None) else [f"torchrun ended with {code}"]
    faults += [f"process {one} outlived its run" for one in members if not is_gone(one)]
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
    """The two processes of the run, by rank, once metrics.jsonl has more than so many lines."""
    end = time.monotonic() + PATIENCE
    while run.poll() is None and time.monotonic() < end:
        if count_lines(out / "metrics.jsonl") > lines:
            by_rank = {rank: one for one in children(run.pid) if (rank := rank_of(one)) is not None}
            return [by_rank[0], by_rank[1]]
        time.sleep(0.05)
    return []


def rank_of(process: int) -> int | None:
    """Of a process that torchrun has started itself; loader workers have their parent's environment too."""
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
    """The exit code; None where it had to be ended after so many seconds."""
    try:
        return run.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        return None


def is_gone(process: int) -> bool:
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_one_of_two_processes_killed(tmp_path: Path):
    found = kill_ranks(tmp_path, 10, seed=0, tell=print)
    assert found["found"] == []
    assert found["kills"] == 10
