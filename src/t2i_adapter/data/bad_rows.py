"""Collects the rows that cannot be used. They end the run, or they are skipped and listed (`data.on_bad_sample`)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from t2i_adapter.config.tree import DataOptions
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

    def __init__(self, options: DataOptions, total: int, notes: Path | None = None, rank: int = 0) -> None:
        """`notes` names the files through which processes exchange bad rows ("NOTES.RANK"); None for one process."""
        self.skips = options.on_bad_sample == "skip"
        self.total, self.max_share = total, options.max_bad_share
        self.found: dict[int, BadRow] = {}
        self._notes, self._rank = notes, rank

    def add(self, row: BadRow) -> None:
        """Raises UserError if there are too many bad rows now."""
        if row.number in self.found:
            return
        self.found[row.number] = row
        if self._notes:
            self._notes.parent.mkdir(parents=True, exist_ok=True)
            with self._notes.with_name(f"{self._notes.name}.{self._rank}").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
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
        for path in self._notes.parent.glob(f"{self._notes.name}.*"):
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n"):  # otherwise it is being written
                    row = BadRow(*json.loads(line))
                    self.found.setdefault(row.number, row)
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
