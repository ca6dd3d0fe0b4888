"""The queue: each job is one verb in a process of its own, and all that is known of it is in its folder.

A job's state is derived from its files and its process, never stored: exit.json says how it ended, a living process
that it runs; neither, after a start, that it died. So no crash of server, tab or machine leaves a wrong state behind.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from t2i_adapter.errors import UserError
from t2i_adapter.files import parse_json, show_command, write_atomic
from t2i_adapter.progress import VARIABLE
from t2i_adapter.runs.lock import holder
from t2i_adapter.runs.metrics import integer, number, read_file, read_json, text_of
from t2i_adapter.studio.child import EXIT, HELD_BACK, JOB, PROCESS
from t2i_adapter.studio.faults import CONFLICT, NotFoundError
from t2i_adapter.studio.files import is_id, new_id, stamp_of
from t2i_adapter.studio.places import Places
from t2i_adapter.studio.process import SAFE_PATH, held_back, is_alive, python_module, send, start_of

JobState = Literal["queued", "running", "done", "stopped", "failed", "died", "cancelled"]
Queue = Literal["device", "desk"]
"""device: what computes on the card, one at a time. desk: what reads and writes files, two at a time."""
AT_ONCE: dict[Queue, int] = {"device": 1, "desk": 2}
QUEUES: dict[str, Queue] = {
    **dict.fromkeys(("train", "prepare", "generate", "evaluate", "demo", "verify-resume"), "device"),
    **dict.fromkeys(("doctor", "annotate", "make-data shapes", "init", "plan", "export", "push", "conditions"), "desk"),
    **dict.fromkeys(("import", "pull", "runs report"), "desk"),
}
"""Verbs that a browser may start, and where they run. No other verb can be started."""
STOP_CODES = (75, 129, 130, 143)
"""Exit codes of a verb that was stopped and saved what it had."""
MOST_LOG = 256 << 10
"""Bytes of a log that one request reads."""
MOST_KEPT = 200
"""Ended jobs whose folders are kept."""
_LOG, _PROGRESS, _CANCELLED, _ASKED, _ORDER = "log", "progress", "cancelled", "asked.json", "order"


@dataclass(frozen=True)
class Job:
    """A job at the time of reading.

    Attributes:
        run: the folder that it writes, relative to the root; "" if it has none of its own.
        asked: what it was asked to do and has not done yet: "pause", "cancel" or "".
        code, error, option: how it ended, the sentence of an error, the option that it names.
        progress: the last line of `progress.Reporter`.
        order: place in the queue; smaller is earlier.
    """

    id: str
    folder: Path
    verb: str
    argv: tuple[str, ...]
    run: str
    state: JobState
    asked: str
    code: int | None
    error: str
    option: str | None
    progress: dict[str, Any]
    created: float
    ended: float | None
    order: float
    pid: int | None

    @property
    def queue(self) -> Queue:
        return QUEUES.get(self.verb, "desk")

    def to_json(self) -> dict[str, Any]:
        """As the page gets it."""
        names = ("id", "verb", "run", "state", "asked", "code", "error", "option", "progress", "created", "ended")
        return {
            **{name: getattr(self, name) for name in (*names, "queue")},
            "command": show_command("t2i-adapter", *self.argv),
        }


class Jobs:
    """The jobs of one studio. A thread of the server starts what waits (`advance`)."""

    def __init__(self, places: Places, before_device: Callable[[], None] = lambda: None) -> None:
        """before_device: called before a job of the device queue starts, to free the card."""
        self._places, self._before_device = places, before_device
        self.folder = places.own_folder("jobs")
        self._lock = threading.RLock()
        self._started: list[subprocess.Popen[bytes]] = []
        # Of each ended job what was read of it, and the stamp of its exit.json.
        self._ended: dict[str, tuple[tuple[int, int, int], Job]] = {}

    def add(self, verb: str, argv: Sequence[str], *, run: str = "", processes: int = 1) -> Job:
        """Puts a job at the end of the queue. argv: the verb and its flags. Raises UserError."""
        if verb not in QUEUES:
            raise UserError(f"{verb}: cannot be started here; allowed are {', '.join(QUEUES)}")
        with self._lock:
            if run and any(job.run == run and job.state in ("queued", "running") for job in self.all()):
                raise UserError(
                    f"{run}: a job that waits or runs writes this folder already", option="output_dir", kind=CONFLICT
                )
            name = new_id()
            folder = self.folder / name
            folder.mkdir()
            content = {"verb": verb, "argv": list(argv), "run": run, "created": time.time(), "processes": processes}
            write_atomic(folder / JOB, [json.dumps(content).encode()])
            return self.read(name)

    def all(self) -> list[Job]:
        """Every job, in the order of the queue."""
        names = sorted(path.name for path in self.folder.iterdir() if is_id(path.name))
        for gone in set(self._ended) - set(names):
            self._ended.pop(gone, None)
        found = []
        for name in names:
            with suppress(NotFoundError):
                found.append(self.read(name))
        return sorted(found, key=lambda job: (job.order, job.id))

    def read(self, job: str) -> Job:
        """A job by its id. Raises NotFoundError."""
        if not is_id(job):
            raise NotFoundError(f"no job is called {job[:60]!r}")
        # Hundreds of ended jobs are listed several times a second, and no file of theirs changes after exit.json.
        stamp = stamp_of(self.folder / job / EXIT)
        ended = self._ended.get(job)
        if stamp and ended and ended[0] == stamp:
            return ended[1]
        found = self._read(job)
        if stamp and found.code is not None:
            self._ended[job] = stamp, found
        return found

    def _read(self, job: str) -> Job:
        folder = self.folder / job
        content = read_json(folder / JOB)
        if not content:
            raise NotFoundError(f"no job is called {job[:60]!r}")
        process, ended = read_json(folder / PROCESS), read_json(folder / EXIT)
        pid, code = integer(process.get("pid")), integer(ended.get("code"))
        state = self._state(folder, pid, text_of(process.get("started")), code)
        if state == "failed" and code == 1 and content.get("verb") == "doctor" and not ended.get("error"):
            state = "done"  # the doctor's code for a dataset with errors, which it has found as it should
        asked = text_of(read_json(folder / _ASKED).get("asked")) if state == "running" else ""
        created = number(content.get("created")) or 0.0
        return Job(
            job,
            folder,
            text_of(content.get("verb")),
            tuple(map(str, content.get("argv", ()))),
            text_of(content.get("run")),
            state,
            asked,
            code,
            text_of(ended.get("error")),
            text_of(ended.get("option")) or None,
            last_line(folder / _PROGRESS),
            created,
            number(ended.get("ended")),
            number(read_json(folder / _ORDER).get("order")) or created,
            pid,
        )

    def _state(self, folder: Path, pid: int | None, started: str, code: int | None) -> JobState:
        if code is not None:
            return "done" if code == 0 else "stopped" if code in STOP_CODES else "failed"
        if (folder / _CANCELLED).exists():
            return "cancelled"
        if pid is None:
            return "queued"
        return "running" if is_alive(pid, started) else "died"

    # Actions -------------------------------------------------------------------------------------------------------

    def advance(self, busy: bool = False) -> None:
        """Starts what can start now. busy: another program trains in this root, so the card is not free."""
        with self._lock:
            self._started = [process for process in self._started if process.poll() is None]
            jobs = self.all()
            for queue, most in AT_ONCE.items():
                mine = [job for job in jobs if job.queue == queue]
                running = sum(job.state == "running" for job in mine)
                waiting = [job for job in mine if job.state == "queued"]
                for job in waiting[: max(0, most - running)]:
                    if queue == "device" and busy:
                        break
                    self._start(job)
            self._forget(jobs)

    def _start(self, job: Job) -> None:
        if job.queue == "device":
            self._before_device()
        environment = {**os.environ, VARIABLE: str(job.folder / _PROGRESS), "PYTHONUNBUFFERED": "1"}
        # torchrun forwards only these signals to its processes; SIGUSR1 pauses a run.
        environment.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2")
        with (job.folder / _LOG).open("ab") as log, held_back(HELD_BACK):
            process = subprocess.Popen(
                python_module("t2i_adapter.studio.child", str(job.folder)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._places.root,
                env=environment | SAFE_PATH,
                start_new_session=True,
            )
        self._started.append(process)
        started = start_of(process.pid)
        if started is not None:
            content = {"pid": process.pid, "started": started}
            write_first(job.folder / PROCESS, json.dumps(content).encode())

    def pause(self, job: str) -> None:
        """Asks a training to save and end, so that it can be resumed. Raises UserError."""
        self._ask(job, "pause", signal.SIGUSR1, verbs=("train", "prepare"))

    def pause_outside(self, folder: Path) -> None:
        """Asks the training that holds a run's lock to save and end; no job of this studio. Raises UserError."""
        pid = holder(folder)
        started = start_of(pid) if pid else None
        if not pid or started is None or not send(pid, started, signal.SIGUSR1):
            raise UserError("The run does not run on this machine, so it cannot be paused here.", kind=CONFLICT)

    def cancel(self, job: str) -> None:
        """Takes a job out of the queue, or asks a running one to end; a training saves first. Raises UserError."""
        with self._lock:
            found = self.read(job)
            if found.state == "queued":
                (found.folder / _CANCELLED).touch()
                return
        self._ask(job, "cancel", signal.SIGTERM)

    def cancel_waiting(self) -> None:
        """Takes all jobs out of the queue."""
        for job in self.all():
            if job.state == "queued":
                self.cancel(job.id)

    def kill(self, job: str) -> None:
        """Ends a job at once; a training loses what it has not saved. Raises UserError."""
        found = self._running(job)
        process = read_json(found.folder / PROCESS)
        send(int(process["pid"]), process["started"], signal.SIGKILL, to_group=True)

    def move(self, job: str, steps: int) -> None:
        """Moves a waiting job `steps` places down in its queue, or up if negative. Raises UserError."""
        with self._lock:
            found = self.read(job)
            if found.state != "queued":
                raise UserError("only a job that waits can be moved", kind=CONFLICT)
            waiting = [one for one in self.all() if one.queue == found.queue and one.state == "queued"]
            others = [one for one in waiting if one.id != job]
            place = next(n for n, one in enumerate(waiting) if one.id == job)
            others.insert(max(0, min(len(others), place + steps)), found)
            orders = sorted(one.order for one in waiting)
            for one, order in zip(others, orders, strict=True):
                write_atomic(one.folder / _ORDER, [json.dumps({"order": order}).encode()])

    def _ask(self, job: str, what: str, number_: signal.Signals, verbs: Sequence[str] = ()) -> None:
        found = self._running(job)
        if verbs and found.verb not in verbs:
            raise UserError(f"{found.verb} cannot be paused; cancel it and start it again later", kind=CONFLICT)
        if found.asked:
            text = f"it was asked to {found.asked} already, and does so after the present step"
            raise UserError(text, kind=CONFLICT)
        process = read_json(found.folder / PROCESS)
        write_atomic(found.folder / _ASKED, [json.dumps({"asked": what, "time": time.time()}).encode()])
        send(int(process["pid"]), process["started"], number_)

    def _running(self, job: str) -> Job:
        found = self.read(job)
        if found.state != "running":
            raise UserError(f"the job does not run; it is {found.state}", kind=CONFLICT)
        return found

    # Files ---------------------------------------------------------------------------------------------------------

    def log(self, job: str, start: int) -> tuple[str, int]:
        """(text of the log from a byte on, the byte after it); of a longer rest its last part. Raises NotFoundError."""
        file = self.read(job).folder / _LOG
        try:
            size = file.stat().st_size
            with file.open("rb") as opened:
                opened.seek(max(0, min(start, size), size - MOST_LOG))
                content = opened.read(MOST_LOG)
                return content.decode("utf-8", "replace"), opened.tell()
        except OSError:
            return "", 0

    def _forget(self, jobs: list[Job]) -> None:
        """Removes the folders of the oldest ended jobs."""
        ended = [job for job in jobs if job.state not in ("queued", "running")]
        for job in ended[: max(0, len(ended) - MOST_KEPT)]:
            shutil.rmtree(job.folder, ignore_errors=True)


def write_first(file: Path, content: bytes) -> None:
    """Writes a file whole, unless it is there already: a job's own process, which knows best, may have written it."""
    temporary = file.with_name(f"{file.name}.{secrets.token_hex(4)}.tmp")
    temporary.write_bytes(content)
    with suppress(FileExistsError):
        os.link(temporary, file)
    temporary.unlink()


def last_line(file: Path) -> dict[str, Any]:
    """The last whole line of a file of JSON lines."""
    lines = read_file(file, 4096).rpartition(b"\n")[0].splitlines()
    try:
        found = parse_json(lines[-1]) if lines else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
