"""Many starts of `t2i-adapter` for the price of one import, by a parent that has imported everything and forks.

Each start is a process of its own, in a session of its own, that runs `cli.main` and can be killed as any other.
Run as a program it is that parent: a JSON line in (words, log, kill_after, once) for each start, a JSON line out.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = 600.0
"""Seconds after which a start that nobody killed is taken to hang."""


@dataclass(frozen=True)
class End:
    """How a start ended: its exit code, negative the signal that killed it; how long it took; what it printed."""

    code: int
    seconds: float
    output: str

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


class Forks:
    """`with Forks(folder) as forks: forks.run(words)`: starts run one at a time, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "start.log"

    def __enter__(self) -> Forks:
        self._parent = subprocess.Popen(
            [sys.executable, __file__], cwd=self.folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._parent.stdin.close()  # type: ignore[union-attr]  # it is a pipe
        try:
            self._parent.wait(timeout=60)
        finally:
            self._parent.kill()

    def run(self, words: Sequence[str], kill_after: float | None = None, once: str = "") -> End:
        """Runs one command; SIGKILL ends it after so many seconds, if it is not through by then.

        The seconds count from the moment that there is something that the glob `once` names; "" is from the start.
        """
        asked = {"words": list(words), "log": str(self.log), "kill_after": kill_after, "once": once}
        print(json.dumps(asked), file=self._parent.stdin, flush=True)
        answer = json.loads(self._parent.stdout.readline())  # type: ignore[union-attr]
        return End(answer["code"], answer["seconds"], self.log.read_text(errors="replace"))


def serve() -> None:
    """The parent: imports what a training run imports, then forks a process for each line."""
    import t2i_adapter.verbs.train  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.monotonic()
        process = os.fork()
        if process == 0:
            _be(asked)
        status = _wait(process, asked["kill_after"], asked["once"])
        seconds = time.monotonic() - started
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), "seconds": seconds}), file=answers, flush=True)


def _be(asked: dict[str, Any]) -> None:
    """Becomes the command; never returns."""
    code = 1
    try:
        os.setsid()
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from t2i_adapter.cli import main

        code = main(asked["words"])
        sys.stdout.flush()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _wait(process: int, kill_after: float | None, once: str) -> int:
    """Waits for the process's end, and makes it one where it is told to, or where there is none."""
    hangs, end = time.monotonic() + PATIENCE, None
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return status
        if kill_after is not None and end is None and (not once or is_there(once)):
            end = time.monotonic() + kill_after
        if time.monotonic() >= (hangs if end is None else end):
            os.kill(process, signal.SIGABRT if end is None else signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            return status
        time.sleep(0.002)


def is_there(pattern: str) -> bool:
    path = Path(pattern)
    return any(path.parent.glob(path.name))


def session_members(log: Path) -> list[int]:
    """Processes that still write to a start's log: none may outlive its start for long."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (folder / "fd" / "1").resolve() == log.resolve():
                found.append(int(folder.name))
    return found


if __name__ == "__main__":
    serve()
