"""What a run will need of memory, disk and time, computed before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

import torch

from t2i_adapter.batches.example import example_batch
from t2i_adapter.cache.records import caption_bytes, picture_bytes
from t2i_adapter.config.tree import Config
from t2i_adapter.training.frozen_model import load_frozen_model
from t2i_adapter.training.memory import OPTIMIZER_BYTES, Memory, Shapes
from t2i_adapter.training.setup import DTYPES, Setup
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


@dataclass(frozen=True)
class Forecast:
    """Bytes and samples/s. program: what the process takes besides `memory`; room: memory of the device.

    largest_batch: most samples of a micro-batch, 0 if not even one fits. cache, output: bytes on disk.
    """

    memory: Memory
    program: int
    room: int
    largest_batch: int
    cache: int
    output: int
    samples_per_s: float | None

    @property
    def device(self) -> int:
        """All bytes on the device."""
        return self.program + self.memory.total


def forecast(setup: Setup, *, card_bytes: int | None, precision: str, probe: bool) -> Forecast:
    """Memory from shapes, disk from sizes, time from a few updates.

    card_bytes: memory of the device to plan for; None plans for this machine. precision: a key of `DTYPES`.
    probe: time some updates, if the plan is for this machine.
    """
    config, device = setup.config, setup.accelerator.device
    dtype = DTYPES[precision]
    is_here = card_bytes is None
    program = _resident_bytes() + LIBRARIES_BYTES if is_here and device.type == "cpu" else CONTEXT_BYTES
    room = _memory_of(device) if card_bytes is None else card_bytes
    shapes = Shapes(config, setup.base, setup.adapter, dtype)
    side = config.data.resolution
    one, two = (shapes.memory(size, height=side, width=side) for size in (1, 2))
    per_sample = max(1, two.step - one.step)
    free = room * (1 - RESERVE) - program - one.total
    return Forecast(
        memory=replace(one, step=one.step + per_sample * (config.train.batch_size - 1)),
        program=program,
        room=room,
        largest_batch=0 if free < 0 else 1 + int(free // per_sample),
        cache=_cache_bytes(setup),
        output=_output_bytes(config, setup.plan.trainable_parameters),
        samples_per_s=_probe(setup, dtype) if is_here and probe else None,
    )


def _probe(setup: Setup, dtype: torch.dtype) -> float:
    """Samples/s of the run's own updates on a random batch, after a warm-up."""
    config, device = setup.config, setup.accelerator.device
    side, train = config.data.resolution, config.train
    batch = example_batch(
        setup.base.unet_config,
        train.batch_size,
        height=side,
        width=side,
        channels=setup.adapter.config["in_channels"],
        draws=train.noise_draws,
        length=text_length(config.data.max_tokens),
        device=device,
    )
    frozen = load_frozen_model(config, setup.base, device, dtype)
    update = Update(config, setup.plan, setup.accelerator, setup.adapter, frozen)
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


def _cache_bytes(setup: Setup) -> int:
    """Latents, unpacked conditions, and one caption's text states, for each pair."""
    config = setup.config
    if config.data.cache == "none":
        return 0
    view = picture_bytes(config.data.resolution, setup.adapter.config["in_channels"])
    text = 0 if config.data.text_cache == "live" else caption_bytes(setup.base, config.data.max_tokens)
    return setup.plan.samples * (config.data.views * view + text)


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


def _memory_of(device: torch.device) -> int:
    """All memory of a GPU; of a CPU, the memory that is available now."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024
