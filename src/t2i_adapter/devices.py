"""The device to run on; CPU threads and memory: splits cores between threads, limits malloc arenas, frees memory, and
halves work for which there is too little.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Barrier
from typing import Generic, TypeVar

import torch

from t2i_adapter.errors import UserError, first_line, flag

_M_ARENA_MAX = -8  # from glibc's malloc.h
_CPU_OUT_OF_MEMORY = (
    *("not enough memory", "can't allocate memory"),
    *("could not create a memory", "could not create a primitive"),
)
"""Texts of the plain RuntimeErrors that torch's CPU allocator and oneDNN raise; they have no class of their own."""
T = TypeVar("T")


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


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns a CPU tensor's copy on the device. The host does not wait for a GPU: it copies from pinned memory, after
    the work that the GPU has to do first."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


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


def is_out_of_memory(fault: BaseException) -> bool:
    """Whether an exception reports that the device's or the host's memory ran out. A `UserError` has a kind for it."""
    if isinstance(fault, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(fault, UserError):
        return fault.kind == "out_of_memory"
    return isinstance(fault, RuntimeError) and any(text in str(fault) for text in _CPU_OUT_OF_MEMORY)


@dataclass
class FittingParts(Generic[T]):
    """Does work on many items in parts that fit into memory: each time it runs out, half as many items are tried.

    items: their name in the plural, for messages. remedy: what the user can do if there is too little for one item.
    """

    items: str
    remedy: str
    most: int | None = None
    """Most items at a time; None until memory runs out."""

    def __call__(self, work: Callable[[int, int], T], count: int, size: int, device: torch.device | str) -> Iterator[T]:
        """Yields work(start, stop) for the parts of `count` items in order, at most `size` items each.

        Raises UserError of kind "out_of_memory" if a single item does not fit.
        """
        start = 0
        while start < count:
            stop = min(count, start + size, start + (self.most or size))
            result = self._try(work, start, stop)
            if isinstance(result, _OutOfMemory):
                release(device)  # here nothing refers to the failed attempt any more
                self._halve(stop - start, result.text)
            else:
                yield result
                start = stop

    def _try(self, work: Callable[[int, int], T], start: int, stop: int) -> T | _OutOfMemory:
        try:
            return work(start, stop)
        except (RuntimeError, MemoryError) as fault:  # torch.OutOfMemoryError is a RuntimeError
            if not is_out_of_memory(fault):
                raise
            return _OutOfMemory(first_line(fault))

    def _halve(self, tried: int, fault: str) -> None:
        if tried == 1:
            text = f"Out of memory for one of the {self.items} ({fault}): {self.remedy}."
            raise UserError(text, kind="out_of_memory")
        self.most = tried // 2
        line = f"Out of memory for {tried} {self.items} at once: from here on {self.most} at a time."
        print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class _OutOfMemory:
    """An attempt that failed. text: the error's first line."""

    text: str
