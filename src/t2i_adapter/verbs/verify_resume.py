"""The verb `verify-resume`: whether a run that is stopped and resumed equals an uninterrupted one, on this machine.

Importing this module loads no torch.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
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


FACTOR, FLOOR = 10.0, 1e-5
"""Where a device may add in any order, a tensor of the resumed run may be at most FACTOR times as far from the
uninterrupted run as a second uninterrupted run is, or FACTOR x FLOOR if those two are nearer than FLOOR."""


def run(options: VerifyOptions) -> None:
    """Prints how far every tensor and the losses of a resumed run are from an uninterrupted one's.

    On a CPU, and with `train.deterministic`, nothing may differ. On another device, if something differs, a second
    uninterrupted run shows how far two equal runs are from each other there, and the resumed one may differ FACTOR
    times as much. Exit code 1 for more.

    Raises UserError.
    """
    from t2i_adapter.devices import choose_device, hardware_of
    from t2i_adapter.training.numerics import is_exact
    from t2i_adapter.verbs.train import run as train

    steps = options.steps
    with tempfile.TemporaryDirectory(prefix="t2i-adapter-verify-") as scratch:
        config = shortened(options.config, steps)
        names = ("straight", "stopped", "again")
        straight, stopped, again = (replace(config, output_dir=f"{scratch}/{name}") for name in names)
        train(straight, summary=False)
        try:
            train(stopped, stop_after=steps // 2, summary=False)
        except Stopped as stop:
            if stop.code:  # a signal, not `stop_after`
                raise
        train(replace(stopped, checkpoint=replace(stopped.checkpoint, resume="auto")), summary=False)
        found = differences(Path(straight.output_dir), Path(stopped.output_dir), steps)
        hardware = hardware_of(choose_device(config.train.device, option="train.device"))
        is_promised = is_exact(hardware, deterministic=config.train.deterministic)
        repeated: dict[str, float] | None = None
        if any(found.values()) and not is_promised:
            train(again, summary=False)
            repeated = differences(Path(straight.output_dir), Path(again.output_dir), steps)
    width = max(map(len, found))
    for name, difference in found.items():
        beside = "" if repeated is None else f"  (two uninterrupted runs {repeated.get(name, float('inf')):g})"
        print(f"{name:<{width}}  {difference:g}{beside}")
    line, is_same = verdict(found, repeated)
    print(line)
    if not is_same:
        raise SystemExit(1)


def verdict(found: Mapping[str, float], repeated: Mapping[str, float] | None) -> tuple[str, bool]:
    """A line about what a resume changes, and whether that is no more than it may be.

    found: the resumed run against the uninterrupted one, as `differences` returns it. repeated: two uninterrupted runs
    against each other, on a device that may add in any order; None if nothing may differ.
    """
    different = sum(value != 0 for value in found.values())
    if not different:
        return f"All {len(found)} are the same to the bit: a resumed run equals an uninterrupted one here.", True
    line = f"{different} of {len(found)} differ, by {max(found.values()):g} of the tensor at most."
    if repeated is None:
        return line, False
    far = [name for name, value in found.items() if value > FACTOR * max(repeated.get(name, 0.0), FLOOR)]
    bound = (
        f"Checked: no tensor may differ more than {FACTOR:g} times as much as two uninterrupted runs, which are "
        f"{max(repeated.values(), default=0.0):g} apart at most, or {FACTOR * FLOOR:g}"
    )
    if far:
        return f"{line} {bound}; {len(far)} do, first {far[0]}.", False
    return (
        f"{line} {bound}; none does. Equality to the bit was not checked: this device may add in any order; "
        "--train.deterministic makes it add in one.",
        True,
    )


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
    """How far each tensor in two runs' checkpoints of that step, and their logged losses, are from each other, as a
    share of the first run's; 0 only for equal bits."""
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
    found = {name: _distance(a[name], b[name]) if name in a and name in b else float("inf") for name in a | b}
    a, b = (torch.tensor(_losses(folder), dtype=torch.float64) for folder in (one, other))
    return {**found, "logged losses": _distance(a, b)}


def _distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |a| by the Euclidean norm; inf for other shapes and for NaN. 0 means equal bits."""
    import torch

    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    # Bits first: NaN != NaN, and int64 does not fit into float64.
    if torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)):
        return 0.0
    a, b = a.double(), b.double()
    distance = (a - b).norm()
    if distance == 0:  # -0.0 and 0.0
        return sys.float_info.min
    return (distance / a.norm()).nan_to_num(nan=float("inf"), posinf=float("inf")).item()


def _losses(folder: Path) -> list[float]:
    entries = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]
