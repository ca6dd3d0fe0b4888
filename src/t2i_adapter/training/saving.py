"""Checkpoints written beside the training, which waits for a copy into host memory and no longer."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from t2i_adapter.files import write_atomic
from t2i_adapter.training import checkpoint
from t2i_adapter.training.checkpoint import Keep, Snapshot

RETRY_SECONDS = (5.0, 15.0, 45.0, 120.0, 300.0)
"""Pauses before a save that failed is tried again; a newer one that is due takes its place at once."""
BEST = "best.json"
"""In a run's folder: {"step", "score"} of the checkpoint that follows its conditions best."""


class Saver:
    """Writes one checkpoint at a time, keeps as many as are wanted, and lives through a disk that has no room.

    `saved` is the step of the last one that was found whole on the disk, None before the first.
    """

    def __init__(self, output_dir: Path, keep: Keep, say: Callable[[str], None]) -> None:
        """say: takes a line for people, also from the thread that writes."""
        self.output_dir, self.keep, self.say = output_dir, keep, say
        self.saved: int | None = None
        self.best = read_best(output_dir)
        self._thread: threading.Thread | None = None
        self._newer, self._last_try = threading.Event(), threading.Event()
        self._fault: BaseException | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Begins to write; waits first for one that is being written. Raises what went wrong with that one, but for
        OSError, which has been told."""
        self._newer.set()
        self.wait()
        self._newer.clear()
        self._thread = threading.Thread(target=self._run, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def started_from(self, folder: Path, step: int) -> None:
        """The run goes on from this checkpoint, and what came after it has been set aside."""
        self.saved = step if folder.resolve().parent == self.output_dir.resolve() else None
        self.best = read_best(self.output_dir)

    def wait(self) -> None:
        """Returns when nothing is being written any more. Raises as `save`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def close(self) -> None:
        """As `wait`, but one that waits for room is tried once more and no longer."""
        self._last_try.set()
        self.wait()

    def keep_as_best(self, step: int, score: float) -> None:
        """Marks the checkpoint of `step`, which has been saved or is being, as the best so far."""
        self.wait()
        if self.saved != step:
            return
        try:
            write_atomic(self.output_dir / BEST, [json.dumps({"step": step, "score": score}).encode()])
            self.best = step, score
            checkpoint.rotate(self.output_dir, self.keep, step)
        except OSError as fault:
            self.say(f"{BEST} could not be written ({fault}).")

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
                checkpoint.rotate(self.output_dir, self.keep, self.best[0] if self.best else None)
                return
            except OSError as fault:
                next_time = "it is given up" if last else f"it is tried again in {pause:g} s, or when the next is due"
                self.say(f"checkpoint-{snapshot.step} could not be written ({fault}); {next_time}. Training goes on, "
                         "and the older ones are whole.")  # fmt: skip
            if last or self._give_way(pause or 0):
                return

    def _give_way(self, seconds: float) -> bool:
        """Waits; True as soon as a newer checkpoint is due."""
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
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {snapshot.nbytes:,} bytes are needed and {free:,} "
                      f"are free at {folder}")  # fmt: skip


def read_best(output_dir: Path) -> tuple[int, float] | None:
    """(step, score) of the best checkpoint, or None where there is none, or it is no longer there."""
    try:
        told = json.loads((output_dir / BEST).read_text(encoding="utf-8"))
        step, score = int(told["step"]), float(told["score"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (step, score) if (output_dir / f"{checkpoint.PREFIX}{step}").is_dir() else None
