"""Runs as the page gets them: the list, one run whole, its numbers as columns, its pictures."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from t2i_adapter.files import parse_json
from t2i_adapter.runs import metrics as log
from t2i_adapter.runs.metrics import Metrics, read_file
from t2i_adapter.runs.pictures import FIXED, FOLDER, Pictures
from t2i_adapter.runs.read import OPTIONS, read_run
from t2i_adapter.runs.record import FILE as RECORD
from t2i_adapter.runs.words import verdict
from t2i_adapter.statistics import Interval
from t2i_adapter.studio.files import stamp_of
from t2i_adapter.studio.places import Places

Entry = TypeVar("Entry")
MOST_POINTS = 2000
"""Points of a curve at most; of more, the least and the greatest of each stretch are kept."""
CURVES = ("loss", "lr", "grad_norm", "samples_per_s", "wait_share", "control")
MOST_LOOKS = 300
"""Looks and scores at most; of more, every n-th and the last are kept."""
MOST_NOTES = 500
KEPT_METRICS = 6
"""Runs whose numbers are kept: as many as a page compares."""
SOLID_SECONDS = 1.0
"""How long what was read of a running run is taken for true, if no file has changed: a kill changes none."""


class Runs:
    """The runs of one root. What was read is kept until the run's files change."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self._kept: dict[str, tuple[Any, float, dict[str, Any]]] = {}
        self._numbers: OrderedDict[str, tuple[Any, dict[str, Any]]] = OrderedDict()

    def all(self) -> list[dict[str, Any]]:
        """A row for each run, the one that began last first."""
        rows = [self.row(run, folder) for run, folder in list(self.places.run_folders().items())]
        return sorted(rows, key=lambda row: row["started"] or 0, reverse=True)

    def row(self, run: str, folder: Path) -> dict[str, Any]:
        """What the list shows of a run."""
        stamp, now = _stamp(folder), time.monotonic()
        kept = self._kept.get(run)
        if kept is None or kept[0] != stamp or (kept[2]["state"] == "running" and now - kept[1] > SOLID_SECONDS):
            found = read_run(folder)
            content = found.summary() | {
                "id": run,
                "name": found.name,
                "folder": self.places.relative(folder),
                "has_adapter": found.adapter is not None or bool(found.checkpoints),
                "picture": self.last_picture(folder),
            }
            kept = self._kept[run] = (stamp, now, content)
        return kept[2]

    def last_picture(self, folder: Path) -> int | None:
        """The last step that has pictures."""
        return max(Pictures(folder).steps(), default=None)

    def whole(self, run: str) -> dict[str, Any]:
        """Everything about a run but its curves. Raises NotFoundError."""
        folder = self.places.run_folder(run)
        found = read_run(folder)
        answer = verdict(found)
        pictures = Pictures(folder)
        notes = [*found.metrics.advice, *found.metrics.warnings]
        return {
            **self.row(run, folder),
            "verdict": {"sentence": answer.sentence, "more": list(answer.more), "look": answer.look},
            "command": found.command,
            "options": found.changed_options,
            "versions": found.record.get("versions") if isinstance(found.record.get("versions"), dict) else {},
            "adapter": found.adapter,
            "notes": [vars(note) for note in sorted(notes, key=lambda note: note.step)[-MOST_NOTES:]],
            "pictures": {
                "steps": pictures.steps(),
                "pairs": [vars(pair) for pair in pictures.pairs()],
                "fixed": dict(FIXED),
            },
            "has_report": (folder / "report.html").is_file(),
        }

    def metrics(self, run: str) -> dict[str, Any]:
        """The curves, looks and scores of a run, and the byte of its log that they end at. Raises NotFoundError."""
        file = self.places.run_folder(run) / log.FILE
        stamp = stamp_of(file)
        kept = self._numbers.get(run)
        if kept is None or kept[0] != stamp:
            kept = self._numbers[run] = (stamp, _read_metrics(file))
            while len(self._numbers) > KEPT_METRICS:
                self._numbers.popitem(last=False)
        return kept[1]

    def log_lines(self, folder: Path, start: int) -> tuple[list[Any], int]:
        """(whole entries of a run's log from a byte on, the byte after them); start 0 again if the log was cut."""
        file = folder / log.FILE
        size = _size(file)
        if size < start:
            return [], 0
        if size == start:
            return [], start
        with file.open("rb") as opened:
            opened.seek(start)
            content = opened.read(1 << 20)
        whole = content[: content.rfind(b"\n") + 1]
        return list(_entries(whole)), start + len(whole)

    def log_end(self, folder: Path) -> int:
        """The bytes of a run's log."""
        return _size(folder / log.FILE)

    def picture(self, run: str, step: str, name: str) -> bytes | None:
        """A small picture as WebP: of a pair at a step, or one that does not change (`FIXED`) if `step` is its name.

        Raises NotFoundError.
        """
        pictures = Pictures(self.places.run_folder(run))
        pair = next((pair for pair in pictures.pairs() if str(pair.index) == name), None)
        if pair is None:
            return None
        small = pictures.fixed(pair, step) if step in FIXED else None
        if step.isascii() and step.isdecimal() and len(step) < 12:
            small = pictures.at(pair, int(step))
        return small.file if small else None


def _read_metrics(file: Path) -> dict[str, Any]:
    end = _size(file)  # before the numbers: what is written meanwhile comes again as an event, and is recognised
    found = Metrics(file)
    curves = {name: points for name in CURVES if (points := found.numbers(name))}
    return {
        "at": end,
        "curves": {name: columns(thin(points)) for name, points in curves.items()},
        "looks": [_look(look) for look in some(found.looks)],
        "scores": [_score(score) for score in some(found.scores)],
    }


def some(entries: Sequence[Entry], most: int = MOST_LOOKS) -> list[Entry]:
    """At most `most` entries: every n-th, and the last."""
    stride = math.ceil(len(entries) / max(1, most - 1)) if len(entries) > most else 1
    found = list(entries[::stride])
    return found if not entries or found[-1] is entries[-1] else [*found, entries[-1]]


def thin(points: Sequence[tuple[int, float]], most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """At most `most` points: the least and the greatest of each stretch, and the last."""
    if len(points) <= most:
        return list(points)
    stride = math.ceil(len(points) / (most / 2 - 1))
    found: list[tuple[int, float]] = []
    for start in range(0, len(points), stride):
        part = points[start : start + stride]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        found += sorted(ends)
    return found if found[-1] == points[-1] else [*found, points[-1]]


def columns(points: Sequence[tuple[int, float]]) -> list[list[float]]:
    """[steps, values], the values to six digits: a screen shows fewer."""
    return [[step for step, _ in points], [_short(value) for _, value in points]]


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _entries(content: bytes) -> Iterator[Any]:
    for line in content.splitlines():
        try:
            entry = parse_json(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            yield entry


def interval(found: Interval | None) -> list[float | None] | None:
    """[mean, low, high]; a bound that is infinite is None."""
    if found is None:
        return None
    return [_short(found.mean), *(_short(bound) if math.isfinite(bound) else None for bound in (found.low, found.high))]


def _look(look: log.Look) -> dict[str, Any]:
    return {
        "step": look.step,
        "pairs": look.pairs,
        "on": look.on,
        "use": interval(look.use),
        "benefit": interval(look.benefit),
        "training": interval(look.training_benefit),
        "bands": [{"t": band.t, "benefit": interval(band.benefit), "use": interval(band.use)} for band in look.bands],
        "share": look.share,
    }


def _score(score: log.Score) -> dict[str, Any]:
    return {
        "step": score.step,
        "metric": score.metric,
        "higher_is_better": score.higher_is_better,
        "pictures": score.pictures,
        "columns": {name: interval(found) for name, found in score.columns.items()},
        "difference": interval(score.difference),
    }


def _size(file: Path) -> int:
    try:
        return file.stat(follow_symlinks=False).st_size
    except OSError:
        return 0


def _stamp(folder: Path) -> tuple[Any, ...]:
    """What changes when a run's files change."""
    names = (log.FILE, RECORD, OPTIONS, "best.json", ".lock", "t2i_adapter.json", FOLDER, ".")
    return tuple(stamp_of(folder / name) for name in names)


def report_of(folder: Path) -> bytes:
    """The page of a run as it wrote it; empty if there is none."""
    return read_file(folder / "report.html", 32 << 20)
