"""The verb `plan`: prints what a run needs of memory, disk, time and money. Importing this module loads no torch."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from t2i_adapter.cards import GIB, Card, card_bytes, named_card
from t2i_adapter.config.tree import Config
from t2i_adapter.errors import UserError, flag, require
from t2i_adapter.imports import preload

if TYPE_CHECKING:
    from t2i_adapter.training.forecast import Forecast, Subject, Target
    from t2i_adapter.training.savings import Choice

ALLOCATOR_SHARE = 0.1
"""Most that a GPU's allocator takes beside the tensors, as a share of them: assumed, not measured."""


@dataclass(frozen=True)
class PlanOptions:
    """What a run will need: the run's options, and the device to plan for."""

    recipe: str | None = None
    """YAML file of a run's options; flags win over it."""
    pairs: int | None = None
    """Plan for so many pairs, without a dataset: --data is then not opened, and nothing is downloaded if the base is
    well known."""
    card: str | None = None
    """GPU to plan for: its memory, such as 24GB, or a name, such as "RTX 4090"; None plans for this machine. A name
    also gives a forecast of the speed."""
    machines: int = 1
    """Number of machines."""
    gpus: int = 1
    """GPUs, and so processes, of each machine."""
    price: float | None = None
    """Price of a GPU for an hour, in any currency; the plan then says what the run costs."""
    compare: bool = False
    """Print a table of all precisions, gradient checkpointing and quantisations with the largest micro-batch of each,
    and mark the best that fits. It takes a minute or two."""
    json: bool = False
    """Print JSON instead of text."""
    probe: bool = True
    """Time a few updates here, on random content, to forecast samples/s; not for another device."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)

    DATA_IS_OPTIONAL = True  # for `flags.parse_train`

    def __post_init__(self) -> None:
        card = named_card(self.card)
        card_bytes(self.card)
        require("pairs", self.pairs is None or self.pairs >= 1, self.pairs, "1 or more")
        require("machines", self.machines >= 1, self.machines, "1 or more")
        require("gpus", self.gpus >= 1, self.gpus, "1 or more")
        require("price", self.price is None or self.price >= 0, self.price, "allowed is a number from 0")
        if card and card.bf16 is None and self.config.train.mixed_precision == "bf16":
            raise UserError(f"bf16: {self.card} has no units for it; use fp16.", option="train.mixed_precision")


def run(options: PlanOptions) -> None:
    """Prints the plan of a run with these options, and what it will need. Writes no file. Raises UserError."""
    if options.pairs is None and not options.config.data.location:
        text = (
            f"is missing: write the number of pairs, such as 3000000, or name the dataset with {flag('data.location')}"
        )
        raise UserError(text, option="pairs")
    preload("t2i_adapter.training.forecast")
    from t2i_adapter.training.forecast import find_target, forecast
    from t2i_adapter.training.savings import compare

    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        subject, head = _subject(options)
        if not options.json:
            print(head, flush=True)
        device = subject.accelerator.device
        target = find_target(device, card=named_card(options.card), card_bytes=card_bytes(options.card))
        found = forecast(subject, target, probe=options.probe and _has_weights(subject))
        choices = compare(subject, target) if options.compare else []
    if options.json:
        print(json.dumps(_to_json(subject, options, found, choices), indent=1))
        return
    print(_describe(subject, options, found))
    if choices:
        print(_describe_choices(choices, options, target))


def _subject(options: PlanOptions) -> tuple[Subject, str]:
    """The run that is planned, and its description."""
    from t2i_adapter.models.known import known_base
    from t2i_adapter.models.open import open_base
    from t2i_adapter.training.accelerator import make_accelerator
    from t2i_adapter.training.forecast import Subject
    from t2i_adapter.training.plan import make_plan
    from t2i_adapter.training.setup import make_adapter, set_up

    with tempfile.TemporaryDirectory() as empty:
        # A folder that does not exist: the plan is of a whole run, whatever the real folder holds.
        config = replace(
            options.config,
            output_dir=str(Path(empty) / "run"),
            checkpoint=replace(options.config.checkpoint, resume=None),
        )
        used = _portable(config) if options.card else config
        base = known_base(config.base)
        setup = None
        if options.pairs is None:
            setup = set_up(used, base)
            accelerator, base, adapter, samples = setup.accelerator, setup.base, setup.adapter, setup.plan.samples
        else:
            accelerator, base = make_accelerator(used), base or open_base(config.base)
            adapter = make_adapter(used, base, 0)
            samples = min(options.pairs, config.data.max_train_samples or options.pairs)
    precision = _precision(options, accelerator.mixed_precision)
    plan = make_plan(
        config,
        samples=samples,
        processes=options.machines * options.gpus * accelerator.num_processes,
        precision={"no": "fp32"}.get(precision, precision),
        seed=setup.plan.seed if setup else config.train.seed or 0,
        trainable_parameters=sum(parameter.numel() for parameter in adapter.parameters()),
        device=options.card or str(accelerator.device),
    )
    head = replace(setup, plan=plan).describe() if setup else f"Plan\n{plan.describe()}"
    return Subject(config, base, adapter, plan, accelerator, precision), head


def _precision(options: PlanOptions, here: str) -> str:
    """The arithmetic of the run. here: what this machine would compute in."""
    wanted = options.config.train.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return wanted if options.card else here


def _portable(config: Config) -> Config:
    """The options without those that need a package or a device which the card's machine may have and this one not."""
    train = replace(config.train, xformers=False, mixed_precision="no")
    return replace(config, train=train, optim=replace(config.optim, name="adamw"))


def _has_weights(subject: Subject) -> bool:
    from t2i_adapter.models.known import KnownBase

    return not isinstance(subject.base, KnownBase)


# Numbers -------------------------------------------------------------------------------------------------------------


def _hours(subject: Subject, found: Forecast) -> tuple[float, float] | None:
    """Hours of the run's updates, the fewest and the most; None if the speed is not known."""
    if found.samples_per_s is None:
        return None
    least, most = found.samples_per_s
    samples = subject.plan.steps * subject.plan.global_batch / subject.plan.processes
    return samples / most / 3600, samples / least / 3600


def _costs(subject: Subject, options: PlanOptions, hours: tuple[float, float] | None) -> tuple[float, float] | None:
    """Money for the GPUs' hours; None if the price or the speed is not known."""
    if hours is None or options.price is None:
        return None
    each = options.price * subject.plan.processes
    return hours[0] * each, hours[1] * each


def _to_json(subject: Subject, options: PlanOptions, found: Forecast, choices: list[Choice]) -> dict[str, Any]:
    """Everything that the text says, as JSON types. Sizes are in bytes, rates of one process."""
    hours = _hours(subject, found)
    return {
        "plan": subject.plan.to_dict(),
        "base": subject.base.name,
        "card": options.card,
        "machines": options.machines,
        "memory": {
            "program": found.target.program,
            **asdict(found.memory),
            "total": found.device,
            "total_with_allocator": round(_with_allocator(found)),
            "room": found.target.room,
            "largest_batch": found.largest_batch,
        },
        "disk": {
            "cache": found.cache,
            "cache_on_all_machines": found.cache * options.machines,
            "output": found.output,
        },
        "flops_per_sample": found.flops.total,
        "samples_per_s": found.samples_per_s,
        "speed_is": None if found.samples_per_s is None else "measured" if found.is_measured else "assumed",
        "hours": hours,
        "cost": _costs(subject, options, hours),
        "compare": [{**asdict(choice), "flops": choice.flops.total} for choice in choices],
    }


def _with_allocator(found: Forecast) -> float:
    return found.target.program + found.memory.total * (1 + ALLOCATOR_SHARE)


# Text ----------------------------------------------------------------------------------------------------------------


def _describe(subject: Subject, options: PlanOptions, found: Forecast) -> str:
    """The forecast as text, one row a subject."""
    memory, kind, device = found.memory, subject.config.base.quantize, subject.accelerator.device.type
    base_type = kind if kind != "none" else {"no": "fp32"}.get(subject.precision, subject.precision)
    where = options.card or f"this {device}"
    parts = {
        "the program": found.target.program,
        f"base ({base_type})": memory.base,
        "adapter": memory.adapter,
        "optimiser": memory.optimizer,
        "EMA": memory.ema,
        "step": memory.step,
    }
    total = " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    fits = f"largest micro-batch {found.largest_batch}" if found.largest_batch else "too little for one sample"
    is_gpu = bool(options.card) or device != "cpu"
    hours = _hours(subject, found)
    cost = _costs(subject, options, hours)
    rows = {
        "memory": f"{found.device / GIB:.2f} GiB = {total}",
        "allocator": f"up to {_with_allocator(found) / GIB:.2f} GiB with what a GPU's allocator adds (assumed)"
        if is_gpu
        else "",
        "room": f"{found.target.room / GIB:.1f} GiB on {where}: {fits}",
        "disk": _describe_disk(options, found),
        "work": f"{found.flops.total / 1e12:.4g} TFLOP a sample",
        "time": _describe_time(subject, options, found, hours),
        "cost": f"{_range(cost)} at {options.price:g} for a GPU's hour" if cost else "",
    }
    return "Needs\n" + "\n".join(f"  {name:<15}{value}" for name, value in rows.items() if value)


def _describe_disk(options: PlanOptions, found: Forecast) -> str:
    each = f"{found.cache / GIB:.2f} GiB of cache at most"
    if options.machines > 1:
        total = found.cache * options.machines / GIB
        shared = "one copy if --data.prepared_dir is a folder that all machines share"
        each += f" on each machine, {total:.2f} GiB on {options.machines}; {shared}"
    return f"{each}; {found.output / GIB:.2f} GiB in the run's folder"


def _describe_time(subject: Subject, options: PlanOptions, found: Forecast, hours: tuple[float, float] | None) -> str:
    if hours is None or found.samples_per_s is None:
        if options.card:
            return f"not measured on {options.card}; a card's name, such as --card 'RTX 4090', gives a forecast"
        why = "without a probe" if _has_weights(subject) else f"because {subject.base.name} is not on this machine"
        return f"not measured {why}; a card's name, such as --card 'RTX 4090', gives a forecast"
    speed = f"{_range(hours)} hours of steps at {_range(found.samples_per_s)} samples/s a process"
    if found.is_measured:
        return f"{speed} (measured on random content), without the time to prepare the data"
    return f"{speed} ({_efficiency()}), without the time to prepare the data"


def _efficiency() -> str:
    from t2i_adapter.training.forecast import EFFICIENCY

    return "assumed: {:.0%} to {:.0%} of the card's matrix rate; not measured".format(*EFFICIENCY)


def _range(values: tuple[float, float]) -> str:
    """Two numbers for people, or one if they are equal."""
    words = [f"{value:.2f}" if value < 10 else f"{value:,.0f}" for value in values]
    return words[0] if words[0] == words[1] else f"{words[0]} to {words[1]}"


def _describe_choices(choices: list[Choice], options: PlanOptions, target: Target) -> str:
    """The table of `--compare`."""
    headings = ("precision", "checkpointing", "base", "micro-batch", "GiB", "TFLOP/sample", "samples/s", "")
    rows: list[tuple[str, ...]] = [headings]
    for choice in choices:
        speed = choice.samples_per_s
        rows.append(
            (
                {"no": "fp32"}.get(choice.precision, choice.precision),
                choice.blocks,
                choice.quantize,
                str(choice.largest_batch) if choice.largest_batch else "does not fit",
                f"{choice.device / GIB:.2f}",
                f"{choice.flops.total / 1e12:.4g}",
                f"{speed[0]:.2f} to {speed[1]:.2f}" if speed and choice.largest_batch else "",
                "<- best" if choice.is_best else "",
            )
        )
    widths = [max(len(row[place]) for row in rows) for place in range(len(headings))]
    lines = ("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    where = options.card or "this machine"
    note = _compare_note(target.card)
    table = "\n".join(line.rstrip() for line in lines)
    return (
        f"Ways to fit into {target.room / GIB:.1f} GiB on {where}, each at its largest micro-batch\n{table}\n  {note}"
    )


def _compare_note(card: Card | None) -> str:
    if card is None:
        return "The best is the one with the least work a sample; the speed of this device is not known."
    return f"samples/s of a process: {_efficiency()}. A small micro-batch and dequantising cost more than is counted."
