"""Runs `t2i-adapter WORDS` in processes forked from the test's process, which has imported the libraries."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import socket
import sys
import termios
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from t2i_adapter.cli import main

STARTED: list[int] = []
"""Process groups to kill when the test ends."""


class Forked:
    """One process forked from this one that runs `action` in the folder `cwd` and exits with what it returns, or 0."""

    def __init__(self, cwd: Path, action: Callable[[], int | None]) -> None:
        self.log = cwd / f"log-{time.monotonic_ns()}"
        self.log.touch()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(cwd, action)
        STARTED.append(self.pid)

    def _run(self, cwd: Path, action: Callable[[], int | None]) -> None:
        code = 99
        try:
            os.setsid()
            os.chdir(cwd)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with self.log.open("w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            torch.set_num_threads(1)
            AcceleratorState._reset_state(reset_partial_state=True)  # tests in the parent have set it
            code = action() or 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 98
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = 200) -> int:
        """The exit code, negative for a signal that killed it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        raise AssertionError(f"the run did not end in {seconds} s:\n{self.said()}")

    def said(self) -> str:
        return self.log.read_text()


class Run(Forked):
    """`t2i-adapter WORDS` in the folder `cwd`, with `env` added to the environment. before: called before it."""

    def __init__(
        self,
        cwd: Path,
        *words: str,
        env: Mapping[str, str] | None = None,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        def action() -> int:
            os.environ.update(env or {})
            before()
            return main(words)

        super().__init__(cwd, action)


def finish(cwd: Path, *words: str, env: Mapping[str, str] | None = None) -> str:
    """Runs `t2i-adapter WORDS` to its end in `cwd` and returns what it printed. Fails if the exit code is not 0."""
    run = Run(cwd, *words, env=env)
    assert run.wait() == 0, run.said()
    return run.said()


class Terminal:
    """A terminal for a `Run`, which gets it by `before=terminal.enter`. Nobody types into it."""

    def __init__(self) -> None:
        self._here, self._inside = pty.openpty()
        self._shown = b""

    def enter(self) -> None:
        """Makes it the terminal of this process, and its standard input and outputs."""
        fcntl.ioctl(self._inside, termios.TIOCSCTTY, 0)
        sys.stdout.close()
        sys.stderr.close()
        for stream in (0, 1, 2):
            os.dup2(self._inside, stream)
        sys.stdin = os.fdopen(0)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        os.close(self._here)
        os.close(self._inside)

    def leave_to_run(self) -> None:
        """Closes this process's own end of the run's side, after the run has started."""
        os.close(self._inside)

    def shown(self) -> str:
        """What was printed so far. A program that prints waits until this is read."""
        with contextlib.suppress(OSError):  # the run has ended
            while select.select([self._here], [], [], 0)[0]:
                self._shown += os.read(self._here, 1 << 16)
        return self._shown.decode()

    def close(self) -> None:
        """Closes the terminal, as a user closes its window."""
        os.close(self._here)


def end_all() -> None:
    """Kills all process groups in STARTED."""
    while STARTED:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(STARTED.pop(), signal.SIGKILL)


def ranks(world: int) -> list[dict[str, str]]:
    """The environment of each of the `world` processes of one run, as a launcher sets it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    names["ACCELERATE_USE_CPU"] = "true"
    return [{name: str(v) for name, v in {**names, "RANK": r, "LOCAL_RANK": r}.items()} for r in range(world)]


def until(condition: Callable[[], object], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not become true in {seconds} s"
        time.sleep(0.01)
