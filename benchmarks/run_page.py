"""Measures what a run's page and the list of runs cost: CPU seconds and bytes.

    python benchmarks/run_page.py [--steps 20000] [--runs 40] [--sides 128 1024]

It writes folders of runs as the trainer does: a log entry every 10 updates, a look with a score every 200, and at each
of these a picture of each of 8 pairs. Then it measures, in CPU seconds of this process, the first page, the page after
one more look, and `t2i-adapter runs ls` of many such runs, in a process of its own and with its start.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import make_parser, write_result
from PIL import Image

from t2i_adapter.runs.page import write_page

PAIRS, EVERY, LOOK = 8, 10, 200
BANDS = (187, 437, 687, 937)


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.02, "high": mean + 0.02}


def entries(steps: int) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    draw, found = np.random.default_rng(0), []
    for step in range(EVERY, steps + 1, EVERY):
        loss = 0.1 + 0.02 * draw.standard_normal()
        numbers = {"loss": loss, "grad_norm": abs(draw.standard_normal()), "samples_per_s": 40 + draw.standard_normal()}
        found.append({"step": step, **numbers, "wait_share": 0.01, "lr": 1e-4})
        if step % LOOK == 0:
            found += look(step, float(1 - np.exp(-step / 2000)))
    return found


def look(step: int, gain: float) -> list[dict[str, Any]]:
    bands = [{"t": t, "use": interval(gain), "benefit": interval(gain / 2)} for t in BANDS]
    means = {"use": interval(gain), "benefit": interval(gain / 2), "training_benefit": interval(gain / 2)}
    score = {name: interval(gain / 2) for name in ("adapter", "other_condition", "no_adapter", "target", "difference")}
    return [
        {"step": step, "gain": {"pairs": 32, "on": "held-out", **means, "bands": bands, "share": 0.04}},
        {"step": step, "score": {"metric": "condition_f1", "higher_is_better": True, "pictures": PAIRS, **score}},
    ]


def write_log(folder: Path, steps: int) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries(steps)))
    (folder / "options.yaml").write_text(f"base:\n  name: nano\ntrain:\n  max_steps: {steps}\n")
    record = {"started": time.time(), "outcome": "stopped", "steps": steps, "global_batch": 16}
    (folder / "run.json").write_text(json.dumps(record))


def write_pictures(folder: Path, steps: Sequence[int], side: int) -> None:
    """Pictures of each pair at each step. The files of a pair are one file with several names, to save disk."""
    control, draw = folder / "control", np.random.default_rng(1)
    control.mkdir(exist_ok=True)
    (control / "pairs.json").write_text(json.dumps([{"key": str(p), "prompt": f"prompt {p}"} for p in range(PAIRS)]))
    for pair in range(PAIRS):
        small = Image.fromarray(draw.integers(0, 256, (side // 16, side // 16, 3), np.uint8))
        rough = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), np.int16)
        picture = Image.fromarray((rough + draw.integers(-4, 5, rough.shape)).clip(0, 255).astype(np.uint8))
        first = control / f"{pair}-target.png"
        picture.save(first)
        places = [control / f"{pair}-{kind}.png" for kind in ("condition", "no_adapter")]
        for step in steps:
            (control / f"step-{step:06d}").mkdir(exist_ok=True)
            places.append(control / f"step-{step:06d}" / f"{pair}.png")
        for place in places:
            place.unlink(missing_ok=True)
            os.link(first, place)


def cpu_seconds(action: Callable[[], object]) -> float:
    began = time.process_time()
    action()
    return round(time.process_time() - began, 3)


def measure_page(root: Path, steps: int, side: int) -> dict[str, Any]:
    """The first page of a run, and the page after one more look with its pictures."""
    folder = root / f"page-{side}"
    write_log(folder, steps)
    looks = list(range(0, steps + 1, LOOK))
    write_pictures(folder, looks[:-1], side)
    first = cpu_seconds(lambda: write_page(folder))
    write_pictures(folder, looks[-1:], side)
    small = {file.name: file for file in (folder / "control" / "small").iterdir()}
    for file in small.values():  # the fixed pictures were written again above; the run does not do that
        os.utime(file)
    more = cpu_seconds(lambda: write_page(folder))
    size = (folder / "report.html").stat().st_size
    return {"side_px": side, "first_page_s": first, "page_after_a_look_s": more, "page_bytes": size}


def measure_list(root: Path, steps: int, runs: int) -> dict[str, Any]:
    """CPU seconds of `runs ls` of many runs, its start included."""
    write_log(root / "list" / "run-0", steps)
    for number in range(1, runs):
        shutil.copytree(root / "list" / "run-0", root / "list" / f"run-{number}")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "t2i_adapter", "runs", "ls", root / "list"], check=True, stdout=subprocess.PIPE
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"runs": runs, "updates_of_each": steps, "list_s": round(seconds, 3)}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=20_000, help="updates of each run")
    parser.add_argument("--runs", type=int, default=40, help="runs in the list")
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 1024], help="sides of the pictures in pixels")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        pages = [measure_page(Path(place), options.steps, side) for side in options.sides]
        listed = measure_list(Path(place), options.steps, options.runs)
    setting = {"updates": options.steps, "log_every": EVERY, "look_every": LOOK, "pairs": PAIRS}
    print(json.dumps({"pages": pages, "list": listed}, indent=1))
    write_result("run_page", {"run": setting, "pages": pages, "list": listed}, options.out, threads=1)


if __name__ == "__main__":
    main()
