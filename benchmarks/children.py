"""Runs the processes of a benchmark so that none outlives it. Importing this module loads no torch."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # from Linux' sys/prctl.h
POLL_S = 0.1


def die_with_parent() -> None:
    """Asks Linux to kill this process when its parent ends. Elsewhere it does nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def run_child(
    words: Sequence[str | Path],
    log: Path,
    *,
    until: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    on_poll: Callable[[], None] = lambda: None,
) -> int | None:
    """Runs a command to its end and returns its exit code; None if it was ended at `until` (of `time.monotonic`).

    log: the file that receives what it prints. on_poll: called while it runs. Its process group is killed when this
    function is left, whatever the reason.
    """
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(word) for word in words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=dict(env) if env is not None else None,
            cwd=cwd,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    try:
        while process.poll() is None and time.monotonic() < until:
            on_poll()
            time.sleep(POLL_S)
        return process.poll()
    finally:
        _kill_group(process)
        on_poll()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(log: Path) -> str:
    """The last line of a log that is not empty: of a traceback, the error."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "no output")[:300]
