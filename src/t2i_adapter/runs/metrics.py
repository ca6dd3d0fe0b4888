"""Reads metrics.jsonl: log entries, looks at the control gain, scores, advice and warnings; skips malformed lines.

A line is parsed only if it has the word that is asked for, so a list of many long runs takes little time.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from t2i_adapter.files import parse_json
from t2i_adapter.statistics import Interval

FILE = "metrics.jsonl"
"""In a run's folder: a line of JSON for each log entry, look, score, advice and warning."""
MOST_BYTES = 256 << 20
"""Of a longer metrics.jsonl only the last bytes are read."""
_MOST, _MOST_STEPS = 1e100, 10**15
COLUMNS = ("adapter", "other_condition", "no_adapter", "target")
"""What a score has an interval of: the adapter, both controls, and the true pictures, which are the ceiling."""


@dataclass(frozen=True)
class Band:
    """The control gain in one band of noise. t: timestep. right, other, none: mean losses with the pair's condition,
    with another pair's, and without one."""

    t: int
    use: Interval | None
    benefit: Interval | None
    right: float | None
    other: float | None
    none: float | None


@dataclass(frozen=True)
class Look:
    """A measurement of the control gain.

    Attributes:
        on: "held-out" or "training": the pairs that it was measured on.
        use: (L(other) - L(right)) / mean L(none), over all bands; None if this look did not measure it.
        benefit: 1 - L(right) / L(none), over all bands; `training_benefit` that of training pairs.
        share: of the run's time so far that all looks took.
        pairs_benefit: benefit of each pair; empty if it was not logged.
        keys_digest: names the pairs, so that two runs can see that theirs are equal; "" if it was not logged.
    """

    step: int
    pairs: int | None
    on: str
    use: Interval | None
    benefit: Interval | None
    training_benefit: Interval | None
    bands: tuple[Band, ...]
    seconds: float | None
    share: float | None
    pairs_benefit: tuple[float, ...]
    keys_digest: str


@dataclass(frozen=True)
class Score:
    """A measurement of generated pictures. columns: column of `COLUMNS` -> interval; difference: of adapter and other
    condition, paired."""

    step: int
    metric: str
    higher_is_better: bool
    pictures: int | None
    columns: dict[str, Interval]
    difference: Interval | None
    seconds: float | None


@dataclass(frozen=True)
class Note:
    """A line for people. kind: that of an advice (`words.ADVICE`), or "warning"."""

    step: int
    kind: str
    text: str


class Metrics:
    """The entries of a run, in the order of their steps. Everything is read when it is first asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._parsed: dict[int, Any] = {}  # place of a line -> its content, None if it is malformed

    @cached_property
    def _content(self) -> bytes:
        return read_file(self.path, MOST_BYTES)

    def _lines(self, word: bytes) -> Iterator[tuple[int, int]]:
        """(start, end) of each line that has the word, the first of them first."""
        end = 0
        while (place := self._content.find(word, end)) >= 0:
            start, end = self._content.rfind(b"\n", 0, place) + 1, self._end(place)
            yield start, end

    def _lines_backwards(self, word: bytes) -> Iterator[tuple[int, int]]:
        """(start, end) of each line that has the word, the last of them first."""
        start = len(self._content)
        while (place := self._content.rfind(word, 0, start)) >= 0:
            start = self._content.rfind(b"\n", 0, place) + 1
            yield start, self._end(place)

    def _end(self, place: int) -> int:
        """The end of the line that this place is in."""
        end = self._content.find(b"\n", place)
        return len(self._content) if end < 0 else end

    def _entries(self, key: str, *, backwards: bool = False) -> Iterator[tuple[int, Any]]:
        """(step, value of `key`) of each entry that has it."""
        word = f'"{key}"'.encode()
        for start, end in self._lines_backwards(word) if backwards else self._lines(word):
            if start not in self._parsed:
                try:
                    self._parsed[start] = parse_json(self._content[start:end])
                except ValueError:
                    self._parsed[start] = None
            entry = self._parsed[start]
            step = integer(entry.get("step")) if isinstance(entry, dict) else None
            if step is not None and key in entry:
                yield step, entry[key]

    def numbers(self, key: str, last: int | None = None) -> list[tuple[int, float]]:
        """(step, value) of the finite numbers of log entries, such as "loss"; one a step, the last that was logged.
        last: of the last so many entries only."""
        entries = (
            self._entries(key) if last is None else reversed(list(islice(self._entries(key, backwards=True), last)))
        )
        found = {step: value for step, logged in entries if (value := number(logged)) is not None}
        return sorted(found.items())

    @cached_property
    def last_step(self) -> int:
        """The step of the last entry; 0 without entries."""
        return next((step for step, _ in self._entries("step", backwards=True)), 0)

    @cached_property
    def last_look(self) -> Look | None:
        """The last look, without reading those before it."""
        found = (_look(step, value) for step, value in self._entries("gain", backwards=True))
        return next((look for look in found if look), None)

    @cached_property
    def last_use(self) -> tuple[int, Interval] | None:
        """(step, use) of the last look that measured it; looks after "read" need not."""
        found = (_look(step, value) for step, value in self._entries("gain", backwards=True))
        return next(((look.step, look.use) for look in found if look and look.use), None)

    @cached_property
    def last_score(self) -> Score | None:
        """The last score, without reading those before it."""
        found = (_score(step, value) for step, value in self._entries("score", backwards=True))
        return next((score for score in found if score), None)

    @cached_property
    def looks(self) -> list[Look]:
        return _in_order(look for step, value in self._entries("gain") if (look := _look(step, value)))

    @cached_property
    def scores(self) -> list[Score]:
        return _in_order(score for step, value in self._entries("score") if (score := _score(step, value)))

    @cached_property
    def advice(self) -> list[Note]:
        found = self._entries("advice")
        notes = [Note(step, text_of(v.get("kind")), text_of(v.get("text"))) for step, v in found if isinstance(v, dict)]
        return sorted(notes, key=lambda note: note.step)

    @cached_property
    def warnings(self) -> list[Note]:
        notes = [Note(step, "warning", text_of(text)) for step, text in self._entries("warning")]
        return sorted(notes, key=lambda note: note.step)


def read_file(path: Path, most: int = 4 << 20) -> bytes:
    """The last `most` bytes of a regular file; empty if it cannot be read, or is a link, a pipe or a device."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                return b""
            file.seek(max(0, status.st_size - most))
            return file.read(most)
    except (OSError, ValueError):
        return b""


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a file of JSON; empty if there is none."""
    try:
        content = parse_json(read_file(path))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def number(value: Any) -> float | None:
    """A number as a float; None for everything else, NaN and inf too, and for numbers that no plot can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < _MOST else None  # false for NaN


def finite(value: Any) -> Any:
    """The value as plain JSON types that every program reads: NaN and inf become null, other objects their text."""
    if isinstance(value, dict):
        return {str(name): finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def integer(value: Any) -> int | None:
    """An integer of at least 0; None for everything else, and for numbers that no run reaches."""
    return value if type(value) is int and 0 <= value < _MOST_STEPS else None


def text_of(value: Any) -> str:
    """A text; "" for everything else."""
    return value if isinstance(value, str) else ""


def interval(value: Any) -> Interval | None:
    """The interval of {"mean", "low", "high"} with a finite mean. A bound that is missing is infinite."""
    mean = number(value.get("mean")) if isinstance(value, dict) else None
    if mean is None:
        return None
    low, high = number(value.get("low")), number(value.get("high"))
    return Interval(mean, -math.inf if low is None else low, math.inf if high is None else high)


def _in_order(entries: Iterator[Any]) -> list[Any]:
    """Sorted by step, one a step: the last that was logged."""
    found = {entry.step: entry for entry in entries}
    return [found[step] for step in sorted(found)]


def _look(step: int, value: Any) -> Look | None:
    if not isinstance(value, dict):
        return None
    bands = value.get("bands")
    each = value.get("pairs_benefit")
    numbers = [number(one) for one in each] if isinstance(each, list) else []
    look = Look(
        step,
        integer(value.get("pairs")),
        text_of(value.get("on")) or "held-out",
        interval(value.get("use")),
        interval(value.get("benefit")),
        interval(value.get("training_benefit")),
        tuple(band for one in (bands if isinstance(bands, list) else ()) if (band := _band(one))),
        number(value.get("seconds")),
        number(value.get("share")),
        () if None in numbers else tuple(one for one in numbers if one is not None),
        text_of(value.get("keys_digest")),
    )
    return look if look.use or look.benefit or look.bands else None


def _band(value: Any) -> Band | None:
    t = integer(value.get("t")) if isinstance(value, dict) else None
    if t is None:
        return None
    losses = (number(value.get(name)) for name in ("right", "other", "none"))
    return Band(t, interval(value.get("use")), interval(value.get("benefit")), *losses)


def _score(step: int, value: Any) -> Score | None:
    if not isinstance(value, dict):
        return None
    columns = {name: found for name in COLUMNS if (found := interval(value.get(name)))}
    if "adapter" not in columns:
        return None
    return Score(
        step,
        text_of(value.get("metric")) or "score",
        value.get("higher_is_better") is not False,
        integer(value.get("pictures")),
        columns,
        interval(value.get("difference")),
        number(value.get("seconds")),
    )
