"""Processes that are found again after a restart: a number alone may belong to another process by now."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path


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
