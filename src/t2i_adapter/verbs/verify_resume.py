"""The verb `verify-resume`: whether a run that is stopped and resumed equals an uninterrupted one, on this machine.

Importing this module loads no torch.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from t2i_adapter.config.tree import CheckpointOptions, Config, HubOptions, TrackingOptions, ValidationOptions
from t2i_adapter.errors import Stopped, UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class VerifyOptions:
    """Two short runs with a run's options: one uninterrupted, one stopped in the middle and resumed."""

    recipe: str | None = None
    """YAML file of a run's options, such as the options.yaml in a run's folder; flags win over it."""
    steps: int = 6
    """Updates of each run; the second one stops half-way."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise UserError(f"{self.steps}: 2 or more are needed, to stop in between.", option="steps")


def run(options: VerifyOptions) -> None:
    """Prints the largest difference of every tensor and of the losses. Exit code 1 if anything differs.

    Raises UserError.
    """
    from t2i_adapter.verbs.train import run as train

    with tempfile.TemporaryDirectory(prefix="t2i-adapter-verify-") as scratch:
        config = shortened(options.config, options.steps)
        straight, stopped = (replace(config, output_dir=f"{scratch}/{name}") for name in ("straight", "stopped"))
        train(straight, summary=False)
        try:
            train(stopped, stop_after=options.steps // 2, summary=False)
        except Stopped as stop:
            if stop.code:  # a signal, not `stop_after`
                raise
        train(replace(stopped, checkpoint=replace(stopped.checkpoint, resume="auto")), summary=False)
        found = differences(Path(straight.output_dir), Path(stopped.output_dir), options.steps)
    width = max(map(len, found))
    for name, difference in found.items():
        print(f"{name:<{width}}  {difference:g}")
    different = sum(value != 0 for value in found.values())
    print(
        f"{different} of {len(found)} differ, by {max(found.values()):g} at most."
        if different
        else f"All {len(found)} are the same to the bit: a resumed run equals an uninterrupted one here."
    )
    if different:
        raise SystemExit(1)


def shortened(config: Config, steps: int) -> Config:
    """The run with `steps` updates on as many pairs as they need, without validation, trackers and hub."""
    batch = config.train.batch_size * config.train.gradient_accumulation_steps
    pairs = min(config.data.max_train_samples or steps * batch, steps * batch)
    return replace(
        config,
        data=replace(config.data, max_train_samples=pairs),
        train=replace(config.train, max_steps=steps, max_time=None, stop_code=None, seed=config.train.seed or 0),
        checkpoint=CheckpointOptions(every=steps),
        validation=ValidationOptions(),
        tracking=TrackingOptions(report_to="none", log_every=1),
        hub=HubOptions(),
    )


def differences(one: Path, other: Path, step: int) -> dict[str, float]:
    """Largest difference of each tensor in two runs' checkpoints of that step, and of their logged losses."""
    import torch
    from safetensors.torch import load_file

    from t2i_adapter.training import checkpoint

    def tensors(run: Path) -> dict[str, Tensor]:
        """All tensors of the checkpoint by name; those of the second adapter and later ones with its folder's."""
        read: dict[str, Tensor] = {}
        for file in sorted((run / f"{checkpoint.PREFIX}{step}").rglob("*.safetensors")):
            for name, tensor in load_file(file).items():
                read[f"{file.parent.name}/{name}" if name in read else name] = tensor
        return read

    a, b = tensors(one), tensors(other)
    found = {name: _largest(a[name], b[name]) if name in a and name in b else float("inf") for name in a | b}
    a, b = (torch.tensor(_losses(folder), dtype=torch.float64) for folder in (one, other))
    return {**found, "logged losses": _largest(a, b)}


def _largest(a: Tensor, b: Tensor) -> float:
    """Largest difference of two tensors; inf for other shapes. 0 means equal bits."""
    import torch

    if a.shape != b.shape:
        return float("inf")
    # Bits first: NaN != NaN, and int64 does not fit into float64.
    if torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)):
        return 0.0
    return (a.double() - b.double()).abs().max().nan_to_num(float("inf")).item() or float("inf")


def _losses(folder: Path) -> list[float]:
    entries = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]
