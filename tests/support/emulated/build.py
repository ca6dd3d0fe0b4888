"""Builds the emulated device (device.cpp) once for each version of torch, and keeps it in `.cache` of the checkout."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")
CACHE = Path(__file__).parents[3] / ".cache" / "emulated-device"
TORCH = "2.13."
"""The version whose interface device.cpp uses; C++ extensions of this kind have no stable one."""
SECONDS = 300
"""Most time for the compiler, on a busy machine."""


class UnavailableError(Exception):
    """The device cannot be built here. The text is a sentence that says why."""


def folder_of(package: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def build() -> Path:
    """Returns the library's file, and builds it first if it is missing. Raises UnavailableError.

    Raises subprocess.CalledProcessError if the compiler refuses the source: that is a fault of the source.
    """
    version = importlib.metadata.version("torch")
    if not sys.platform.startswith("linux"):
        raise UnavailableError("The emulated device is built on Linux only.")
    if not version.startswith(TORCH):
        raise UnavailableError(f"The emulated device is written for torch {TORCH}*, and torch {version} is installed.")
    if not version.endswith("+cpu"):
        raise UnavailableError(f"The emulated device needs a CPU build of torch, and torch {version} is installed.")
    file = CACHE / f"{version}-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"
    if file.exists():
        return file
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise UnavailableError("The emulated device needs a C++ compiler: install g++, or set CXX.")
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes of one test run need it at the same time
        if not file.exists():
            _compile(compiler, file)
    return file


def _compile(compiler: str, file: Path) -> None:
    torch, unfinished = folder_of("torch"), file.with_suffix(".tmp")
    include = torch / "include"
    words = [compiler, "-O1", "-std=c++20", "-shared", "-fPIC", str(SOURCE), "-o", str(unfinished)]
    for folder in (include, include / "torch" / "csrc" / "api" / "include"):
        words += ["-isystem", str(folder)]
    words += [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}"]
    subprocess.run(words, check=True, timeout=SECONDS)
    unfinished.rename(file)
