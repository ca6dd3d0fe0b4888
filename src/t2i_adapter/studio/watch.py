"""Watches files and publishes what changed: jobs, runs, numbers, pictures, progress, the device.

One thread looks at everything several times a second. It also starts the jobs that wait.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

from t2i_adapter.runs import lock
from t2i_adapter.runs.pictures import Pictures
from t2i_adapter.studio.device import read_device
from t2i_adapter.studio.hub import Hub
from t2i_adapter.studio.jobs import Job, Jobs
from t2i_adapter.studio.paints import Paints
from t2i_adapter.studio.run_views import Runs

logger = logging.getLogger(__name__)
EVERY = 0.25
"""Seconds between two looks at what runs."""
SLOWLY = 2.0
"""Seconds between two looks for new runs, and at the device."""


class Watch:
    """A thread; `start` and `stop` it."""

    def __init__(self, hub: Hub, jobs: Jobs, runs: Runs, paints: Paints) -> None:
        self._hub, self._jobs, self._runs, self._paints = hub, jobs, runs, paints
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="studio-watch", daemon=True)
        self._seen_jobs: dict[str, Job] = {}
        self._seen_runs: dict[str, dict[str, Any]] = {}
        self._read: dict[str, int] = {}
        self._pictures: dict[str, set[int]] = {}
        self._logs: dict[str, int] = {}
        self._slowly = -1e9

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        self._thread.join(5)

    def _watch(self) -> None:
        while not self._end.wait(EVERY):
            try:
                self.look()
            except Exception:  # of any kind: a folder that vanishes while it is read must not end the thread
                logger.exception("The studio could not look at its files; it tries again.")
                self._end.wait(SLOWLY)

    def look(self) -> None:
        """Publishes what has changed since the last call, and starts jobs that wait."""
        is_slow = time.monotonic() - self._slowly >= SLOWLY
        if is_slow:
            self._slowly = time.monotonic()
        jobs = self._jobs.all()
        self._look_at_jobs(jobs)
        self._look_at_runs(is_slow)
        self._paints.look()
        own = {job.run for job in jobs if job.state == "running"}
        busy = any(row["state"] == "running" and row["folder"] not in own for row in self._seen_runs.values())
        if any(job.state == "queued" for job in jobs):
            self._jobs.advance(busy)
        if is_slow:
            self._hub.publish("device", read_device(self._runs.places.root))

    def _look_at_jobs(self, jobs: list[Job]) -> None:
        found = {job.id: job for job in jobs}
        for job in jobs:
            before = self._seen_jobs.get(job.id)
            if job != before:
                self._hub.publish("job", job.to_json())
                if before is None or before.state != job.state:
                    self._runs.places.forget_runs()
            if job.state == "running" or (before and before.state == "running"):
                self._look_at_log(job)
        for gone in self._seen_jobs.keys() - found.keys():
            self._hub.publish("job_gone", {"id": gone})
        self._seen_jobs = found

    def _look_at_log(self, job: Job) -> None:
        start = self._logs.get(job.id, 0)
        text, end = self._jobs.log(job.id, start)
        if end > start:
            self._logs[job.id] = end
            self._hub.publish("log", {"job": job.id, "text": text, "at": end})

    def _look_at_runs(self, is_slow: bool) -> None:
        """Looks at runs that run each time, and at all others now and then."""
        folders = self._runs.places.run_folders() if is_slow else self._runs.places.known_runs()
        for run, folder in list(folders.items()):
            before = self._seen_runs.get(run)
            is_running = lock.holder(folder) is not None
            if not is_slow and not is_running and not (before and before["state"] == "running"):
                continue
            row = self._runs.row(run, folder)
            if _told(row) != _told(before):
                self._hub.publish("run", row)
            self._seen_runs[run] = row
            self._look_at_numbers(run, folder, is_new=before is None)
        for gone in self._seen_runs.keys() - folders.keys():
            self._hub.publish("run_gone", {"id": gone})
            del self._seen_runs[gone]

    def _look_at_numbers(self, run: str, folder: Path, *, is_new: bool) -> None:
        """Publishes new entries of a run's log, and steps that have pictures now."""
        if is_new:  # a page reads what is there by itself
            self._read[run] = self._runs.log_end(folder)
            self._pictures[run] = set(Pictures(folder).steps())
            return
        start = self._read.get(run, 0)
        entries, end = self._runs.log_lines(folder, start)
        if end < start:
            self._hub.publish("run_reset", {"run": run})
        if entries:
            self._hub.publish("metrics", {"run": run, "entries": entries, "at": end})
        self._read[run] = end
        if entries:
            steps = set(Pictures(folder).steps())
            for step in sorted(steps - self._pictures.get(run, set())):
                self._hub.publish("picture", {"run": run, "step": step})
            self._pictures[run] = steps


def _told(row: dict[str, Any] | None) -> dict[str, Any]:
    """What of a row is worth an event: not the seconds, which change all the time."""
    return {name: value for name, value in (row or {}).items() if name not in ("bytes", "seconds_left")}
