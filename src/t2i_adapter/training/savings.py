"""Compares all ways to save memory: precision, gradient checkpointing and quantisation, at the largest micro-batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from t2i_adapter.errors import UserError, flag
from t2i_adapter.training.accelerator import DTYPES
from t2i_adapter.training.flops import Flops
from t2i_adapter.training.forecast import Subject, Target, assumed_speed
from t2i_adapter.training.memory import Shapes, largest_batch


@dataclass(frozen=True)
class Choice:
    """One combination of options, at the largest micro-batch that fits.

    Attributes:
        precision, blocks, quantize: values of `train.mixed_precision`; of `train.checkpoint_blocks`, or "none" without
            gradient checkpointing; of `base.quantize`.
        largest_batch: 0 if not even one sample fits.
        device: bytes on the device with that batch, or with one sample if none fits.
        flops: of one sample.
        samples_per_s: of one process, least and most; None if the card's speed is not known.
        is_best: whether it is the fastest that fits; of equal ones, the one with the plainest base.
    """

    precision: str
    blocks: str
    quantize: str
    largest_batch: int
    device: int
    flops: Flops
    samples_per_s: tuple[float, float] | None
    is_best: bool = False


def compare(subject: Subject, target: Target) -> list[Choice]:
    """Every combination of precision, gradient checkpointing and quantisation; one is marked as the best that fits.

    Raises UserError if none fits.
    """
    half = "fp16" if subject.precision == "fp16" or (target.card and target.card.bf16 is None) else "bf16"
    choices = [
        choice
        for precision in (half, "no")
        for blocks in ("none", "large", "all")
        for choice in _choices(subject, target, precision, blocks)
    ]
    fitting = [choice for choice in choices if choice.largest_batch]
    if not fitting:
        least = min(choices, key=lambda choice: choice.device)
        raise UserError(
            f"nothing fits into {target.room / 2**30:.1f} GiB: the least is {least.device / 2**30:.1f} GiB, with "
            f"{flag('train.mixed_precision')} {least.precision}, {flag('train.checkpoint_blocks')} {least.blocks}, "
            f"{flag('base.quantize')} {least.quantize} and one sample. Use a device with more memory, or a lower "
            f"{flag('data.resolution')}.",
            kind="out_of_memory",
        )
    best = max(fitting, key=_speed)
    return [replace(choice, is_best=choice is best) for choice in choices]


def _speed(choice: Choice) -> float:
    return choice.samples_per_s[0] if choice.samples_per_s else 1 / choice.flops.total


def _choices(subject: Subject, target: Target, precision: str, blocks: Any) -> list[Choice]:
    """The choices with each quantisation. A step's own memory does not depend on it, for only one dequantised matrix
    exists at a time (benchmarks/results/memory_*.json). Its work is equal for all formats."""
    config, side = subject.config, subject.config.data.resolution
    train = replace(
        config.train,
        gradient_checkpointing=blocks != "none",
        checkpoint_blocks="all" if blocks == "none" else blocks,
    )
    found: list[Choice] = []
    plain: Shapes | None = None
    flops: Flops | None = None
    for kind in ("none", "float8", "int8", "nf4"):
        own = replace(config, train=train, base=replace(config.base, quantize=kind))
        shapes = Shapes(own, subject.base, subject.adapter, DTYPES[precision])
        plain = plain or shapes
        peak = partial(_peak, plain, side)
        fixed = shapes.state().total
        largest = largest_batch(peak, target.free - fixed)
        if len(found) < 2:  # the unquantised base, and the first format
            flops = shapes.step(1, height=side, width=side).flops
        assert flops is not None
        speed = assumed_speed(own, precision, target.card, flops) if target.card else None
        device = target.program + fixed + peak(max(1, largest))
        found.append(Choice(precision, blocks, kind, largest, device, flops, speed))
    return found


def _peak(shapes: Shapes, side: int, count: int) -> int:
    return shapes.step(count, height=side, width=side).peak
