"""How soon an adapter controls: IoU on unseen conditions against seconds of training, for two recipes.

Every arm trains on the same base (nano), data, machine and engine, so that the recipes are compared and not the code:
the engine is ours for all, which favours the other side (its own step also encodes the picture and computes the frozen
base's weight gradients). The diffusers recipe is that script's start, loss, batch and schedule, at its default learning
rate, at the guide's, and at the best of a small sweep. Drawing and measuring are not counted as training time.

    python benchmarks/time_to_control.py [--seconds 420] [--out benchmarks/time_to_control.json]

Result file: settings, versions, machine, and for each arm the curve [seconds, steps, IoU, interval] and the seconds to
reach the threshold (null where it was not reached).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import platform
import tempfile
import time
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from t2i_adapter.config import CheckpointOptions, Config, ObjectiveOptions, OptimOptions, TrackingOptions, TrainOptions
from t2i_adapter.demo_options import GUIDANCE, SIZE, DemoOptions, training
from t2i_adapter.evaluation.controls import ADAPTER
from t2i_adapter.evaluation.evaluate import evaluate
from t2i_adapter.evaluation.pairs import Pair, read_pairs
from t2i_adapter.generation.options import SamplingOptions
from t2i_adapter.sources.shapes import write_dataset
from t2i_adapter.sources.table import open_source
from t2i_adapter.training.run import make_trainer, set_up, versions

THRESHOLD = 0.8
POINTS = 8  # of the others' curves
TIMES = 6  # the others get so many times what ours took: enough to see whether it is five times sooner
NEVER = 10**6  # more steps than any arm has time for


class TimeIsUpError(Exception):
    """Ends an arm: its time is spent, or the threshold is reached."""


@dataclass
class Probe:
    """Stands where a run draws its validation pictures: measures control and keeps the training clock."""

    pipeline: Any
    pairs: list[Pair]
    seconds: float
    every: float
    sampling: SamplingOptions
    curve: list[dict[str, Any]] = field(default_factory=list)
    trained: float = 0.0
    _resumed: float | None = None

    def __call__(self, adapter: Any, step: int) -> None:
        if self._resumed is not None:
            self.trained += time.perf_counter() - self._resumed
        due = not self.curve or self.trained >= self.curve[-1]["seconds"] + self.every or self.trained >= self.seconds
        if due:
            self._measure(adapter, step)
        self._resumed = time.perf_counter()

    def _measure(self, adapter: Any, step: int) -> None:
        self.pipeline.adapter.load_state_dict(adapter.state_dict())
        found = evaluate(self.pipeline, self.pairs, sampling=self.sampling, columns=(ADAPTER,)).estimates["iou"][
            ADAPTER
        ]
        point = {"seconds": round(self.trained, 1), "steps": step, "iou": found.mean, "ci95": [found.low, found.high]}
        self.curve.append(point)
        print(f"    {point['seconds']:7.1f} s  step {step:5d}  IoU {found.mean:.3f}", flush=True)
        if found.mean >= THRESHOLD or self.trained >= self.seconds:
            raise TimeIsUpError


def ours(data: Path, out: Path) -> Config:
    """The demo's training: what the defaults come to on nano."""
    return training(str(data), str(out), steps=NEVER, seed=0)


def diffusers_recipe(data: Path, out: Path, lr: float) -> Config:
    """The script's random start, eps-MSE, cubic timesteps, batch 4 and constant learning rate without warm-up."""
    return replace(
        ours(data, out),
        train=TrainOptions(batch_size=4, max_steps=NEVER, seed=0),
        optim=OptimOptions(lr=lr, schedule="constant"),
        objective=ObjectiveOptions(timesteps="cubic"),
    )


def run_arm(name: str, config: Config, test: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Trains until the threshold or the time; returns the arm's row of the result file."""
    print(f"  {name}", flush=True)
    config = replace(
        config,
        checkpoint=CheckpointOptions(every=NEVER),
        tracking=TrackingOptions(report_to="none", log_every=NEVER),
        validation=replace(config.validation, every=5),
    )
    setup = set_up(config)
    trainer = make_trainer(setup)
    source = open_source(replace(config.data, train_data_dir=str(test), split="test"), 0)
    pipeline = setup.base.pipeline(copy.deepcopy(setup.adapter).eval(), "cpu", torch.float32, unet=trainer.frozen.unet)
    sampling = SamplingOptions(steps=options.sampling_steps, guidance=GUIDANCE)
    pairs = read_pairs(source, SIZE, setup.adapter.config["in_channels"])
    probe = Probe(pipeline, pairs, options.seconds, options.every, sampling)
    trainer.validate = probe
    with contextlib.suppress(TimeIsUpError):
        trainer.fit()
    last = probe.curve[-1]
    reached = last["seconds"] if last["iou"] >= THRESHOLD else None
    return {
        "name": name,
        "lr": config.optim.lr,
        "batch": config.train.batch_size,
        "reached": reached,
        "curve": probe.curve,
    }


def summary(arms: list[dict[str, Any]]) -> str:
    """The table that the documentation shows."""
    lines = ["| recipe | learning rate | batch | seconds to IoU 0.8 | IoU at the end |", "|---|---|---|---|---|"]
    for arm in arms:
        last = arm["curve"][-1]
        reached = f"{arm['reached']:.0f}" if arm["reached"] is not None else f"not in {last['seconds']:.0f}"
        low, high = last["ci95"]
        end = f"{last['iou']:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"| {arm['name']} | {arm['lr']:g} | {arm['batch']} | {reached} | {end} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=420, help="training time an arm may take at most")
    parser.add_argument("--every", type=float, default=10, help="training seconds between measurements")
    parser.add_argument("--pairs", type=int, default=32, help="unseen conditions that are measured")
    parser.add_argument("--sampling_steps", type=int, default=12, help="denoising steps of a measured picture")
    parser.add_argument("--sweep", type=float, nargs="*", default=[1e-3], help="more learning rates")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/time_to_control.json"))
    options = parser.parse_args()
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "data"
        scenes = {"kinds": DemoOptions().kinds, "max_shapes": DemoOptions().max_shapes, "patterns": ("plain",)}
        for split, num in (("train", DemoOptions().num_train), ("test", options.pairs)):
            write_dataset(data, num=num, split=split, seed=0, size=SIZE, condition="outline", **scenes)
        recipes = {"ours": ours(data, Path(temporary) / "ours")}
        for lr in (1e-5, 5e-6, *options.sweep):
            recipes[f"diffusers recipe, lr {lr:g}"] = diffusers_recipe(data, Path(temporary) / f"theirs-{lr:g}", lr)
        arms: list[dict[str, Any]] = []
        for name, config in recipes.items():
            arms.append(run_arm(name, config, data, options))
            if arms[0]["reached"] is not None:
                options.seconds = min(options.seconds, TIMES * arms[0]["reached"])
                options.every = options.seconds / POINTS
    result = {
        "date": date.today().isoformat(),
        "machine": {"cpu_cores": os.cpu_count(), "processor": platform.machine(), "threads": torch.get_num_threads()},
        "versions": versions(),
        "settings": settings,
        "threshold": THRESHOLD,
        "arms": arms,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(summary(arms))


if __name__ == "__main__":
    main()
