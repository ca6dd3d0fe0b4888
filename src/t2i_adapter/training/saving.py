"""Writes checkpoints in a thread: training waits only while its state is copied to host memory."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from t2i_adapter.files import write_atomic
from t2i_adapter.training import checkpoint
from t2i_adapter.training.checkpoint import KeepPolicy, Snapshot

RETRY_SECONDS = (5.0, 15.0, 45.0, 120.0, 300.0)
"""Pauses before a failed save is tried again; a newer checkpoint replaces it at once."""
BEST = "best.json"
"""In a run's folder: {"step", "score"} of the checkpoint with the highest validation score."""


class Saver:
    """Writes one checkpoint at a time, removes old ones, and retries if the disk is full.

    `saved` is the step of the last checkpoint that was read back from the disk complete, None before the first.
    """

    def __init__(self, output_dir: Path, keep: KeepPolicy, log: Callable[[str], None]) -> None:
        """log: prints a line; the writing thread calls it too."""
        self.output_dir, self.keep, self.log = output_dir, keep, log
        self.saved: int | None = None
        self.best = read_best(output_dir)
        self._protected: frozenset[int] = frozenset()
        self._thread: threading.Thread | None = None
        self._newer, self._last_try = threading.Event(), threading.Event()
        self._fault: BaseException | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Starts to write, after the previous save has ended. Raises the previous save's exception, except OSError,
        which was logged."""
        self._newer.set()
        self.wait()
        self._newer.clear()
        self._thread = threading.Thread(target=self._run, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def started_from(self, folder: Path, step: int) -> None:
        """The run resumes from this checkpoint, and the newer ones were renamed."""
        self.saved = step if folder.resolve().parent == self.output_dir.resolve() else None
        self.best = read_best(self.output_dir)

    def wait(self) -> None:
        """Returns when no save is in progress. Raises as `save` does."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def close(self) -> None:
        """As `wait`, but a save that waits for free space is tried once more only."""
        self._last_try.set()
        self.wait()

    def protect(self, steps: Iterable[int]) -> None:
        """Keeps the checkpoints of these steps, which may still become the best, beside those of the policy."""
        self.wait()
        self._protected = frozenset(steps)

    def keep_as_best(self, step: int, score: float) -> None:
        """Marks the checkpoint of `step`, which is saved or being saved, as the best so far."""
        self.wait()
        if self.best == (step, score) or not (self.output_dir / f"{checkpoint.PREFIX}{step}").is_dir():
            return
        try:
            write_atomic(self.output_dir / BEST, [json.dumps({"step": step, "score": score}).encode()])
            self.best = step, score
            checkpoint.rotate(self.output_dir, self.keep, self._kept())
        except OSError as fault:
            self.log(f"{BEST} could not be written ({fault}).")

    def _kept(self) -> frozenset[int]:
        """Steps whose checkpoints stay in any case."""
        return self._protected | ({self.best[0]} if self.best else set())

    def _run(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot)
        except BaseException as fault:
            self._fault = fault

    def _write(self, snapshot: Snapshot) -> None:
        for pause in (*RETRY_SECONDS, None):
            last = pause is None or self._last_try.is_set()
            try:
                _check_room(self.output_dir, snapshot)
                checkpoint.write(self.output_dir, snapshot)
                self.saved = snapshot.step
                checkpoint.rotate(self.output_dir, self.keep, self._kept())
                return
            except OSError as fault:
                then = "no further try" if last else f"next try in {pause:g} s, or with the next checkpoint"
                self.log(
                    f"checkpoint-{snapshot.step} could not be written ({fault}); {then}. Training goes on, and the "
                    "older checkpoints are whole."
                )
            if last or self._newer_comes(pause or 0):
                return

    def _newer_comes(self, seconds: float) -> bool:
        """Waits; returns True as soon as a newer checkpoint is due."""
        for _ in range(round(seconds * 10)):
            if self._last_try.is_set():
                return False
            if self._newer.wait(0.1):
                return True
        return False


def _check_room(folder: Path, snapshot: Snapshot) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < snapshot.nbytes:
        need = f"{snapshot.nbytes:,} bytes are needed and {free:,} are free at {folder}"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {need}")


def read_best(output_dir: Path) -> tuple[int, float] | None:
    """(step, score) of the best checkpoint, or None if no checkpoint is marked or the marked one is missing."""
    try:
        best = json.loads((output_dir / BEST).read_text(encoding="utf-8"))
        step, score = int(best["step"]), float(best["score"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (step, score) if (output_dir / f"{checkpoint.PREFIX}{step}").is_dir() else None
