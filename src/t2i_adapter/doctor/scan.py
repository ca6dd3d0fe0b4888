"""Every row of a source read once, by several processes, in bounded memory."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from t2i_adapter.cache.context import run_ahead
from t2i_adapter.cache.records import add_prefix, text_key
from t2i_adapter.doctor.row import ROW, Chunk, Examiner, Fault

CHUNK = 8
"""Rows that a process is given at a time."""

AHEAD = 4
"""Chunks a process that may wait to be taken in."""

SHORTEST_LONG = 40
"""Bytes of UTF-8 up to which a caption cannot exceed 77 tokens, as each token takes at least one: 75 without start and
end, and room for what lowering its case adds."""


@dataclass
class Scan:
    """All that was read of a data set.

    Attributes:
        rows: (N,) of ROW.
        keys: (N,); each names its row.
        faults: number -> why the row cannot be used.
        captions: distinct captions as 64-bit hashes, the empty one among them.
    """

    rows: np.ndarray
    keys: list[str]
    faults: dict[int, Fault] = field(default_factory=dict)
    captions: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))


def scan(examiner: Examiner, count_tokens: Callable[[str], int], prefix: str, workers: int | None) -> Scan:
    """Examines every row of the examiner's source.

    Args:
        count_tokens: of a caption, start and end included.
        prefix: what training puts before every caption that is not empty.
        workers: processes; None takes one a core, 0 reads in this one.
    """
    total = len(examiner.source)
    found = Scan(np.zeros(total, ROW), [])
    hashes = [_hashes([""])]  # for dropped ones
    with tqdm(total=total, desc="reading", leave=False, delay=0.5, unit="row") as bar:
        for chunk in _chunks(examiner, total, workers):
            found.rows[chunk.start : chunk.start + len(chunk.rows)] = chunk.rows
            found.keys += chunk.keys
            found.faults |= chunk.faults
            hashes.append(_take_captions(found, chunk, count_tokens, prefix))
            bar.update(len(chunk.rows))
    found.captions = np.unique(np.concatenate(hashes))
    return found


def _take_captions(found: Scan, chunk: Chunk, count_tokens: Callable[[str], int], prefix: str) -> np.ndarray:
    """Counts the captions of a chunk into `found`; gives the hashes of its distinct ones."""
    for number, captions in enumerate(chunk.captions, start=chunk.start):
        told = [add_prefix(caption, prefix) for caption in captions]
        long = [caption for caption in told if len(caption.encode()) > SHORTEST_LONG]
        found.rows["tokens"][number] = max(map(count_tokens, long), default=0)
        found.rows["is_mute"][number] = any(not caption.strip() for caption in captions)
    return _hashes({add_prefix(caption, prefix) for captions in chunk.captions for caption in captions})


def _hashes(captions: Iterable[str]) -> np.ndarray:
    return np.frombuffer(b"".join(text_key(caption, "")[:8] for caption in captions), np.uint64)


def _chunks(examiner: Examiner, total: int, workers: int | None) -> Iterator[Chunk]:
    """Chunks in the rows' order."""
    ranges = (range(start, min(start + CHUNK, total)) for start in range(0, total, CHUNK))
    processes = min(_cores() if workers is None else workers, -(-total // CHUNK))
    if processes == 0:
        yield from map(examiner.examine, ranges)
        return

    # Started afresh, not forked: by now this process has threads, whose locks a fork would copy as they happen to be.
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, fresh, initializer=_begin, initargs=(examiner,)) as pool:
        yield from run_ahead(pool, _examine, ranges, AHEAD * processes)


_examiner: Examiner | None = None  # of a worker process


def _begin(examiner: Examiner) -> None:
    global _examiner
    _examiner = examiner
    import cv2

    cv2.setNumThreads(1)  # there is a process a core already


def _examine(numbers: range) -> Chunk:
    assert _examiner is not None
    return _examiner.examine(numbers)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
