"""Gives a CPU build of torch a device named "cuda" (device.cpp). Import this module before torch.

A GPU's mistakes show on it: mixed devices, memory beyond a limit, memory that is read before it is written, and each
moment at which the host would wait for the GPU. It is no measure of speed, and its numbers are the CPU's.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

from support.emulated.build import build, folder_of

assert "torch" not in sys.modules, "torch asks for its devices when it is imported"
for _name in ("libc10.so", "libtorch_cpu.so"):
    ctypes.CDLL(str(folder_of("torch") / "lib" / _name), mode=ctypes.RTLD_GLOBAL)
_library = ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
_library.emulated_used.restype = _library.emulated_peak.restype = ctypes.c_int64
_library.emulated_set_limit.argtypes = [ctypes.c_int64]
_library.emulated_set_poison.argtypes = _library.emulated_set_waits_fail.argtypes = [ctypes.c_bool]
_library.emulated_seed.argtypes = [ctypes.c_uint64]

import torch  # noqa: E402  (after the device is registered)

PACKAGE = folder_of("t2i_adapter")
TOTAL = 8 * 2**30
"""Bytes of memory that the device says it has."""
CAPABILITY = (8, 0)
"""Of an A100: bf16, and no float8 units, which the CPU's kernels cannot stand in for."""


# Waits ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wait:
    """A moment at which the host waits for the device.

    what: the operation. inside: the package's functions on the stack, the outermost first, each "folder/file.py:name".
    line: the innermost of the package's lines, "folder/file.py:12"; empty in a thread that runs none of them, such as
    autograd's in a backward pass.
    """

    what: str
    inside: tuple[str, ...]
    line: str


_listeners: list[list[Wait]] = []
_report_type = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


def _on_wait(what: bytes) -> None:
    if not _listeners:
        return
    inside, line = [], ""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(PACKAGE):
            short = file.relative_to(PACKAGE).as_posix()
            line = line or f"{short}:{frame.f_lineno}"
            inside.append(f"{short}:{frame.f_code.co_name}")
        frame = frame.f_back
    for heard in _listeners:
        heard.append(Wait(what.decode(), tuple(reversed(inside)), line))


_report = _report_type(_on_wait)  # ctypes does not keep it alive
_library.emulated_on_wait(_report)


@contextlib.contextmanager
def waits() -> Iterator[list[Wait]]:
    """Collects the waits inside the context, of all threads of this process."""
    heard: list[Wait] = []
    _listeners.append(heard)
    try:
        yield heard
    finally:
        _listeners.remove(heard)


# Memory --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def limited(extra: int) -> Iterator[None]:
    """Inside, the device has `extra` bytes beyond those in use now; more is torch.OutOfMemoryError."""
    gc.collect()
    _library.emulated_set_limit(used() + extra)
    try:
        yield
    finally:
        _library.emulated_set_limit(0)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, new memory of the device is full of NaN (and -1), as a GPU's may be full of anything."""
    _library.emulated_set_poison(True)
    try:
        yield
    finally:
        _library.emulated_set_poison(False)


def used() -> int:
    """Bytes of the device's memory in use."""
    return _library.emulated_used()


def peak() -> int:
    """The most bytes in use since `torch.cuda.reset_peak_memory_stats`."""
    return _library.emulated_peak()


# torch.cuda ----------------------------------------------------------------------------------------------------------


class Stream:
    """The only stream, for code that asks for one."""

    cuda_stream = stream_id = 0
    device = torch.device("cuda", 0)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None: ...

    def synchronize(self) -> None:
        _on_wait(b"synchronize")

    def wait_stream(self, _: Any) -> None: ...

    wait_event = record_event = wait_stream


def _patch() -> None:
    """Replaces the functions of torch.cuda that a CPU build lacks."""
    properties = SimpleNamespace(
        name="Emulated GPU",
        total_memory=TOTAL,
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        multi_processor_count=108,
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        gcnArchName="",
        uuid="0",
    )

    def set_fraction(fraction: float, device: object = None) -> None:
        _library.emulated_set_limit(int(fraction * TOTAL))

    results: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: CAPABILITY,
        "memory_allocated": lambda device=None: used(),
        "memory_reserved": lambda device=None: used(),
        "max_memory_allocated": lambda device=None: peak(),
        "max_memory_reserved": lambda device=None: peak(),
        "mem_get_info": lambda device=None: (TOTAL - used(), TOTAL),
        "reset_peak_memory_stats": lambda device=None: _library.emulated_reset_peak(),
        "set_per_process_memory_fraction": set_fraction,
        "set_sync_debug_mode": lambda mode: _library.emulated_set_waits_fail(mode in (2, "error")),
        "manual_seed": lambda seed: _library.emulated_seed(seed),
        "manual_seed_all": lambda seed: _library.emulated_seed(seed),
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "get_rng_state_all": list,
        "synchronize": lambda device=None: _on_wait(b"synchronize"),
        "current_stream": lambda device=None: Stream(),
        "default_stream": lambda device=None: Stream(),
        "Stream": Stream,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "set_device": lambda device: None,
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "set_rng_state": lambda *_, **__: None,
        "set_rng_state_all": lambda *_: None,
        "_is_compiled": lambda: True,
        "_device_count_nvml": lambda: 1,
    }
    # Each is an object of its own, because torch._dynamo has a table of functions.
    for name, result in results.items():
        setattr(torch.cuda, name, result)
    torch.cuda.memory.empty_cache = lambda: None
    for name, result in {"_cuda_getDeviceCount": lambda: 1, "_cuda_getCurrentRawStream": lambda index: 0}.items():
        setattr(torch._C, name, result)
    torch.version.cuda = "13.0"


_patch()
