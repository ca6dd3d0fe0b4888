"""The verb `plan`: what a run will need of memory, disk and time, told before it."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from t2i_adapter.batches.example import example_batch
from t2i_adapter.cache.records import caption_bytes, picture_bytes
from t2i_adapter.config.tree import Config
from t2i_adapter.devices import on_cores
from t2i_adapter.training.frozen_model import load_frozen_model
from t2i_adapter.training.loop import Trainer
from t2i_adapter.training.memory import OPTIMIZER_BYTES, Memory, Shapes
from t2i_adapter.training.setup import DTYPES, Setup, set_up
from t2i_adapter.training.signals import Stopper
from t2i_adapter.verbs.plan_options import PlanOptions

GIB = 2**30
PROBE_STEPS = 3
WARM_UP_SECONDS, PROBE_SECONDS = 2.0, 2.0
RESERVE = 0.05
"""Share of a device's memory that is left alone: what its allocator cannot use in whole pieces."""
CONTEXT_BYTES = 600 * 2**20
"""What a CUDA device keeps for itself and its libraries before the first tensor."""
LIBRARIES_BYTES = 170 * 2**20
"""What the libraries take on a CPU once they compute: code, buffers, what the preparing of data leaves behind."""
TEXT_BYTES = 2
"""Of a text state's number in the cache."""


@dataclass(frozen=True)
class Forecast:
    """What was found; bytes and seconds. device: all that the device holds, the program's own share included."""

    memory: Memory
    own: int
    room: int
    largest_batch: int
    cache: int
    output: int
    samples_per_s: float | None

    @property
    def device(self) -> int:
        return self.own + self.memory.total


def run(options: PlanOptions) -> None:
    """Prints the plan of a run with the options, and what it will need. Writes nothing."""
    with tempfile.TemporaryDirectory() as nothing:
        # A folder that is not there: the plan is of a whole run, whatever the real one holds already.
        config = replace(
            options.config,
            output_dir=str(Path(nothing) / "run"),
            checkpoint=replace(options.config.checkpoint, resume=None),
        )
        setup = replace(set_up(_anywhere(config) if options.card else config), config=config)
    print(f"{setup.source.describe()}\nPlan\n{setup.plan.describe()}", flush=True)
    print(describe(setup, options, forecast(setup, options)))


def _anywhere(config: Config) -> Config:
    """The same without what asks for a package or a device that the other machine has and this one may not have."""
    train = replace(config.train, xformers=False, mixed_precision="no")
    return replace(config, train=train, optim=replace(config.optim, name="adamw"))


def _precision(setup: Setup, options: PlanOptions) -> str:
    wanted = setup.config.train.mixed_precision if options.card else setup.accelerator.mixed_precision
    return wanted or "no"


def forecast(setup: Setup, options: PlanOptions) -> Forecast:
    """Memory from shapes alone, disk from sizes, time from a few steps where they are wanted and can be taken."""
    config, device = setup.config, setup.accelerator.device
    dtype = DTYPES[_precision(setup, options)]
    here = options.card is None
    own = _resident() + LIBRARIES_BYTES if here and device.type == "cpu" else CONTEXT_BYTES
    room = options.card_bytes() or _room(device)
    shapes = Shapes(config, setup.base, setup.adapter, dtype)
    side = config.data.resolution
    one, two = (shapes.memory(size, height=side, width=side) for size in (1, 2))
    each = max(1, two.step - one.step)
    left = room * (1 - RESERVE) - own - one.total
    memory = replace(one, step=one.step + each * (config.train.batch_size - 1))
    return Forecast(
        memory=memory,
        own=own,
        room=room,
        largest_batch=0 if left < 0 else 1 + int(left // each),
        cache=_cache_bytes(setup),
        output=_output_bytes(config, setup.plan.trainable_parameters),
        samples_per_s=_probe(setup, dtype) if here and options.probe else None,
    )


def describe(setup: Setup, options: PlanOptions, found: Forecast) -> str:
    """The forecast for people, one fact a line."""
    memory = found.memory
    where = options.card or f"this {setup.accelerator.device.type}"
    parts = {
        "the program": found.own,
        f"base ({_base_type(setup, options)})": memory.base,
        "adapter": memory.adapter,
        "optimiser": memory.optimizer,
        "average": memory.average,
        "step": memory.step,
    }
    told = " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    fits = f"largest micro-batch {found.largest_batch}" if found.largest_batch else "not even one sample fits"
    rows = [
        ("memory", f"{found.device / GIB:.2f} GiB = {told}"),
        ("room", f"{found.room / GIB:.1f} GiB on {where}: {fits}"),
        ("disk", f"{found.cache / GIB:.2f} GiB of cache at most, {found.output / GIB:.2f} GiB in the run's folder"),
        ("time", _time(setup, options, found)),
    ]
    return "Needs\n" + "\n".join(f"  {name:<15}{value}" for name, value in rows)


def _base_type(setup: Setup, options: PlanOptions) -> str:
    kind, precision = setup.config.base.quantize, _precision(setup, options)
    return kind if kind != "none" else {"no": "fp32"}.get(precision, precision)


def _time(setup: Setup, options: PlanOptions, found: Forecast) -> str:
    if found.samples_per_s is None:
        why = f"on {options.card}" if options.card else "without a probe"
        return f"not measured {why}; there, `t2i-adapter plan` with the same options and no --card measures it"
    hours = setup.plan.steps * setup.plan.global_batch / found.samples_per_s / setup.plan.processes / 3600
    return (
        f"{hours:.2f} hours of steps at {found.samples_per_s:.3g} samples/s a process (measured on random "
        "content), the preparing of data not counted"
    )


def _probe(setup: Setup, dtype: torch.dtype) -> float:
    """Samples a second of the run's own updates on random content, after some that are not counted."""
    config, device = setup.config, setup.accelerator.device
    side, train = config.data.resolution, config.train
    batch = example_batch(
        setup.base.unet_config,
        train.batch_size,
        height=side,
        width=side,
        channels=config.adapter.in_channels,
        draws=train.noise_draws,
        device=device,
    )
    frozen = load_frozen_model(config, setup.base, device, dtype)
    batches = repeat(batch)
    trainer = Trainer(
        config, setup.plan, setup.accelerator, setup.adapter, frozen, lambda _: batches, None, {}, Stopper()
    )

    def updates(least: int, seconds: float) -> float:
        """Updates a second; at least so many, and until so many seconds are over."""
        began, done = time.perf_counter(), 0
        while done < least or time.perf_counter() - began < seconds:
            trainer.advance(batches)
            done += 1
        _wait(device)
        return done / (time.perf_counter() - began)

    with on_cores(trainer.cores_beside_lanes):
        updates(1, WARM_UP_SECONDS)
        rate = updates(PROBE_STEPS, PROBE_SECONDS)
    return rate * train.batch_size * train.gradient_accumulation_steps


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cache_bytes(setup: Setup) -> int:
    """Of latents, conditions as they are before they are packed, and one caption's text states for each pair."""
    config = setup.config
    if config.data.cache == "none":
        return 0
    view = picture_bytes(config.data.resolution, config.adapter.in_channels)
    text = 0 if config.data.text_cache == "live" else caption_bytes(setup.base)
    return setup.plan.samples * (config.data.views * view + text)


def _output_bytes(config: Config, trained: int) -> int:
    """Of the checkpoints that are kept, one more while it is written, and the adapter in both its types."""
    saves = -(-(config.train.max_steps or config.checkpoint.every) // config.checkpoint.every)
    kept = min(saves, (config.checkpoint.keep or saves) + 1)
    state = 4 + OPTIMIZER_BYTES[config.optim.name] + (4 if config.train.ema_decay else 0)
    return trained * (kept * state + 6)


def _resident() -> int:
    """Bytes of this process now, with its libraries loaded: what a run has before its first weight."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def _room(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    lines: dict[str, Any] = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024
