"""The device to run on; CPU threads and memory: splits cores between threads, limits malloc arenas, frees memory."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier

import torch

from t2i_adapter.errors import UserError, flag

_M_ARENA_MAX = -8  # from glibc's malloc.h


def choose_device(name: str = "auto") -> str:
    """Returns the device of that name if this machine has it; "auto" is the first of cuda, xpu, mps, cpu that it has.

    Raises UserError.
    """
    has = {
        "cuda": torch.cuda.is_available(),
        "xpu": torch.xpu.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name == "auto":
        return next((kind for kind, is_there in has.items() if is_there), "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as fault:
        raise UserError(
            f"{name}: no such device; allowed are auto, cpu, cuda, cuda:1, xpu, mps.", option="device"
        ) from fault
    if device.type not in (*has, "cpu"):
        raise UserError(f"{name}: allowed are auto, cpu, cuda, cuda:1, xpu, mps.", option="device")
    if not has.get(device.type, True):
        kind = "CUDA GPU" if device.type == "cuda" else f"{device.type} device"
        raise UserError(f"{name}: no {kind} found; use {flag('device')} cpu or auto.", option="device")
    counts = {"cuda": torch.cuda.device_count, "xpu": torch.xpu.device_count}
    count = counts[device.type]() if device.type in counts else 1
    if device.index is not None and device.index >= count:
        raise UserError(f"{name}: this machine has {count} of them, numbered from 0.", option="device")
    return name


def limit_malloc_arenas() -> None:
    """Limits glibc's malloc to max(2, cores) arenas; its default is 8 a core.

    A thread cannot use memory that was freed in another arena, so many arenas waste memory; in a single one the threads
    wait for each other. Call it before threads are started. It does nothing if $MALLOC_ARENA_MAX is set.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None  # glibc has it
    if set_option and "MALLOC_ARENA_MAX" not in os.environ:
        set_option(_M_ARENA_MAX, max(2, torch.get_num_threads()))


def sharing_cores(count: int) -> ThreadPoolExecutor:
    """A pool of `count` threads; torch's operations in each of them use an equal part of this process' cores.

    The operations of a small model are too short to be split between cores; its samples can be split instead. The
    threads run in parallel, because torch releases the GIL inside its operations.
    """
    cores = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "sharing-cores")
    barrier = Barrier(count)  # each thread of the pool runs `set_cores` once

    def set_cores(_: int) -> None:
        torch.get_num_threads()  # the first call copies the process' number; from then on the thread has its own
        torch.set_num_threads(max(1, cores // count))
        barrier.wait()

    list(pool.map(set_cores, range(count)))
    torch.set_num_threads(cores)
    return pool


@contextmanager
def on_cores(count: int | None) -> Iterator[None]:
    """Inside, torch's operations in this thread, and in threads that it starts, use `count` cores; None changes
    nothing.

    Use 1 in a thread that feeds other threads: its small operations would wake OpenMP threads, whose busy waiting takes
    the cores from the others.
    """
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cores_of(device: torch.device | str) -> int:
    """Number of threads that keep a device busy: one a core of a CPU, and 1 for any other device."""
    return torch.get_num_threads() if torch.device(device).type == "cpu" else 1


def release(device: torch.device | str) -> None:
    """Returns the memory of unused objects to the device, and the free memory of glibc's malloc to the system."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None  # glibc has it
    if trim:
        trim(0)
