"""Measures training steps and `t2i-adapter train` on SDXL at its true size, with random weights, on a CPU.

    python benchmarks/real_size.py --folder SCRATCH                     all rows but those of compiling and quantising
    python benchmarks/real_size.py --folder SCRATCH --rows frozen,frozen-int8   these rows

It needs 13 GiB of memory. The row `command` writes the base to SCRATCH/base once, 7 GB in bf16. Each row runs in its
own process. The result file holds the settings and figures of each row, and when and where it was measured. Rows that
are not run this time are copied from the newest file of this hardware. `gpu.py` measures the rows of a GPU.

    s_per_step     median over the steps after the first, with the adapter's AdamW
    samples_per_s  batch / s_per_step
    peak_rss_mib   peak resident memory of the process (of the command in the row `command`)
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import make_parser, measured, read_earlier, write_result
from sdxl import TRUE, Bench, train_words, write_base, write_configs

from t2i_adapter.data.shapes import write_dataset

MIB = 2**20
PIXELS = 256
"""Side of the pictures: a step at SDXL's own 1024 px takes 16 times as long."""
ROWS: dict[str, dict[str, Any]] = {
    "frozen": {"batch": 1, "steps": 3},
    "unfrozen": {"batch": 1, "steps": 3, "unfrozen": True},
    "frozen-compiled": {"batch": 1, "steps": 3, "compile": "on"},
    "frozen-recompute": {"batch": 1, "steps": 3, "recompute": "all"},
    "frozen-int8": {"batch": 1, "steps": 3, "quantize": "int8"},
    "command": {"command": True, "steps": 2},
}
HERE = ("unfrozen", "frozen", "command")


# A row, in its own process -------------------------------------------------------------------------------------------


def measure(row: dict[str, Any]) -> dict[str, Any]:
    """The figures of one row."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(write_configs(Path(folder), TRUE), row, torch.device("cpu"))
    batch, seconds = bench.batch(row["batch"], PIXELS), []
    for _ in range(row["steps"] + 1):
        began = time.perf_counter()
        loss = bench.step(batch)
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds[1:])
    return {
        "first_step_s": seconds[0],
        "s_per_step": median,
        "samples_per_s": row["batch"] / median,
        "finite": bool(torch.isfinite(loss)),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def run_command(folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    """Runs `t2i-adapter train` as a user does, from pictures to the adapter's folder."""
    base = write_base(folder / "base")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        data, run = Path(scratch) / "data", Path(scratch) / "run"
        write_dataset(data, num=2, split="train", size=PIXELS)
        words = train_words(base, data, run, PIXELS, row["steps"], {"train.batch_size": 1, "tracking.log_every": 1})
        began = time.perf_counter()
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return {
            "wall_s": time.perf_counter() - began,
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
            "losses": [entry["loss"] for entry in steps],
            "s_per_step": 1 / steps[-1]["samples_per_s"],
            "adapter_mib": (run / "diffusion_pytorch_model.safetensors").stat().st_size / MIB,
        }


# Rows and the result file --------------------------------------------------------------------------------------------


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder for the base, 7 GB")
    parser.add_argument("--rows", default=",".join(HERE), help=f"rows with commas between: {', '.join(ROWS)}")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(measure(ROWS[options.child])))
        return
    for name in options.rows.split(","):
        print(name, flush=True)
        found = run_command(options.folder, ROWS[name]) if "command" in ROWS[name] else _in_child(name, options)
        _record(options, name, {"settings": {"pixels": PIXELS, **ROWS[name], "dtype": "bf16"}, **found})


def _in_child(name: str, options: argparse.Namespace) -> dict[str, Any]:
    line = [sys.executable, __file__, "--folder", str(options.folder), "--threads", str(options.threads)]
    done = subprocess.run([*line, "--child", name], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed")
    return json.loads(done.stdout.splitlines()[-1])


def _record(options: argparse.Namespace, name: str, found: dict[str, Any]) -> None:
    rows = read_earlier("real_size", options.out).get("rows", {})
    rows[name] = {"measured": measured(threads=options.threads), **found}
    options.out = write_result("real_size", {"rows": rows}, options.out, threads=options.threads)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
