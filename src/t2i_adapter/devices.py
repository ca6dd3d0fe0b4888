"""The device to run on, chosen in one place; CPU threads and memory: splits cores, limits malloc arenas, frees memory,
and halves work for which there is too little.

What a device can do is in `abilities.py`.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Barrier
from typing import Generic, TypeVar

import torch
from torch import Tensor

from t2i_adapter.abilities import Hardware
from t2i_adapter.errors import UserError, first_line, flag

_M_ARENA_MAX = -8  # from glibc's malloc.h
_ALLOWED = "allowed are auto, cpu, cuda, cuda:1, xpu, mps."
_DRIVER = Path("/proc/driver/nvidia/version")
_CPU_OUT_OF_MEMORY = (
    *("not enough memory", "can't allocate memory"),
    *("could not create a memory", "could not create a primitive"),
)
"""Texts of the plain RuntimeErrors that torch's CPU allocator and oneDNN raise; they have no class of their own."""
T = TypeVar("T")


def choose_device(name: str = "auto", *, option: str = "device") -> str:
    """Returns the device of that name if this machine has it and it works; "auto" is the first of cuda, xpu, mps, cpu
    that it has.

    Of several processes on a machine (torchrun's WORLD_SIZE and LOCAL_RANK) each gets the GPU of its own number, if
    the name has none. option: path of the option that names the device, for messages. Raises UserError.
    """
    kinds = _kinds_here()
    if name == "auto":
        name = kinds[0]
    try:
        device = torch.device(name)
    except RuntimeError as fault:
        raise UserError(f"{name}: no such device; {_ALLOWED}", option=option) from fault
    if device.type not in ("cuda", "xpu", "mps", "cpu"):
        raise UserError(f"{name}: {_ALLOWED}", option=option)
    if device.type == "cpu":
        return "cpu"
    if device.type not in kinds:
        why = why_no_cuda() if device.type == "cuda" else f"no {device.type} device found"
        raise UserError(f"{name}: {why}, or use {flag(option)} cpu or auto.", option=option)
    count = count_devices(device.type)
    if device.index is None:
        name = own_device(device.type, count, os.environ)
    elif device.index >= count:
        raise UserError(f"{name}: this machine has {count} of them, numbered from 0.", option=option)
    _start(name, option)
    return name


def own_device(kind: str, count: int, environment: Mapping[str, str]) -> str:
    """The device of this process among `count` of a kind: with several processes the one of its number on the machine,
    or one that it shares if there are fewer; `kind` itself for a single process."""
    if count < 2 or int(environment.get("WORLD_SIZE") or 1) < 2:
        return kind
    return f"{kind}:{int(environment.get('LOCAL_RANK') or 0) % count}"


def count_devices(kind: str) -> int:
    """Number of devices of a kind ("cuda", "xpu", "mps", "cpu") that this machine has."""
    counts = {"cuda": torch.cuda.device_count, "xpu": torch.xpu.device_count}
    return counts[kind]() if kind in counts else int(kind in _kinds_here())


def _kinds_here() -> list[str]:
    """The kinds of devices that this machine has, the fastest first; the CPU is the last."""
    has = {"cuda": _find_cuda()[0], "xpu": torch.xpu.is_available(), "mps": torch.backends.mps.is_available()}
    return [*(kind for kind, is_there in has.items() if is_there), "cpu"]


def _find_cuda() -> tuple[bool, str]:
    """Whether CUDA can be used, and torch's warning if a driver is there and does not work, else ""."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        is_there = torch.cuda.is_available()
    return is_there, str(caught[0].message).strip().partition("\n")[0] if caught else ""


def _start(name: str, option: str) -> None:
    """Writes a number on the device. Raises UserError if the driver, other programs or a torch without kernels for
    this card forbid it: the first error would otherwise be raised anywhere in the run."""
    try:
        torch.zeros(1, device=name).add_(1)
    except RuntimeError as fault:  # torch.OutOfMemoryError and torch.AcceleratorError are RuntimeErrors
        raise UserError(f"{name}: {start_fault(first_line(fault))}", option=option) from fault


def start_fault(text: str) -> str:
    """What to do about an error with this first line, which a GPU returned when it was first used."""
    for words, remedy in _START_REMEDIES.items():
        if words in text.lower():
            return f"the device cannot be used ({text}): {remedy}."
    return f"the device cannot be used ({text}): look at `nvidia-smi`, start the machine again, or use a CPU."


_START_REMEDIES = {
    "no kernel image": "this torch has no kernels for its compute capability; install another build from pytorch.org",
    "out of memory": "other programs hold its memory (`nvidia-smi` lists them); end them, or choose another device",
    "busy or unavailable": "another program has it for itself; end that, or choose another device",
    "driver": "install a newer driver, or a torch build from pytorch.org for this driver's CUDA version",
}
"""Words of an error at the first use of a GPU, in small letters -> what to do."""


def why_no_cuda() -> str:
    """Why CUDA cannot be used here, and what to do: a clause for a message."""
    return explain_no_cuda(
        torch.__version__,
        torch.version.cuda or torch.version.hip,
        has_driver=has_driver(),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        warning=_find_cuda()[1],
    )


def explain_no_cuda(version: str, build: str | None, *, has_driver: bool, visible: str | None, warning: str) -> str:
    """Why CUDA cannot be used, of what is known.

    Args:
        version: torch's.
        build: the CUDA version that torch was built for; None for a build without.
        has_driver: whether this machine has an NVIDIA driver.
        visible: $CUDA_VISIBLE_DEVICES; None if it is not set.
        warning: what torch printed when it looked for a device.
    """
    if build is None:
        found = "" if has_driver else ", and no NVIDIA driver was found"
        return (
            f"no CUDA GPU can be used: this torch ({version}) is a build without CUDA{found}; "
            "install the CUDA build of torch from pytorch.org"
        )
    if visible is not None and visible.split(",")[0].strip() in ("", "-1"):
        return f"no CUDA GPU found: CUDA_VISIBLE_DEVICES={visible!r} hides them all; unset it"
    if not has_driver:
        return "no CUDA GPU found: no NVIDIA driver is here; install one, or start the container with its GPUs"
    said = f" ({warning})" if warning else ""
    return (
        f"no CUDA GPU can be used: the driver does not work with this torch, built for CUDA {build}{said}; "
        "install a newer driver, or a torch build from pytorch.org for this driver's CUDA version"
    )


def has_driver() -> bool:
    """Whether this machine has an NVIDIA driver, whatever torch makes of it."""
    return _DRIVER.exists() or shutil.which("nvidia-smi") is not None


def hardware_of(device: torch.device | str) -> Hardware:
    """What decides the abilities of a device that this machine has."""
    place = torch.device(device)
    return _hardware(place.type, place.index)


@cache
def _hardware(kind: str, index: int | None) -> Hardware:
    if kind == "cuda":
        return Hardware("rocm") if torch.version.hip else Hardware("cuda", torch.cuda.get_device_capability(index))
    if kind == "mps":
        major, minor, *_ = [*map(int, platform.mac_ver()[0].split(".")), 0]
        return Hardware("mps", (major, minor))
    return Hardware("xpu") if kind == "xpu" else Hardware("cpu")


def in_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, on the CPU if its device has no such numbers."""
    return (tensor if hardware_of(tensor.device).can("float64") else tensor.cpu()).double()


def memory_bytes(device: torch.device | str) -> int | None:
    """All memory of a GPU in bytes; None for a device whose memory is the host's."""
    place = torch.device(device)
    if place.type in ("cuda", "xpu"):
        return getattr(torch, place.type).get_device_properties(place).total_memory
    return None


def peak_bytes(device: torch.device | str) -> int | None:
    """The most bytes of tensors on a GPU since `reset_peak`; None if the device does not count them."""
    place = torch.device(device)
    return getattr(torch, place.type).max_memory_allocated(place) if place.type in ("cuda", "xpu") else None


def reset_peak(device: torch.device | str) -> None:
    """Begins a new count for `peak_bytes`."""
    place = torch.device(device)
    if place.type in ("cuda", "xpu"):
        getattr(torch, place.type).reset_peak_memory_stats(place)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a CPU tensor's copy on the device. The host does not wait for a GPU: it copies from pinned memory, after
    the work that the GPU has to do first."""
    if not hardware_of(device).can("pinned"):
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
    kind = torch.device(device).type
    if kind != "cpu":
        getattr(torch, kind).empty_cache()
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
