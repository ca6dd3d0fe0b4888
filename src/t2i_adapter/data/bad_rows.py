"""Collects the rows that cannot be used. They end the run, or they are skipped and listed (`data.on_bad_sample`)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.notes import Notes
from t2i_adapter.data.source import Source
from t2i_adapter.errors import UserError, flag

MAX_REPORTED = 10


class BadRow(NamedTuple):
    """A row's number in the source, its key, why it cannot be used, and the error's kind (`UserError.kind`)."""

    number: int
    key: str
    reason: str
    kind: str = ""

    @classmethod
    def of(cls, source: Source, number: int, fault: UserError) -> BadRow:
        return cls(number, source.key(number), str(fault), fault.kind)


class BadRows:
    """The bad rows of a source, found by this process or by the others that share its work."""

    def __init__(
        self, options: DataOptions, total: int, notes: Notes | None = None, rank: int = 0, world: int = 1
    ) -> None:
        """`notes`: where the `world` processes that share the work write their bad rows for each other, a note a row
        ("bad.RANK.COUNT"); None for one process."""
        self.skips = options.on_bad_sample == "skip"
        self.total, self.max_share = total, options.max_bad_share
        self.found: dict[int, BadRow] = {}
        self._notes, self._rank = notes, rank
        self._counts = [0] * world  # notes of each process that this one has written or read

    def add(self, row: BadRow) -> None:
        """Raises UserError if there are too many bad rows now."""
        if row.number in self.found:
            return
        self.found[row.number] = row
        if self._notes:
            self._notes.write(f"bad.{self._rank}.{self._counts[self._rank]}", json.dumps(row).encode())
            self._counts[self._rank] += 1
        if not self.skips and len(self.found) >= MAX_REPORTED:
            self.settle()
        if self.skips:
            self._check_share()

    def settle(self) -> None:
        """Raises UserError with the bad rows found so far, unless bad rows are skipped."""
        if self.skips or not self.found:
            return
        reasons = [row.reason for row in self.found.values()][:MAX_REPORTED]
        if len(reasons) == 1:
            raise UserError(reasons[0])
        raise UserError(
            f"{'The first ' if len(reasons) == MAX_REPORTED else ''}{len(reasons)} rows that cannot be used: "
            f"{' | '.join(reasons)} Repair them, or skip them with {flag('data.on_bad_sample')} skip."
        )

    def exchange(self) -> None:
        """Reads the bad rows that other processes have found. Raises UserError if there are too many now."""
        if self._notes is None:
            return
        for rank, count in enumerate(self._counts):
            while rank != self._rank and (note := self._notes.read(f"bad.{rank}.{count}")) is not None:
                row = BadRow(*json.loads(note))
                self.found.setdefault(row.number, row)
                count += 1
            self._counts[rank] = count
        if self.skips:
            self._check_share()
        self.settle()

    def _check_share(self) -> None:
        if len(self.found) <= self.max_share * self.total:
            return
        first = next(iter(self.found.values())).reason
        raise UserError(
            f"{len(self.found)} of {self.total} rows cannot be used, and {flag('data.max_bad_share')} "
            f"{self.max_share:g} allows {int(self.max_share * self.total)}. The first: {first}"
        )


def list_bad_rows(file: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Appends (key, reason) of bad rows to a run's bad_samples.jsonl, each once."""
    listed = set(file.read_text(encoding="utf-8").split("\n")) if file.is_file() else set()
    lines = [json.dumps({"key": key, "reason": reason}, ensure_ascii=False) for key, reason in rows]
    new = [line for line in dict.fromkeys(lines) if line not in listed]
    if new:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as out:
            out.writelines(f"{line}\n" for line in new)
