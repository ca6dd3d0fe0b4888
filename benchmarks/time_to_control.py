"""Measures the seconds of training until an adapter controls: the demo's recipe beside the diffusers script's recipe.

Both train with our code on the same base (nano), pairs and machine, so that only the recipes differ. This favours the
diffusers recipe: the script's own step also encodes the picture and computes weight gradients of the frozen base. The
diffusers recipe has that script's initialisation, loss, batch size and schedule, at its default learning rate, at the
guide's, and at the best of a small sweep. The clock is that of `sample_efficiency.py`.

    OMP_NUM_THREADS=1 python benchmarks/time_to_control.py

The result file holds for each recipe the curve {seconds, steps, iou, ci95} and the seconds to reach the threshold, or
null if it was not reached.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from common import make_parser, write_result
from sample_efficiency import ARMS, DIFFUSERS, Bench, arm_config, crossing, interval, parse, write_data

THRESHOLD = 0.8
POINTS = 8  # of the curves of the diffusers recipe
RATES = (1e-5, 5e-6, 1e-3)


def row(name: str, changes: dict[str, Any], points: list[dict[str, Any]]) -> dict[str, Any]:
    """One recipe's entry in the result file."""
    curve = []
    for point in points:
        mean, low, high = interval(point["iou"])
        curve.append({"seconds": point["cpu_s"], "steps": point["updates"], "iou": mean, "ci95": [low, high]})
    return {"name": name, "changes": changes, "reached": crossing(points, THRESHOLD, "cpu_s"), "curve": curve}


def summary(arms: list[dict[str, Any]]) -> str:
    """The Markdown table of the documentation."""
    lines = ["| recipe | seconds to IoU 0.8 | IoU at the end |", "|---|---|---|"]
    for arm in arms:
        last = arm["curve"][-1]
        reached = f"{arm['reached']:.1f}" if arm["reached"] is not None else f"not in {last['seconds']:.0f}"
        low, high = last["ci95"]
        lines.append(f"| {arm['name']} | {reached} | {last['iou']:.2f} ({low:.2f} to {high:.2f}) |")
    return "\n".join(lines)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--samples", type=int, default=5120, help="most samples of the diffusers recipe")
    parser.add_argument("--pairs", type=int, default=32, help="unseen conditions to measure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    others = [str(options.samples * (i + 1) // POINTS) for i in range(POINTS)]
    bench_options = parse(["--iou", "--pairs", str(options.pairs), "--sampling_steps", "12", "--at", "0"])
    recipes = {"demo": ARMS["chosen"]}
    recipes |= {f"diffusers recipe, lr {lr:g}": {**DIFFUSERS, "optim.lr": lr} for lr in RATES}
    arms: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        bench = Bench(write_data(work, bench_options), work / "run", bench_options)
        for name, changes in recipes.items():
            print(f"  {name}", flush=True)
            bench_options.at = [int(n) for n in (others if arms else ("64", "128", "192", "256", "384", "512", "768"))]
            arms.append(row(name, changes, bench.run(arm_config(changes, work / bench_options.which, work / "run", 0))))
    result = {
        "settings": {"samples": options.samples, "pairs": options.pairs, "sampling_steps": 12},
        "threshold": THRESHOLD,
        "arms": arms,
    }
    write_result("time_to_control", result, options.out, threads=1)
    print(summary(arms))


if __name__ == "__main__":
    main()
