"""Progress of long work: a bar on a terminal, and a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

from t2i_adapter.progress import Reporter

EVERY = 30.0
"""Seconds between two lines in a log file."""


class Progress:
    """Shows on stderr how many of `total` units are done, and the time that the rest takes.

    Use it as a context manager. On a terminal it is a bar, which goes away at the end; otherwise it is a line every
    EVERY seconds.
    """

    def __init__(self, total: int, title: str, unit: str = "picture", *, is_shown: bool = True) -> None:
        self._total, self._title, self._unit, self._done = total, title, unit, 0
        self._is_shown = is_shown and total > 0
        self._began = self._last = time.monotonic()
        self._reporter = Reporter(title, total, unit) if self._is_shown else None
        self._bar: tqdm[Any] | None = None
        if self._is_shown and sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=title, unit=unit, leave=False, delay=0.5)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._reporter is not None:
            self._reporter.end()

    def advance(self, count: int) -> None:
        """Counts `count` more units as done."""
        self._done += count
        if self._reporter is not None:
            self._reporter.add(count)
        if self._bar is not None:
            self._bar.update(count)
        elif self._is_shown and time.monotonic() - self._last >= EVERY:
            self._last = time.monotonic()
            print(self.line(self._last - self._began), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """Returns the line of a log file after `seconds` of work."""
        rest = (self._total - self._done) * seconds / max(1, self._done)
        left = f"about {_duration(rest)} left" if self._done else "no estimate yet"
        return f"{self._title}: {self._done} of {self._total} {self._unit}s, {left}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
