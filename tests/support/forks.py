"""Starts `t2i-adapter` many times for the price of one import: a parent imports everything once and forks each start.

Each start is its own process in its own session, runs `cli.main` and can be killed. Run as a program, this file is the
parent: it reads one JSON line (words, log, kill_after, once) for each start and answers with one JSON line.
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
"""Seconds after which a start that was not killed counts as hanging."""


@dataclass(frozen=True)
class End:
    """How a start ended: exit code (negative: the signal that killed it), seconds it took, and what it printed."""

    code: int
    seconds: float
    output: str

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


class Forks:
    """The parent process: `with Forks(folder) as forks: forks.run(words)`. Starts run one at a time, in `folder`."""

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
        """Runs one command, and kills it with SIGKILL after `kill_after` seconds if it has not ended by then.

        The seconds count from the moment that a file matches the glob `once`; "" counts from the start.
        """
        request = {"words": list(words), "log": str(self.log), "kill_after": kill_after, "once": once}
        print(json.dumps(request), file=self._parent.stdin, flush=True)
        answer = json.loads(self._parent.stdout.readline())  # type: ignore[union-attr]
        return End(answer["code"], answer["seconds"], self.log.read_text(errors="replace"))


def serve() -> None:
    """Imports what a training run imports, then forks a process for each line of stdin."""
    import t2i_adapter.verbs.train  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that output of libraries does not mix with the answers
    for line in sys.stdin:
        request = json.loads(line)
        started = time.monotonic()
        process = os.fork()
        if process == 0:
            _run(request)
        status = _wait(process, request["kill_after"], request["once"])
        seconds = time.monotonic() - started
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), "seconds": seconds}), file=answers, flush=True)


def _run(request: dict[str, Any]) -> None:
    """Runs the command in this process; never returns."""
    code = 1
    try:
        os.setsid()
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from t2i_adapter.cli import main

        code = main(request["words"])
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
    """Waits for the end of the process; kills it at `kill_after`, or with SIGABRT if it hangs. Returns its status."""
    hangs, end = time.monotonic() + PATIENCE, None
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return status
        if kill_after is not None and end is None and (not once or any_match(once)):
            end = time.monotonic() + kill_after
        if time.monotonic() >= (hangs if end is None else end):
            os.kill(process, signal.SIGABRT if end is None else signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            return status
        time.sleep(0.002)


def any_match(pattern: str) -> bool:
    path = Path(pattern)
    return any(path.parent.glob(path.name))


def session_members(log: Path) -> list[int]:
    """Processes whose standard output is a start's log."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (folder / "fd" / "1").resolve() == log.resolve():
                found.append(int(folder.name))
    return found


if __name__ == "__main__":
    serve()
