"""The verb `plan`: prints what a run will need of memory, disk and time. Importing this module loads no torch."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from t2i_adapter.config.tree import Config
from t2i_adapter.errors import UserError
from t2i_adapter.imports import preload

if TYPE_CHECKING:
    from t2i_adapter.training.forecast import Forecast
    from t2i_adapter.training.setup import Setup

GIB = 2**30
CARDS = {
    "RTX 3060": 12,
    "RTX 4060": 8,
    "RTX 4090": 24,
    "RTX 5090": 32,
    "T4": 16,
    "L4": 24,
    "A10": 24,
    "A100": 80,
    "H100": 80,
    "H200": 141,
}
"""Name -> GB of memory, by the makers' data sheets."""


@dataclass(frozen=True)
class PlanOptions:
    """What a run will need: the run's options, and the device to plan for."""

    recipe: str | None = None
    """YAML file of a run's options; flags win over it."""
    card: str | None = None
    """Device to plan for: its memory, such as 24GB, or a name, such as "RTX 4090"; None plans for this machine."""
    probe: bool = True
    """Time a few updates here, on random content, to forecast samples/s; not for another device."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)

    def __post_init__(self) -> None:
        card_bytes(self.card)


def card_bytes(card: str | None) -> int | None:
    """The memory of a card in bytes, from its size or name; None for None. Raises UserError for an unknown name."""
    if card is None:
        return None
    if found := re.fullmatch(r"(\d+(?:\.\d+)?) ?(G|GB|GiB)", card, flags=re.IGNORECASE):
        return int(float(found[1]) * GIB)
    names = {name.replace(" ", "").lower(): size for name, size in CARDS.items()}
    size = names.get(re.sub(r"[ _-]", "", card).lower())
    if size is None:
        text = f"{card}: unknown card; write its memory, such as 24GB, or one of {', '.join(CARDS)}."
        raise UserError(text, option="card")
    return size * GIB


def run(options: PlanOptions) -> None:
    """Prints the plan of a run with these options, and what it will need. Writes no file."""
    preload("t2i_adapter.training.forecast")
    from t2i_adapter.training.forecast import forecast
    from t2i_adapter.training.setup import set_up

    with tempfile.TemporaryDirectory() as empty:
        # A folder that does not exist: the plan is of a whole run, whatever the real folder holds.
        config = replace(
            options.config,
            output_dir=str(Path(empty) / "run"),
            checkpoint=replace(options.config.checkpoint, resume=None),
        )
        setup = replace(set_up(_portable(config) if options.card else config), config=config)
    print(setup.describe(), flush=True)
    precision = (config.train.mixed_precision if options.card else setup.accelerator.mixed_precision) or "no"
    found = forecast(setup, card_bytes=card_bytes(options.card), precision=precision, probe=options.probe)
    print(_describe(setup, options, found, precision))


def _portable(config: Config) -> Config:
    """The options without those that need a package or a device which the card's machine may have and this one not."""
    train = replace(config.train, xformers=False, mixed_precision="no")
    return replace(config, train=train, optim=replace(config.optim, name="adamw"))


def _describe(setup: Setup, options: PlanOptions, found: Forecast, precision: str) -> str:
    """The forecast as text, one row a subject."""
    memory, kind = found.memory, setup.config.base.quantize
    base_type = kind if kind != "none" else {"no": "fp32"}.get(precision, precision)
    where = options.card or f"this {setup.accelerator.device.type}"
    parts = {
        "the program": found.program,
        f"base ({base_type})": memory.base,
        "adapter": memory.adapter,
        "optimiser": memory.optimizer,
        "EMA": memory.ema,
        "step": memory.step,
    }
    total = " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    fits = f"largest micro-batch {found.largest_batch}" if found.largest_batch else "too little for one sample"
    rows = [
        ("memory", f"{found.device / GIB:.2f} GiB = {total}"),
        ("room", f"{found.room / GIB:.1f} GiB on {where}: {fits}"),
        ("disk", f"{found.cache / GIB:.2f} GiB of cache at most, {found.output / GIB:.2f} GiB in the run's folder"),
        ("time", _describe_time(setup, options, found)),
    ]
    return "Needs\n" + "\n".join(f"  {name:<15}{value}" for name, value in rows)


def _describe_time(setup: Setup, options: PlanOptions, found: Forecast) -> str:
    if found.samples_per_s is None:
        why = f"on {options.card}" if options.card else "without a probe"
        return f"not measured {why}; `t2i-adapter plan` with these options, but without --card, measures it there"
    hours = setup.plan.steps * setup.plan.global_batch / found.samples_per_s / setup.plan.processes / 3600
    return (
        f"{hours:.2f} hours of steps at {found.samples_per_s:.3g} samples/s a process (measured on random "
        "content), without the time to prepare the data"
    )
