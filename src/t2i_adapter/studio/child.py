"""`python -m t2i_adapter.studio.child FOLDER`: the process of a job. It runs one verb and writes how it ended.

It has a session of its own, so it outlives the server and the terminal. Its output goes to the job's log.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from t2i_adapter import cli
from t2i_adapter.errors import UserError, redact
from t2i_adapter.exits import guarded
from t2i_adapter.files import parse_json, write_atomic
from t2i_adapter.runs.lock import lock
from t2i_adapter.studio.process import let_in, start_of

EXIT, PROCESS, JOB = "exit.json", "process.json", "job.json"
"""In a job's folder: how it ended; its process; what it does."""
HELD_BACK = (signal.SIGUSR1, signal.SIGTERM)
"""Signals that wait until this process can write how it ended."""
AGAIN_SECONDS = 0.2
"""How long after a signal the stop is raised again if it has not arrived."""
ALREADY_RUNNING = STOPPED = 75
"""Exit code for "try again later", as sysexits.h has it."""


def main(folder: Path) -> int:
    """Runs the job in a folder; returns the verb's exit code."""
    try:
        held = lock(folder)
    except UserError:
        return ALREADY_RUNNING  # a server that was killed had started it already
    pid = os.getpid()
    write_atomic(folder / PROCESS, [json.dumps({"pid": pid, "started": start_of(pid)}).encode()])
    content = parse_json((folder / JOB).read_bytes())
    words, facts = [str(word) for word in content["argv"]], dict[str, Any]()
    code = 1
    for number in HELD_BACK:
        signal.signal(number, _stop)  # until the verb handles it itself
    try:
        let_in(HELD_BACK)
        code = _launch(words, int(content.get("processes", 1)), facts)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        # Written even after a traceback; only a kill leaves none.
        ended = {"code": code, "ended": time.time(), **facts}
        write_atomic(folder / EXIT, [json.dumps(ended).encode()])
        held.close()
    return code


def _launch(words: list[str], processes: int, facts: dict[str, Any]) -> int:
    """Runs a verb here, or in several processes by torchrun. facts: gets the error and the option it names."""
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        process = subprocess.Popen([*launcher, "-m", "t2i_adapter", *words])
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda received, _: process.send_signal(received))
        return process.wait()
    sys.argv = [cli.PROG, *words]  # what the run's record and its advice repeat

    def action() -> None:
        try:
            cli.run_words(words)
        except UserError as fault:
            facts["error"] = fault.message(lambda path: cli.flag_name(words, path))
            facts["option"] = fault.option
            raise
        except Exception as fault:
            facts["error"] = redact(f"{type(fault).__name__}: {fault}")
            raise

    return guarded(action, lambda path: cli.flag_name(words, path))


class _Stop(SystemExit):
    """A signal came before the verb handles it itself. code: what the process exits with."""


def _stop(number: int, _: FrameType | None) -> None:
    """Raises `_Stop` until it has arrived: callbacks, and extensions that load, swallow exceptions."""
    code = STOPPED if number == signal.SIGUSR1 else 128 + number

    def stop(*_: Any) -> None:
        if not isinstance(sys.exception(), _Stop):  # else it is on its way, through code that cleans up
            raise _Stop(code)

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS, AGAIN_SECONDS)
    stop()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
