"""Divides the work of preparing between the processes that see one cache: each part is taken once.

A process takes a part by creating a note with a name that no other process can create after it. While it works, it
counts in a note of its own. If that count stands still, the process has died, and another one takes its parts.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TypeVar

import numpy as np

from t2i_adapter.data.notes import Notes
from t2i_adapter.errors import UserError

BEAT_SECONDS = 5.0
"""Seconds between two counts of a process that lives."""
DEAD_SECONDS = 120.0
"""A process whose count stands still for so long is dead. Network file systems show a change after up to 60 s."""
UNITS = 32
"""Parts of the work for each process: so all end at nearly the same time."""

Item = TypeVar("Item")


class Crew:
    """The processes of a run that see one cache: `with Crew(notes, rank, world) as crew`.

    Attributes:
        rank, world: this process and the number of processes. A single process writes no notes.
    """

    def __init__(self, notes: Notes | None, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world
        self._notes = notes if world > 1 else None
        self._own: set[tuple[str, int]] = set()
        self._seen: dict[int, tuple[bytes | None, float]] = {}
        self._ended = threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True, name="prepare-beats")

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._beats.is_alive():
            self._beats.join()

    @property
    def notes(self) -> Notes | None:
        return self._notes

    @property
    def units(self) -> int:
        """Number of parts that work is best divided into."""
        return UNITS * self.world if self.world > 1 else 1

    def order(self, count: int) -> list[int]:
        """The parts 0 to count - 1 in the order in which this process takes them: it begins at a place of its own and
        goes on with the next, so that it reads what is stored together."""
        first = self.rank % self.world * count // self.world
        return [*range(first, count), *range(first)]

    def take(self, stage: str, unit: int) -> bool:
        """Whether this process is the one to work on the part."""
        if self._notes and not self._notes.create(_name(stage, unit, 0), str(self.rank).encode()):
            return False
        self._has_taken(stage, unit)
        return True

    def share(self, stage: str, items: Sequence[Item], unit_of: Callable[[Item], int], count: int) -> Iterator[Item]:
        """The items of the parts that this process takes; a part is taken when its first item is requested.

        unit_of: the part of an item, 0 to count - 1, equal on all processes.
        """
        if self.world == 1:
            yield from items
            return
        by_unit: dict[int, list[Item]] = {}
        for item in items:
            by_unit.setdefault(unit_of(item), []).append(item)
        for unit in self.order(count):
            if unit in by_unit and self.take(stage, unit):
                yield from by_unit[unit]

    def complete(
        self,
        stage: str,
        find_left: Callable[[], list[Item]],
        unit_of: Callable[[Item], int],
        make: Callable[[Sequence[Item]], None],
        timeout: float,
        what: str,
    ) -> None:
        """Returns when `find_left()` returns no item, whichever process makes them. Makes the items of dead processes.

        Raises UserError, which begins with `what`, after `timeout` seconds without a new item.
        """
        pause, last_left, last_news = 0.05, None, time.monotonic()
        while left := find_left():
            lost = self._take_over(stage, {unit_of(item) for item in left})
            if lost:
                make([item for item in left if unit_of(item) in lost])
                continue
            if len(left) != last_left:
                last_left, last_news = len(left), time.monotonic()
            if self.world == 1:
                raise UserError(f"{what}: {len(left)} records were written but cannot be found. Check the disk.")
            if time.monotonic() - last_news > timeout:
                raise UserError(
                    f"{what}: {len(left)} records that other processes should make did not appear in {timeout:.0f} s. "
                    "Read the other processes' messages, then start again: finished records are kept."
                )
            time.sleep(pause)
            pause = min(max(2.0, self.world / 16), pause * 1.5)

    def _take_over(self, stage: str, units: set[int]) -> set[int]:
        """The parts that this process takes now: nobody has taken them, or a process that is dead."""
        taken = set[int]()
        for unit in units if self._notes else ():
            if (stage, unit) in self._own:
                continue
            owner, generation = self._owner(stage, unit)
            free = owner is None or self._is_dead(owner)
            assert self._notes
            if free and self._notes.create(_name(stage, unit, generation), str(self.rank).encode()):
                self._has_taken(stage, unit)
                taken.add(unit)
        return taken

    def _has_taken(self, stage: str, unit: int) -> None:
        self._own.add((stage, unit))
        if self._notes and self._beats.ident is None:
            self._beats.start()

    def _owner(self, stage: str, unit: int) -> tuple[int | None, int]:
        """The process that has taken the part, None if nobody has; and how often it was taken."""
        assert self._notes
        owner, generation = None, 0
        while (found := self._notes.read(_name(stage, unit, generation))) is not None:
            # An empty note is still being written, or its writer was killed while it wrote.
            owner, generation = int(found or -1), generation + 1
        return owner, generation

    def _is_dead(self, rank: int) -> bool:
        assert self._notes
        count, now = self._notes.read(_beat_name(rank)), time.monotonic()
        if rank not in self._seen or self._seen[rank][0] != count:
            self._seen[rank] = count, now
        return now - self._seen[rank][1] > DEAD_SECONDS

    def _beat(self) -> None:
        count = 0
        while True:
            with suppress(OSError, UserError):  # a full disk ends the work elsewhere, with a message
                assert self._notes
                self._notes.write(_beat_name(self.rank), str(count).encode())
            count += 1
            if self._ended.wait(BEAT_SECONDS):
                return


def mark_of(keys: np.ndarray) -> str:
    """Names a set of keys, (N,K) uint8 with K at least 8. It belongs into the name of a stage: so processes that have
    other data share no part, and do not wait for each other's."""
    heads = np.sort(np.ascontiguousarray(keys[:, :8]).view("<u8")[:, 0])
    return hashlib.blake2b(heads.tobytes(), digest_size=6).hexdigest()


def _name(stage: str, unit: int, generation: int) -> str:
    return f"{stage}.{unit}.{generation}"


def _beat_name(rank: int) -> str:
    return f"alive.{rank}"
