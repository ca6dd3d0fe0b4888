"""What `--train.compile` costs at the start and gives at each step: the command line, from start to end.

    python benchmarks/compiling.py [--rounds 2] [--steps 60] [--batch 4] [--resolution 128] [--threads CORES]
        [--out benchmarks/compiling.json]

Three ways in turn, on the embedded base and data that is prepared already: not compiled; compiled from an empty cache;
compiled again from the cache that this left.

Result file: settings, versions, machine, each run's seconds to the first finished step and samples a second after it
(medians, the first steps left out), the medians of the rounds, and after how many updates the compiled run has made up
for its later start.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from compare_diffusers import environment, intervals, read_entries

from t2i_adapter.data.shapes import write_dataset
from t2i_adapter.training.setup import versions

PLAIN, COLD, WARM = "not compiled", "compiled, empty cache", "compiled, from the cache"
Figures = dict[str, float]


def train(way: str, folder: Path, options: argparse.Namespace) -> Figures:
    """One run; `folder` holds the data, and keeps what is prepared and compiled."""
    output, code = folder / "run", folder / "compiled"
    shutil.rmtree(output, ignore_errors=True)
    if way == COLD:
        shutil.rmtree(code, ignore_errors=True)
    words = {
        "data.train_data_dir": folder / "data",
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
    """way -> medians; of a compiled one its speed against the plain one, and when it has caught up (None: never)."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each way")
    parser.add_argument("--steps", type=int, default=60, help="updates of a run, 3 or more")
    parser.add_argument("--batch", type=int, default=4, help="samples a step")
    parser.add_argument("--resolution", type=int, default=128, help="side of the pictures in pixels")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of a run")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/compiling.json"))
    options = parser.parse_args()
    rounds: list[dict[str, Figures]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_dataset(folder / "data", num=200, split="train", seed=0, size=options.resolution, condition="outline")
        train(PLAIN, folder, options)  # prepares the data
        for number in range(1, options.rounds + 1):
            rounds.append({})
            for way in (PLAIN, COLD, WARM):
                rounds[-1][way] = train(way, folder, options)
                print(f"round {number}  {way:26}  {rounds[-1][way]}", flush=True)
    summary = summarise(rounds, options.batch)
    result = {
        "date": date.today().isoformat(),
        "machine": {"cpu_cores": os.cpu_count(), "processor": platform.machine(), "system": platform.system()},
        "versions": versions(),
        "settings": {name: getattr(options, name) for name in ("rounds", "steps", "batch", "resolution", "threads")},
        "rounds": rounds,
        "summary": summary,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
