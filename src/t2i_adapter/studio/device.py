"""What the machine has and uses: card, cores, memory, disk. Imports no torch."""

from __future__ import annotations

import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any


def read_device(root: Path) -> dict[str, Any]:
    """Names and numbers for the page. Bytes; loads are shares from 0 to 1; null where the machine does not say."""
    disk = shutil.disk_usage(root)
    memory = _memory()
    return {
        "cards": _cards(),
        "cards_known": _nvml() is not None,
        "cores": os.cpu_count(),
        "load": min(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)),
        "memory": memory.get("MemTotal"),
        "memory_free": memory.get("MemAvailable"),
        "disk": disk.total,
        "disk_free": disk.free,
    }


def _memory() -> dict[str, int]:
    """Bytes by their names in /proc/meminfo; empty on a system without it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":")[::2] for line in lines)
    return {name: int(value.split()[0]) * 1024 for name, value in pairs if value.strip().endswith("kB")}


@cache
def _nvml() -> Any:
    """The library of NVIDIA's driver (extra `gpu`); None without the package or the driver."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def _cards() -> list[dict[str, Any]]:
    nvml = _nvml()
    if nvml is None:
        return []
    found = []
    for number in range(nvml.nvmlDeviceGetCount()):
        card = nvml.nvmlDeviceGetHandleByIndex(number)
        try:
            memory, use = nvml.nvmlDeviceGetMemoryInfo(card), nvml.nvmlDeviceGetUtilizationRates(card)
            name = nvml.nvmlDeviceGetName(card)
        except nvml.NVMLError:
            continue
        found.append({"name": name, "memory": memory.total, "memory_free": memory.free, "load": use.gpu / 100})
    return found
