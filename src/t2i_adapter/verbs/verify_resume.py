"""The verb `verify-resume`: whether a run stopped and resumed is the run left alone, on this machine and data."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from t2i_adapter.config.tree import CheckpointOptions, Config, HubOptions, TrackingOptions, ValidationOptions
from t2i_adapter.errors import Stopped
from t2i_adapter.training import checkpoint
from t2i_adapter.verbs.train import run as train
from t2i_adapter.verbs.verify_resume_options import VerifyOptions


def run(options: VerifyOptions) -> None:
    """Prints the largest difference of every tensor and of the losses; exit code 1 where there is any. Raises
    UserError."""
    with tempfile.TemporaryDirectory(prefix="t2i-adapter-verify-") as scratch:
        config = shortened(options.config, options.steps)
        straight, stopped = (replace(config, output_dir=f"{scratch}/{name}") for name in ("straight", "stopped"))
        train(straight)
        try:
            train(stopped, stop_after=options.steps // 2)
        except Stopped as stop:
            if stop.code:  # a signal, not the step it was to stop after
                raise
        train(replace(stopped, checkpoint=replace(stopped.checkpoint, resume="auto")))
        found = differences(Path(straight.output_dir), Path(stopped.output_dir), options.steps)
    width = max(map(len, found))
    for name, difference in found.items():
        print(f"{name:<{width}}  {difference:g}")
    different = sum(value != 0 for value in found.values())
    print(
        f"{different} of {len(found)} differ, by {max(found.values()):g} at most."
        if different
        else f"All {len(found)} are the same to the bit: a run stopped here and resumed is the run left alone."
    )
    if different:
        raise SystemExit(1)


def shortened(config: Config, steps: int) -> Config:
    """The run with a few updates on as many pairs as they need, alone with its adapter: no pictures, no trackers."""
    batch = config.train.batch_size * config.train.gradient_accumulation_steps
    pairs = min(config.data.max_train_samples or steps * batch, steps * batch)
    return replace(
        config,
        data=replace(config.data, max_train_samples=pairs),
        train=replace(config.train, max_steps=steps, max_time=None, seed=config.train.seed or 0),
        checkpoint=CheckpointOptions(every=steps),
        validation=ValidationOptions(),
        tracking=TrackingOptions(report_to="none", log_every=1),
        hub=HubOptions(),
    )


def differences(one: Path, other: Path, step: int) -> dict[str, float]:
    """Largest difference of each tensor of two runs' checkpoints of that step, and of their logged losses."""
    found = {}
    for file in (checkpoint.WEIGHTS, checkpoint.TENSORS):
        a, b = (load_file(folder / f"{checkpoint.PREFIX}{step}" / file) for folder in (one, other))
        found |= {name: _largest(a[name], b[name]) if name in a and name in b else float("inf") for name in a | b}
    a, b = (torch.tensor(_losses(folder), dtype=torch.float64) for folder in (one, other))
    return {**found, "logged losses": _largest(a, b)}


def _largest(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    # Bits first: a number that is none is not equal to itself, and a wide one has no exact difference.
    if torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)):
        return 0.0
    return (a.double() - b.double()).abs().max().nan_to_num(float("inf")).item() or float("inf")


def _losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
