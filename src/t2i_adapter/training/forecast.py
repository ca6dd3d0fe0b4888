"""What a run will need of memory, disk and time, computed before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from t2i_adapter.annotators.registry import open_annotator
from t2i_adapter.batches.example import example_batch
from t2i_adapter.cache.records import caption_bytes, picture_bytes
from t2i_adapter.cache.texts import MAX_AUTO_BYTES
from t2i_adapter.cards import Card, card_of_device
from t2i_adapter.config.tree import Config
from t2i_adapter.errors import UserError
from t2i_adapter.models.base import Base
from t2i_adapter.training.accelerator import DTYPES
from t2i_adapter.training.flops import Flops, rates_of
from t2i_adapter.training.frozen_model import load_frozen_model
from t2i_adapter.training.memory import OPTIMIZER_BYTES, Memory, Shapes, largest_batch
from t2i_adapter.training.plan import Plan
from t2i_adapter.training.update import Update
from t2i_adapter.types import text_length

PROBE_STEPS = 3
"""Least number of updates that the probe times."""
WARM_UP_SECONDS, PROBE_SECONDS = 2.0, 2.0
RESERVE = 0.05
"""Share of a device's memory that the forecast leaves free, because its allocator cannot use all of it."""
CONTEXT_BYTES = 600 * 2**20
"""What CUDA and its libraries take on a device before the first tensor."""
LIBRARIES_BYTES = 130 * 2**20
"""What the libraries take on a CPU once they compute: code, buffers, and what preparing the data leaves allocated. One
machine took 86 MiB and another about 170 MiB."""
EFFICIENCY = (0.35, 0.5)
"""Share of a card's matrix rate that training reaches: assumed, not measured."""


@dataclass(frozen=True)
class Subject:
    """The run that is planned. plan: its `processes` are those of the whole run."""

    config: Config
    base: Base
    adapter: Any
    plan: Plan
    accelerator: Accelerator
    precision: str
    """A key of `DTYPES`."""


@dataclass(frozen=True)
class Target:
    """The device that is planned for. room: bytes of its memory; program: what a process takes besides its tensors."""

    room: int
    program: int
    card: Card | None
    is_here: bool

    @property
    def free(self) -> float:
        """Bytes for the tensors of a run."""
        return self.room * (1 - RESERVE) - self.program


@dataclass(frozen=True)
class Forecast:
    """What a run needs.

    Attributes:
        memory: bytes on the device, of the tensors.
        target: the device.
        largest_batch: most samples of a micro-batch, 0 if not even one fits.
        cache, output: bytes on disk. cache: on each machine, or once on a folder that all share.
        flops: of one sample.
        samples_per_s: of one process, the least and the most; None if nothing is known about the device's speed.
        is_measured: whether `samples_per_s` was measured here; otherwise it follows from `EFFICIENCY`.
    """

    memory: Memory
    target: Target
    largest_batch: int
    cache: int
    output: int
    flops: Flops
    samples_per_s: tuple[float, float] | None
    is_measured: bool

    @property
    def device(self) -> int:
        """All bytes on the device."""
        return self.target.program + self.memory.total


def find_target(device: torch.device, *, card: Card | None, card_bytes: int | None) -> Target:
    """The device to plan for. card_bytes: its memory; None plans for this machine's `device`."""
    if card_bytes is not None:
        return Target(card_bytes, CONTEXT_BYTES, card, is_here=False)
    if device.type == "cuda":
        here = card_of_device(torch.cuda.get_device_name(device))
        return Target(torch.cuda.get_device_properties(device).total_memory, CONTEXT_BYTES, here, is_here=True)
    program = _resident_bytes() + LIBRARIES_BYTES if device.type == "cpu" else CONTEXT_BYTES
    return Target(_free_bytes(), program, None, is_here=True)


def forecast(subject: Subject, target: Target, *, probe: bool) -> Forecast:
    """Memory and operations from shapes, disk from sizes, time from a few updates or from the card's rate.

    probe: time some updates, if the plan is for this machine and the base's weights are here.
    """
    config, side = subject.config, subject.config.data.resolution
    shapes = Shapes(config, subject.base, subject.adapter, DTYPES[subject.precision])
    size = config.train.batch_size
    memory = shapes.memory(size, height=side, width=side)
    fixed = memory.total - memory.step
    speed, is_measured = None, False
    if target.is_here and probe:
        rate = _probe(subject)
        speed, is_measured = (rate, rate), True
    elif target.card:
        speed = assumed_speed(config, subject.precision, target.card, shapes.step(size, height=side, width=side).flops)
        speed = speed and (speed[0] * size, speed[1] * size)
    return Forecast(
        memory=memory,
        target=target,
        largest_batch=largest_batch(
            lambda count: shapes.step(count, height=side, width=side).peak, target.free - fixed
        ),
        cache=_cache_bytes(subject),
        output=_output_bytes(config, subject.plan.trainable_parameters),
        flops=shapes.step(size, height=side, width=side).flops / size,
        samples_per_s=speed,
        is_measured=is_measured,
    )


def assumed_speed(config: Config, precision: str, card: Card, flops: Flops) -> tuple[float, float] | None:
    """Least and most repetitions a second of what takes `flops`; None if the card has no units for the precision."""
    rates = rates_of(precision, allow_tf32=config.train.allow_tf32, quantize=config.base.quantize, card=card)
    seconds = flops.seconds(card, *rates)
    return None if seconds is None else (EFFICIENCY[0] / seconds, EFFICIENCY[1] / seconds)


def _probe(subject: Subject) -> float:
    """Samples/s of the run's own updates on a random batch, after a warm-up."""
    config, device = subject.config, subject.accelerator.device
    side, train = config.data.resolution, config.train
    batch = example_batch(
        subject.base.unet_config,
        train.batch_size,
        height=side,
        width=side,
        channels=subject.adapter.config["in_channels"],
        draws=train.noise_draws,
        length=text_length(config.data.max_tokens),
        device=device,
    )
    frozen = load_frozen_model(config, subject.base, device, DTYPES[subject.precision])
    update = Update(config, subject.plan, subject.accelerator, subject.adapter, frozen)
    batches = repeat(batch)

    def updates_per_s(least: int, seconds: float) -> float:
        """Makes at least `least` updates, and more until `seconds` have passed."""
        start, count = time.perf_counter(), 0
        while count < least or time.perf_counter() - start < seconds:
            update(batches)
            count += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return count / (time.perf_counter() - start)

    with update.running():
        updates_per_s(1, WARM_UP_SECONDS)
        rate = updates_per_s(PROBE_STEPS, PROBE_SECONDS)
    return rate * train.batch_size * train.gradient_accumulation_steps


def _cache_bytes(subject: Subject) -> int:
    """Latents, conditions before they are compressed, and one caption's text states, for each pair."""
    config, pairs = subject.config, subject.plan.samples
    if config.data.cache == "none":
        return 0
    side = config.data.resolution
    view = picture_bytes(side) + _condition_bytes(config, subject.adapter.config["in_channels"])
    texts = pairs * caption_bytes(subject.base, config.data.max_tokens)
    is_live = config.data.text_cache == "live" or (config.data.text_cache == "auto" and texts > MAX_AUTO_BYTES)
    return pairs * config.data.views * view + (0 if is_live else texts)


def _condition_bytes(config: Config, channels: int) -> int:
    """Bytes of a crop's condition at most: a bit a pixel for a line drawing, a byte for a grey map, otherwise a byte
    for each channel."""
    pixels = config.data.resolution**2
    try:
        facts = open_annotator(config.data.condition).facts if config.data.condition else None
    except UserError:  # its packages are not on this machine
        facts = None
    if facts and facts.channels == 1:
        return pixels // 8 if facts.levels == 2 else pixels
    return channels * pixels


def _output_bytes(config: Config, trained: int) -> int:
    """The checkpoints that are kept, one more while it is written, and the adapter in float32 and fp16."""
    saves = -(-(config.train.max_steps or config.checkpoint.every) // config.checkpoint.every)
    kept = min(saves, (config.checkpoint.keep or saves) + 1)
    state = 4 + OPTIMIZER_BYTES[config.optim.name] + (4 if config.train.ema_decay else 0)
    return trained * (kept * state + 6)


def _resident_bytes() -> int:
    """Memory of this process with its libraries loaded: what a run has before its first weight."""
    line = next(
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith("VmRSS")
    )
    return int(line.split()[1]) * 1024


def _free_bytes() -> int:
    """Memory of this machine that is available now."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024
