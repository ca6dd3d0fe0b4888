"""Measures one run on 1, 2 and 4 processes (gloo, CPU): samples a second, and the difference of the losses.

    python benchmarks/scaling.py [--processes 1 2 4] [--steps 20] [--batch 16] [--rounds 2]

The base is nano. The global batch is equal for all, and each process takes its share on one CPU thread. More processes
than cores are not faster; then only the losses are of interest. The result file holds, for each number of processes,
the samples a second of every round without the first steps, and, relative to one process, the speed and the largest
relative difference of the losses.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import make_parser, write_result

from t2i_adapter.data.shapes import write_dataset

LOG_EVERY = 5


def run(processes: int, data: Path, folder: Path, options: argparse.Namespace) -> list[dict[str, float]]:
    """Trains once; returns the log: loss and samples a second, every LOG_EVERY updates."""
    words = {
        "data.location": data,
        "data.resolution": 128,
        "data.num_workers": 0,
        "data.prepared_dir": data / "prepared",
        "train.batch_size": options.batch // processes,
        "train.max_steps": options.steps,
        "train.seed": 0,
        "train.cpu_threads": 1,
        "optim.lr": 1e-3,
        "tracking.report_to": "none",
        "tracking.log_every": LOG_EVERY,
        "output_dir": folder,
    }
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    line = [sys.executable, *launch, "-m", "t2i_adapter", "train"]
    line += [word for name, value in words.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    rates: dict[int, list[float]] = {count: [] for count in options.processes}
    losses: dict[int, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        write_dataset(data, num=2 * options.batch, split="train")
        for turn in range(options.rounds):
            for count in options.processes:
                log = run(count, data, Path(scratch) / f"{turn}-{count}", options)
                rates[count].append(statistics.median(entry["samples_per_s"] for entry in log[1:]))
                losses[count] = [entry["loss"] for entry in log]
                print(count, rates[count], losses[count], flush=True)
    first = options.processes[0]
    rows: dict[str, Any] = {}
    for count, found in rates.items():
        apart = max(abs(a - b) / a for a, b in zip(losses[first], losses[count], strict=True))
        rows[str(count)] = {
            "samples_per_s": found,
            "speed": statistics.median(found) / statistics.median(rates[first]),
            "losses": losses[count],
            "largest_relative_difference_of_losses": apart,
        }
    content = {
        "settings": {"steps": options.steps, "batch": options.batch, "rounds": options.rounds, "base": "nano"},
        "processes": rows,
    }
    write_result("scaling", content, options.out)


if __name__ == "__main__":
    main()
