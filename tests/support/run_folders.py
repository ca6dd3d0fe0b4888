"""Folders of runs, written by hand as a trainer writes them: metrics, options, record, pictures, checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

OPTIONS = """\
output_dir: runs/a
base:
  name: nano
data:
  location: data/shapes
  resolution: 128
optim:
  lr: 0.01
  betas:
  - 0.9
  - 0.999
train:
  batch_size: 16
  max_steps: {steps}
  seed: 5
"""


def interval(mean: float, half: float = 0.02) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def log_entry(step: int, loss: float = 0.2) -> dict[str, Any]:
    return {"step": step, "loss": loss, "grad_norm": 1.5, "samples_per_s": 40.0, "wait_share": 0.01, "lr": 0.01}


def gain_entry(step: int, benefit: float, /, **more: Any) -> dict[str, Any]:
    """A look at the control gain in four bands."""
    bands = [
        {"t": t, "use": interval(benefit / 2), "benefit": interval(benefit * t / 937), "right": 0.1, "other": 0.2}
        | {"none": 0.3}
        for t in (187, 437, 687, 937)
    ]
    gain = {"pairs": 32, "on": "held-out", "look": 1, "use": interval(benefit / 2), "benefit": interval(benefit)}
    gain |= {"training_benefit": interval(benefit + 0.05), "bands": bands, "seconds": 1.9, "share": 0.041}
    return {"step": step, "gain": gain | more}


def score_entry(step: int, value: float) -> dict[str, Any]:
    score = {"metric": "condition_f1", "higher_is_better": True, "pictures": 8, "adapter": interval(value)}
    score |= {"other_condition": interval(0.3), "no_adapter": interval(0.25), "target": interval(0.97)}
    return {"step": step, "score": score | {"difference": interval(value - 0.3), "seconds": 3.1}}


def advice(step: int, kind: str, text: str = "a line for people") -> dict[str, Any]:
    return {"step": step, "advice": {"kind": kind, "text": text}}


def entries_of(steps: int, *, every: int = 10, looks: int = 200) -> list[dict[str, Any]]:
    """What a run of so many updates logs, with a look and a score each `looks` updates."""
    draw = np.random.default_rng(0)
    found = []
    for step in range(every, steps + 1, every):
        found.append(log_entry(step, 0.1 + 0.3 * math.exp(-step / 500) + 0.02 * draw.standard_normal()))
        if step % looks == 0:
            found.append(gain_entry(step, 0.5 * (1 - math.exp(-step / 1000))))
            found.append(score_entry(step, 0.3 + 0.4 * (1 - math.exp(-step / 1000))))
    return found


def write_run(
    folder: Path,
    entries: Sequence[Mapping[str, Any]] = (),
    *,
    steps: int = 1000,
    record: Mapping[str, Any] | None = None,
    checkpoints: Sequence[int] = (),
) -> Path:
    """Writes a run's folder and returns it. record: parts of run.json beside the usual ones; None writes none."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "options.yaml").write_text(OPTIONS.format(steps=steps))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    if record is not None:
        usual = {"started": 1.7e9, "ended": None, "outcome": "running", "reason": "", "steps": steps, "first_step": 0}
        usual |= {"command": "t2i-adapter train --recipe r.yaml", "global_batch": 16, "versions": {"torch": "2"}}
        usual |= {"resume": "t2i-adapter train --recipe runs/a/options.yaml --checkpoint.resume auto"}
        (folder / "run.json").write_text(json.dumps(usual | dict(record)))
    for step in checkpoints:
        (folder / f"checkpoint-{step}").mkdir()
    return folder


def write_pictures(folder: Path, steps: Sequence[int], *, pairs: int = 2, side: int = 32) -> None:
    """Writes pictures of held-out pairs over the steps; a picture's red is its step's place, and green its pair."""
    control = folder / "control"
    control.mkdir(parents=True, exist_ok=True)
    rows = [{"key": f"row {pair}", "prompt": f"prompt {pair}"} for pair in range(pairs)]
    (control / "pairs.json").write_text(json.dumps(rows))
    draw = np.random.default_rng(1)
    texture = draw.integers(0, 256, (side, side), np.uint8)

    def save(file: Path, red: int, pair: int) -> None:
        flat = np.full((side, side), red, np.uint8), np.full((side, side), 30 * pair, np.uint8)
        Image.fromarray(np.dstack([*flat, texture])).save(file)

    for pair in range(pairs):
        for number, kind in enumerate(("condition", "target", "no_adapter")):
            save(control / f"{pair}-{kind}.png", 250 - number, pair)
    for place, step in enumerate(steps):
        (control / f"step-{step:06d}").mkdir()
        for pair in range(pairs):
            save(control / f"step-{step:06d}" / f"{pair}.png", 20 * place % 250, pair)
