"""Preempts a run on two nodes of a Slurm cluster on this machine, and compares it with one left alone.

    python benchmarks/slurm.py [--preemptions 3] [--folder SCRATCH]

It submits deploy/slurm/train.sbatch as a user does, on `nano`, then jobs of a higher priority that take one of its
nodes. It needs Debian's packages slurmctld, slurmd, slurm-client and munge.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, make_parser, write_result

sys.path.append(str(ROOT / "tests"))

from support.kills import differences
from support.ranks import count_lines
from support.slurm import MISSING, NODES, Cluster

STEPS = 60
FLAGS = (
    *("--data", "data", "--data.resolution", "64", "--data.num_workers", "0", "--train.batch_size", "1"),
    *("--train.seed", "3", "--optim.lr", "1e-3", "--tracking.log_every", "1", "--train.max_steps", str(STEPS)),
)
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT / "src"),
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
}


def submit(cluster: Cluster, work: Path, name: str) -> str:
    words = ("--nodes=2", "--cpus-per-task=2", "--gpus-per-node=1", str(ROOT / "deploy/slurm/train.sbatch"))
    env = {**ENVIRONMENT, "T2I_ADAPTER_CACHE": str(work / "cache")}
    return cluster.submit(*words, name, *FLAGS, cwd=work, env=env)


def await_lines(file: Path, lines: int) -> None:
    end = time.monotonic() + 300
    while count_lines(file) <= lines:
        if time.monotonic() > end:
            sys.exit(f"{file} has no new line after 300 s")
        time.sleep(0.05)


def preempt(cluster: Cluster, work: Path) -> dict[str, float]:
    """Preempts the run after three more updates; returns seconds from the higher job's submission to the save, and from
    the requeued job's start to its first update."""
    lines = count_lines(work / "run" / "metrics.jsonl")
    await_lines(work / "run" / "metrics.jsonl", lines + 3)
    began = time.time()
    other = cluster.submit("--partition=high", f"--nodelist={NODES[1]}", "--exclusive", "other.sh", cwd=work)
    while (record := json.loads((work / "run" / "run.json").read_text()))["outcome"] != "stopped":
        time.sleep(0.05)
    ended = record["ended"]
    cluster.wait(other, "COMPLETED")
    lines = count_lines(work / "run" / "metrics.jsonl")
    resumed = time.time()
    await_lines(work / "run" / "metrics.jsonl", lines)
    return {"seconds_until_saved": round(ended - began, 1), "seconds_until_updates": round(time.time() - resumed, 1)}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--preemptions", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="scratch folder; default: a temporary one")
    args = parser.parse_args()
    if MISSING:
        sys.exit(f"error: missing: {' '.join(MISSING)}; apt-get install slurmctld slurmd slurm-client munge")
    work: Path = args.folder or Path(tempfile.mkdtemp())
    make = ["make-data", "shapes", "--out", "data", "--num", "8", "--size", "64", "--seed", "0"]
    subprocess.run(
        [sys.executable, "-m", "t2i_adapter", *make], cwd=work, check=True, env={**os.environ, **ENVIRONMENT}
    )
    (work / "other.sh").write_text("#!/bin/bash\nsleep 1\n")
    content: dict[str, Any] = {"nodes": len(NODES), "updates": STEPS, "preemptions": []}
    with Cluster(more="SlurmctldParameters=preempt_send_user_signal") as cluster:
        content["slurm"] = cluster.run("sbatch", "--version").strip()
        cluster.wait(submit(cluster, work, "alone"), "COMPLETED", 600)
        job = submit(cluster, work, "run")
        for _ in range(args.preemptions):
            content["preemptions"].append(preempt(cluster, work))
            print(content["preemptions"][-1], flush=True)
        cluster.wait(job, "COMPLETED", 600)
        content["restarts"] = int(cluster.job(job)["Restarts"])
    content["differing"] = differences(work / "alone", work / "run")
    write_result("slurm", content, args.out)


if __name__ == "__main__":
    main()
