"""Connects the processes of a run, chooses its device and precision, and sets torch's switches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, patch_environment

from t2i_adapter.config.tree import Config, seconds_of
from t2i_adapter.devices import (
    choose_device,
    count_devices,
    hardware_of,
    has_driver,
    limit_malloc_arenas,
    why_no_cuda,
)
from t2i_adapter.errors import UserError, flag
from t2i_adapter.training import numerics, tracking
from t2i_adapter.training.peers import find_peers_failed, is_loss
from t2i_adapter.training.update import exchange_options

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Mixed precision as accelerate names it -> dtype of the frozen base and the encoders."""


def patience_of(config: Config) -> timedelta:
    """Most time that a process waits for a word of another one."""
    return timedelta(seconds=seconds_of(config.train.patience, "train.patience"))


def make_accelerator(config: Config) -> Accelerator:
    """Ranks, device, mixed precision and torch's switches; prints lines about options that this device lacks.

    Raises UserError if the device is missing or lacks what an option needs.
    """
    limit_malloc_arenas()
    wanted = config.train.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if wanted not in (None, *DTYPES):
        raise UserError(f"{wanted}: allowed are {', '.join(DTYPES)}.", option="train.mixed_precision")
    numerics.prepare_deterministic(config)
    device = _choose_device(config.train.device)
    hardware = hardware_of(device)
    precision, lines = numerics.choose_precision(wanted, hardware)
    lines += numerics.idle_options(config, hardware)
    numerics.set_switches(config)
    output = Path(config.output_dir)
    log_with: Any = tracking.trackers_named(config.tracking.report_to)
    project = ProjectConfiguration(str(output), logging_dir=str(output / config.tracking.logging_dir))
    patience = patience_of(config)
    try:
        with _accelerate_on(device):
            accelerator = Accelerator(
                cpu=device == "cpu",
                mixed_precision=precision,
                log_with=log_with,
                project_config=project,
                kwargs_handlers=[InitProcessGroupKwargs(timeout=patience), exchange_options()],
            )
    except RuntimeError as fault:
        if is_loss(fault):
            raise find_peers_failed(fault, patience) from fault
        raise
    if config.train.device == "auto" and device == "cpu" and has_driver():
        lines.append(f"train.device auto: {why_no_cuda()}. This run uses the CPU.")
    for line in lines:
        accelerator.print(line)
    return accelerator


def _choose_device(name: str) -> str:
    """This process's device. Raises UserError, also if the processes of this machine are more than its GPUs."""
    if name == "auto" and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t"):
        return "cpu"  # `accelerate launch --cpu`
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    if here > 1 and ":" in name:
        raise UserError(
            f"{name}: names one device for {here} processes; use {name.partition(':')[0]}, and each takes its own.",
            option="train.device",
        )
    device = choose_device(name, option="train.device")
    kind = torch.device(device).type
    if kind != "cpu":
        check_processes(here, kind, count_devices(kind))
    return device


def check_processes(here: int, kind: str, count: int) -> None:
    """Raises UserError if `here` processes of one machine are more than its `count` devices: NCCL and its like refuse
    two processes on one."""
    if here > count:
        raise UserError(
            f"{kind}: {here} processes on this machine and {count} {kind} device{'s' * (count > 1)}: start {count}, or "
            f"use {flag('train.device')} cpu.",
            option="train.device",
        )


@contextmanager
def _accelerate_on(device: str) -> Iterator[None]:
    """Inside, accelerate takes this device. Its state of an earlier run in this process, such as its precision, is
    discarded, except for the connection to other processes."""
    is_alone = not torch.distributed.is_initialized()
    AcceleratorState._reset_state(reset_partial_state=is_alone)
    place = torch.device(device)
    if not is_alone or place.index is None or int(os.environ.get("WORLD_SIZE") or 1) > 1:
        yield
        return
    torch.accelerator.set_device_index(place.index)
    with patch_environment(accelerate_torch_device=device):
        yield
