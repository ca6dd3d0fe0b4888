"""Threads that share a CPU's cores between them."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier

import torch

_M_ARENA_MAX = -8  # glibc's malloc.h


def limit_malloc_arenas() -> None:
    """One of the C library's memory arenas a core, two at least, where it would have eight: what threads have freed in
    one the others cannot use, and one alone would keep them waiting. Called before the threads are made; a number
    that the environment gives stays."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None  # glibc has it
    if set_option and "MALLOC_ARENA_MAX" not in os.environ:
        set_option(_M_ARENA_MAX, max(2, torch.get_num_threads()))


def sharing_cores(count: int) -> ThreadPoolExecutor:
    """A pool of `count` threads, in each of which torch's operations use an equal part of this process' cores.

    The operations of a small model are too short to be divided between cores one by one; whole samples are not. Such
    threads run side by side, because torch lets go of the interpreter inside its operations.
    """
    cores = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "sharing-cores")
    together = Barrier(count)  # so that every thread of the pool takes one of the calls

    def settle(_: int) -> None:
        torch.get_num_threads()  # a thread takes the process' number when it first asks, and after that keeps its own
        torch.set_num_threads(max(1, cores // count))
        together.wait()

    list(pool.map(settle, range(count)))
    torch.set_num_threads(cores)
    return pool


@contextmanager
def on_cores(count: int | None) -> Iterator[None]:
    """Torch's operations in this thread, and in those that it starts, use so many cores; None leaves all as it is.

    A thread that feeds others wants one: its small operations would wake threads that then keep the cores busy,
    waiting for more, while the others need them.
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
    """How many such threads keep a device busy: one a core of a CPU, and one for anything else."""
    return torch.get_num_threads() if torch.device(device).type == "cpu" else 1


def release(device: torch.device | str) -> None:
    """Gives memory of dropped parts back to the device, and to the system what the C library would keep of it."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None  # glibc has it
    if trim:
        trim(0)
