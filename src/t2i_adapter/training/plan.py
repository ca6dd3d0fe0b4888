"""The plan of a run: the numbers that follow from its options. Importing this module loads no torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from t2i_adapter.config.tree import Config
from t2i_adapter.errors import UserError, flag, require


@dataclass(frozen=True)
class Plan:
    """What a run will do: counts of samples and updates, the peak learning rate, the seed."""

    samples: int
    processes: int
    batch_size: int
    accumulate: int
    global_batch: int
    steps: int
    epochs: float
    lr: float
    warmup_steps: int
    schedule_from: int
    precision: str
    seed: int
    trainable_parameters: int
    device: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> str:
        """The plan as text, one row a subject."""
        begins = f"; the schedule begins at update {self.schedule_from:,}" if self.schedule_from else ""
        rows = (
            ("training pairs", f"{self.samples:,}"),
            (
                "global batch",
                f"{self.global_batch} = {self.batch_size} x {self.accumulate} accumulated x {self.processes} processes",
            ),
            ("updates", f"{self.steps:,} ({self.epochs:.2f} epochs, {self.steps * self.global_batch:,} samples)"),
            ("learning rate", f"{self.lr:g} after {self.warmup_steps} warm-up updates{begins}"),
            ("trained", f"{self.trainable_parameters:,} parameters; the base is frozen"),
            ("arithmetic", f"{self.precision} on {self.device}"),
            ("seed", f"{self.seed}"),
        )
        return "\n".join(f"  {name:<15}{value}" for name, value in rows)


def make_plan(
    config: Config, *, samples: int, processes: int, precision: str, seed: int, trainable_parameters: int, device: str
) -> Plan:
    """Derives the plan; the number of steps follows from the epochs unless max_steps is set."""
    config = split_batch(config, processes)
    train, optim = config.train, config.optim
    global_batch = train.batch_size * train.gradient_accumulation_steps * processes
    steps = train.max_steps or train.epochs * math.ceil(samples / global_batch)
    require("optim.schedule_from", optim.schedule_from < steps, optim.schedule_from, f"allowed is 0 to {steps - 1}")
    warms_up = optim.schedule not in ("constant", "piecewise_constant")
    return Plan(
        samples=samples,
        processes=processes,
        batch_size=train.batch_size,
        accumulate=train.gradient_accumulation_steps,
        global_batch=global_batch,
        steps=steps,
        epochs=steps * global_batch / samples,
        lr=optim.lr * (global_batch if optim.scale_lr else 1),
        warmup_steps=optim.warmup_steps if warms_up else 0,
        schedule_from=optim.schedule_from,
        precision=precision,
        seed=seed,
        trainable_parameters=trainable_parameters,
        device=device,
    )


def split_batch(config: Config, processes: int) -> Config:
    """The options with the `batch_size` and `gradient_accumulation_steps` that make up `train.global_batch`, if it is
    set, on this number of processes: as few micro-steps as `batch_size` allows.

    Raises UserError, with the numbers of processes that do, if this one does not divide the global batch.
    """
    total, most = config.train.global_batch, config.train.batch_size
    if total is None:
        return config
    if total % processes:
        fits = [count for count in range(1, total + 1) if total % count == 0]
        raise UserError(
            f"{total}: it cannot be split equally between {processes} processes; it can between "
            f"{', '.join(map(str, fits))}. Start one of these numbers, or choose a global batch that every number of "
            f"processes divides; a resume with another one needs {flag('checkpoint.allow_changed')}.",
            option="train.global_batch",
        )
    share = total // processes
    size = max(count for count in range(1, min(most, share) + 1) if share % count == 0)
    return replace(config, train=replace(config.train, batch_size=size, gradient_accumulation_steps=share // size))
