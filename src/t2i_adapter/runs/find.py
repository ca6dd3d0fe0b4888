"""Finds the runs in a folder and below it."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from t2i_adapter.models import record
from t2i_adapter.runs import metrics as log
from t2i_adapter.runs.read import CHECKPOINT, OPTIONS, adapter_of
from t2i_adapter.runs.record import FILE as RECORD

DEPTH = 3
"""How many folders below a given one are looked through for runs."""
MOST_FOLDERS = 5000
"""Folders that a search looks through at most."""
_SETTLED_NS = 2_000_000_000
"""A folder that changed less than this before is listed again: its next change might get the same time."""


def is_run(folder: Path, names: set[str]) -> bool:
    """Whether a folder, whose entries have these names, holds a run or an adapter."""
    if RECORD in names or {OPTIONS, log.FILE} <= names:
        return True
    if any(name.startswith(CHECKPOINT) and name[len(CHECKPOINT) :].isdecimal() for name in names):
        return True
    return record.CONFIG in names and adapter_of(folder) is not None


@dataclass(frozen=True)
class Listed:
    """What a search has seen in a folder: whether it is a run's, and the folders in it that are searched, by name.
    stamp: when the folder's entries changed last, in nanoseconds."""

    stamp: int
    is_run: bool
    folders: tuple[Path, ...]


def find_runs(place: Path, depth: int = DEPTH, known: dict[Path, Listed] | None = None) -> list[Path]:
    """The folders with runs at `place` and at most `depth` folders below it. Hidden folders and links are skipped, and
    so is what lies inside a run's folder.

    known: what the last search has seen, for a caller that searches again and again. A folder whose entries have not
    changed since is not listed, so a dataset of 100,000 files costs a search nothing. It is brought up to date here.
    """
    waiting, found, seen = deque([(place, depth)]), [], dict[Path, Listed]()
    for _ in range(MOST_FOLDERS):
        if not waiting:
            break
        folder, more = waiting.popleft()
        listed = _list(folder, known or {})
        if listed is None:
            continue
        if time.time_ns() - listed.stamp > _SETTLED_NS:
            seen[folder] = listed
        if listed.is_run:
            found.append(folder)
        elif more:
            waiting += [(one, more - 1) for one in listed.folders]
    if known is not None:
        known.clear()
        known.update(seen)
    return found


def _list(folder: Path, known: Mapping[Path, Listed]) -> Listed | None:
    """The folder's entries, or what is known of them; None if it cannot be read."""
    try:
        stamp = folder.stat().st_mtime_ns
        before = known.get(folder)
        if before and before.stamp == stamp:
            return before
        with os.scandir(folder) as entries:
            searched = {entry.name: _is_searched(entry) for entry in entries}
    except (OSError, ValueError):
        return None
    names = sorted(name for name, is_folder in searched.items() if is_folder)
    return Listed(stamp, is_run(folder, set(searched)), tuple(folder / name for name in names))


def _is_searched(entry: os.DirEntry[str]) -> bool:
    skipped = entry.name.startswith(".") or entry.name in ("node_modules", "__pycache__")
    return not skipped and entry.is_dir(follow_symlinks=False)
