"""Measures what `--train.compile` costs at the start of a run and saves at each step.

    python benchmarks/compiling.py [--rounds 2] [--steps 60] [--batch 4] [--resolution 128] [--threads CORES]

It runs `t2i-adapter train` on the embedded base and cached data in three ways, in turn: not compiled; compiled with an
empty compiler cache; compiled again with the cache that the run before filled.

The result file holds for each run the seconds to the first finished step and the samples a second after it (median
without the warm-up), the medians over the rounds, and the number of updates after which the compiled run has caught up
with its later start.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import make_parser, write_result
from compare_diffusers import environment, intervals, read_entries

from t2i_adapter.data.shapes import write_dataset

PLAIN, COLD, WARM = "not compiled", "compiled, empty cache", "compiled, from the cache"
Figures = dict[str, float]


def train(way: str, folder: Path, options: argparse.Namespace) -> Figures:
    """Measures one run. `folder` holds the data, the cache and the compiler's cache."""
    output, code = folder / "run", folder / "compiled"
    shutil.rmtree(output, ignore_errors=True)
    if way == COLD:
        shutil.rmtree(code, ignore_errors=True)
    words = {
        "data.location": folder / "data",
        "data.resolution": options.resolution,
        "train.batch_size": options.batch,
        "train.max_steps": options.steps,
        "train.seed": 0,
        "train.compile": "off" if way == PLAIN else "on",
        "checkpoint.every": options.steps,
        "tracking.report_to": "tensorboard",
        "tracking.log_every": 1,
        "output_dir": output,
    }
    line = [sys.executable, "-m", "t2i_adapter", "train", *(f"--{name}={value}" for name, value in words.items())]
    settings = {**environment(folder / "caches", options.threads), "TORCHINDUCTOR_CACHE_DIR": str(code)}
    started = time.time()
    done = subprocess.run(line, capture_output=True, text=True, env=settings, timeout=1800)
    if done.returncode or "--train.compile:" in done.stdout + done.stderr:
        sys.exit(f"{way} failed:\n{done.stdout}{done.stderr}")
    entries = read_entries(output)
    return {
        "first_step_s": round(entries[0].wall - started, 2),
        "samples_per_s": round(options.batch / statistics.median(intervals(entries)), 2),
    }


def summarise(rounds: list[dict[str, Figures]], batch: int) -> dict[str, Any]:
    """Returns way -> medians over the rounds.

    A compiled way also has its speed relative to the plain one and the number of updates until it has caught up, or
    None if it never does.
    """
    found: dict[str, Any] = {
        way: {name: statistics.median(each[way][name] for each in rounds) for name in rounds[0][way]}
        for way in rounds[0]
    }
    plain = found[PLAIN]
    for row in (found[COLD], found[WARM]):
        row["faster"] = row["samples_per_s"] / plain["samples_per_s"]
        saved = batch / plain["samples_per_s"] - batch / row["samples_per_s"]
        late = row["first_step_s"] - plain["first_step_s"]
        row["updates_to_catch_up"] = round(late / saved) if saved > 0 else None
    return found


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each way")
    parser.add_argument("--steps", type=int, default=60, help="updates of a run; 3 or more")
    parser.add_argument("--batch", type=int, default=4, help="samples a step")
    parser.add_argument("--resolution", type=int, default=128, help="side of the pictures in pixels")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of a run")
    options = parser.parse_args()
    rounds: list[dict[str, Figures]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_dataset(folder / "data", num=200, split="train", seed=0, size=options.resolution, condition="outline")
        train(PLAIN, folder, options)  # fills the cache
        for number in range(1, options.rounds + 1):
            rounds.append({})
            for way in (PLAIN, COLD, WARM):
                rounds[-1][way] = train(way, folder, options)
                print(f"round {number}  {way:26}  {rounds[-1][way]}", flush=True)
    summary = summarise(rounds, options.batch)
    result = {
        "settings": {name: getattr(options, name) for name in ("rounds", "steps", "batch", "resolution", "threads")},
        "rounds": rounds,
        "summary": summary,
    }
    write_result("compiling", result, options.out)
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
