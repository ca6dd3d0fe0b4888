"""Progress of long work: a bar in the terminal and, if $T2I_ADAPTER_PROGRESS names a file, lines of JSON in that file.

A program that starts a verb and shows its progress reads the file, so that it need not parse a bar.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
VARIABLE = "T2I_ADAPTER_PROGRESS"
"""Environment variable: the file that gets the lines. It is appended to."""
EVERY = 0.5
"""Seconds between two lines of a phase at least; its first and last line are always written."""


class Reporter:
    """Writes how far a phase is, as {"phase", "unit", "done", "total", "time"}; nothing without $T2I_ADAPTER_PROGRESS.

    time: seconds since 1970. A file that cannot be written costs the lines, not the work.
    """

    def __init__(self, phase: str, total: int | None, unit: str, done: int = 0) -> None:
        self._facts = {"phase": phase, "unit": unit, "total": total}
        self._file = os.environ.get(VARIABLE)
        self._done, self._written, self._last = done, -1, 0.0
        self._write()

    def add(self, count: int) -> None:
        """Counts `count` more units as done."""
        self._done += count
        if self._file and time.monotonic() - self._last >= EVERY:
            self._write()

    def end(self) -> None:
        """Writes the last line."""
        if self._done != self._written:
            self._write()

    def _write(self) -> None:
        if not self._file:
            return
        self._last, self._written = time.monotonic(), self._done
        line = json.dumps({**self._facts, "done": self._done, "time": round(time.time(), 3)})
        try:
            with open(self._file, "a", encoding="utf-8") as file:  # noqa: PTH123 - a name from the environment
                file.write(line + "\n")
        except OSError:
            self._file = None


class Bar(tqdm):
    """A bar of tqdm that reports what it counts, even if it is not drawn, for example because stderr is no terminal."""

    def __init__(
        self, iterable: Iterable[Any] | None = None, *, reporter: Reporter | None = None, **options: Any
    ) -> None:
        self._reporter = reporter
        super().__init__(iterable, **options)

    def __iter__(self) -> Iterator[Any]:
        assert self.iterable is not None
        try:
            for item in self.iterable:
                yield item
                self.update()
        finally:
            self.close()

    def update(self, n: float | None = 1) -> bool | None:
        if self._reporter:
            self._reporter.add(int(n or 0))
        return super().update(n)

    def close(self) -> None:
        if self._reporter:
            self._reporter.end()
        super().close()


def progress_bar(
    phase: str,
    total: int,
    unit: str = "it",
    *,
    items: Iterable[T] | None = None,
    done: int = 0,
    is_reported: bool = True,
    **options: Any,
) -> Bar:
    """A bar over `items`, or one that is moved by `update`; use it as a context manager then.

    Args:
        phase: what is done, for example "encoding pictures". total, unit: how many of what. done: those of before.
        is_reported: False for a process whose bar is not the run's, such as another rank's: it is not drawn either.
        options: of tqdm; by default the bar goes away at the end, and short work shows none.
    """
    reporter = Reporter(phase, total, unit, done) if is_reported else None
    shown = {"leave": False, "delay": 0.5, "disable": not is_reported, **options}
    return Bar(items, reporter=reporter, total=total, desc=phase, unit=unit, initial=done, **shown)
