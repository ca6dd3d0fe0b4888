"""Processes that are found again after a restart: a number alone may belong to another process by now."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SAFE_PATH = {"PYTHONSAFEPATH": "1"}
"""For the environment of a process in the root: Python files in it are data, and none is imported."""


def python_module(name: str, *words: str) -> list[str]:
    """The command of a module of this package, which imports nothing from the folder that it runs in."""
    return [sys.executable, "-P", "-m", name, *words]


@contextmanager
def held_back(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Processes that this thread starts meanwhile get these signals only after they have asked for them (`let_in`), so
    that one which comes while Python loads does not kill them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_in(signals: Iterable[signal.Signals]) -> None:
    """Ends `held_back` in the process that was started."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


def start_of(pid: int) -> str | None:
    """When a process began, as its system counts it; None if there is none, or if it has ended and waits to be reaped.

    The number of a process and its start together never belong to another process.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None if Path("/proc/self/stat").exists() else _start_without_proc(pid)
    fields = text.rpartition(")")[2].split()  # the name in brackets may hold spaces
    return None if fields[0] in "ZX" else fields[19]


def _start_without_proc(pid: int) -> str | None:
    """As `start_of`, for macOS."""
    found = subprocess.run(
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, encoding="utf-8", check=False
    )
    state, _, started = found.stdout.strip().partition(" ")
    return None if not started or state.startswith("Z") else started.strip()


def is_alive(pid: int, started: str) -> bool:
    """Whether the process that began then still runs."""
    return start_of(pid) == started


def send(pid: int, started: str, number: signal.Signals, *, to_group: bool = False) -> bool:
    """Sends a signal to the process that began then, or to its whole process group. Returns whether it was there."""
    if not is_alive(pid, started):
        return False
    with suppress(ProcessLookupError):
        if to_group:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)
        return True
    return False
