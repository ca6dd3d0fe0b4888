"""How soon an adapter controls: the demo's recipe against the diffusers script's, in seconds of training.

Both train on the same base (nano), pairs, machine and engine, so that the recipes are compared and not the code: the
engine is ours for all, which favours the other side (its own step also encodes the picture and computes the frozen
base's weight gradients). The diffusers recipe is that script's start, loss, batch and schedule, at its default learning
rate, at the guide's, and at the best of a small sweep. The clock is that of `sample_efficiency.py`.

    OMP_NUM_THREADS=1 python benchmarks/time_to_control.py

Result file: settings, versions, machine, and for each recipe the curve {seconds, updates, IoU, interval} and the
seconds to reach the threshold (null where it was not reached).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from sample_efficiency import ARMS, DIFFUSERS, Bench, arm_config, crossing, interval, parse, write_data

from t2i_adapter.training.setup import versions

THRESHOLD = 0.8
POINTS = 8  # of the others' curves
RATES = (1e-5, 5e-6, 1e-3)


def row(name: str, changes: dict[str, Any], points: list[dict[str, Any]]) -> dict[str, Any]:
    """A recipe's part of the result file."""
    curve = []
    for point in points:
        mean, low, high = interval(point["iou"])
        curve.append({"seconds": point["cpu_s"], "steps": point["updates"], "iou": mean, "ci95": [low, high]})
    return {"name": name, "changes": changes, "reached": crossing(points, THRESHOLD, "cpu_s"), "curve": curve}


def summary(arms: list[dict[str, Any]]) -> str:
    """The table that the documentation shows."""
    lines = ["| recipe | seconds to IoU 0.8 | IoU at the end |", "|---|---|---|"]
    for arm in arms:
        last = arm["curve"][-1]
        reached = f"{arm['reached']:.1f}" if arm["reached"] is not None else f"not in {last['seconds']:.0f}"
        low, high = last["ci95"]
        lines.append(f"| {arm['name']} | {reached} | {last['iou']:.2f} ({low:.2f} to {high:.2f}) |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=5120, help="samples that the others get, at most")
    parser.add_argument("--pairs", type=int, default=32, help="unseen conditions that are measured")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/time_to_control.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    others = [str(given.samples * (i + 1) // POINTS) for i in range(POINTS)]
    options = parse(["--iou", "--pairs", str(given.pairs), "--sampling_steps", "12", "--at", "0"])
    recipes = {"demo": ARMS["chosen"]}
    recipes |= {f"diffusers recipe, lr {lr:g}": {**DIFFUSERS, "optim.lr": lr} for lr in RATES}
    arms: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        bench = Bench(write_data(work, options), work / "run", options)
        for name, changes in recipes.items():
            print(f"  {name}", flush=True)
            options.at = [int(n) for n in (others if arms else ("64", "128", "192", "256", "384", "512", "768"))]
            arms.append(row(name, changes, bench.run(arm_config(changes, work / options.which, work / "run", 0))))
    result = {
        "date": date.today().isoformat(),
        "machine": {"cpu_cores": os.cpu_count(), "processor": platform.machine(), "threads": 1},
        "versions": versions(),
        "settings": {"samples": given.samples, "pairs": given.pairs, "sampling_steps": 12},
        "threshold": THRESHOLD,
        "arms": arms,
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(summary(arms))


if __name__ == "__main__":
    main()
