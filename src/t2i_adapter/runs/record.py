"""Writes run.json: when a run began, what it plans, and how it ended, for `runs ls` and the run's page."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from t2i_adapter.errors import Stopped, UserError, first_line, redact
from t2i_adapter.files import show_command, write_atomic
from t2i_adapter.runs.metrics import number, read_json

FILE = "run.json"
"""In a run's folder: {"started", "ended", "outcome", "reason", "command", "resume", "steps", "first_step", ...}."""
_TEMPORARY = re.compile(r"\.[0-9a-f]{8}\.tmp$")
RUNNING = "running"
"""Outcome of a run that has not ended. If no process holds the folder's lock, it was killed."""


@contextmanager
def run_record(
    folder: Path,
    *,
    steps: int,
    first_step: int,
    global_batch: int,
    versions: Mapping[str, str],
    resume: str,
) -> Iterator[None]:
    """Writes run.json at the start and at the end of the block. A full disk costs the file, not the run. The folder
    must be locked: temporary files that a killed run left in it are removed.

    Args:
        steps: updates that the run is to make. first_step: updates made before a resume, 0 for a new run.
        global_batch: samples of an update.
        versions: library -> version.
        resume: the command line that resumes the run; "" if it is that of the start with --checkpoint.resume auto.
    """
    _remove_leftovers(folder)
    now = time.time()
    content: dict[str, Any] = {
        "started": number(read_json(folder / FILE).get("started")) or now if first_step else now,
        "resumed": now if first_step else None,
        "ended": None,
        "outcome": RUNNING,
        "reason": "",
        "command": redact(show_command(*_words())),
        "resume": resume,
        "steps": steps,
        "first_step": first_step,
        "global_batch": global_batch,
        "versions": {**versions, "python": platform.python_version()},
    }
    _write(folder, content)
    try:
        yield
    except BaseException as fault:
        _write(folder, content | {"ended": time.time(), **_ending(fault)})
        raise
    _write(folder, content | {"ended": time.time(), "outcome": "finished"})


def _remove_leftovers(folder: Path) -> None:
    """Removes temporary files of `files.atomic_path`, as a kill leaves them."""
    for path in folder.glob("*.tmp"):
        if _TEMPORARY.search(path.name):
            path.unlink(missing_ok=True)


def _ending(fault: BaseException) -> dict[str, str]:
    if isinstance(fault, Stopped):
        return {"outcome": "stopped", "reason": redact(str(fault))}
    if isinstance(fault, KeyboardInterrupt):
        return {"outcome": "stopped", "reason": "interrupted"}
    if isinstance(fault, UserError):
        return {"outcome": "failed", "reason": fault.message()}
    if isinstance(fault, Exception):
        return {"outcome": "failed", "reason": redact(f"{type(fault).__name__}: {first_line(fault)}")}
    return {"outcome": "failed", "reason": type(fault).__name__}


def _words() -> list[str]:
    """The words of this process's command line; a secret that a flag gives is redacted when it is registered."""
    name = Path(sys.argv[0]).name
    if name == "__main__.py":
        return ["python", "-m", Path(sys.argv[0]).parent.name, *sys.argv[1:]]
    return [name if os.sep in sys.argv[0] and not name.endswith(".py") else sys.argv[0], *sys.argv[1:]]


def _write(folder: Path, content: Mapping[str, Any]) -> None:
    try:
        write_atomic(folder / FILE, [json.dumps(content, indent=1).encode()])
    except OSError as fault:
        print(redact(f"{folder / FILE}: it could not be written ({fault}); training goes on."), flush=True)
