"""Writes the sheet of a call of `generate`: a row for each prompt, a column for each seed or value of an option."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from t2i_adapter.generation.request import Job
from t2i_adapter.reports.sheet import SheetRow, make_sheet


def save_grid(
    first: Path,
    jobs: Sequence[Job],
    conditions: Sequence[Sequence[Image.Image]],
    columns: Sequence[tuple[str, Sequence[Image.Image]]],
) -> Path:
    """Writes one sheet: a row for each prompt, with its conditions and its pictures; returns its path.

    Args:
        first: the first picture's file; the sheet is named after it.
        conditions: one sequence for each job, one picture for each adapter.
        columns: a heading and a picture for each job. If there is only one column, its columns are the seeds.
    """
    is_swept = len(columns) > 1
    starts = [number for number, job in enumerate(jobs) if number == 0 or job.row != jobs[number - 1].row]
    ends = [*starts[1:], len(jobs)]
    groups = [(n, n + 1) for n in range(len(jobs))] if is_swept else list(zip(starts, ends, strict=True))
    adapters = len(conditions[0])
    headings = [f"condition {number + 1}" if adapters > 1 else "condition" for number in range(adapters)]
    if is_swept:
        headings += [heading for heading, _ in columns]
    else:
        seeds = [[job.seed for job in jobs[start:end]] for start, end in groups]
        is_common = all(row == seeds[0] for row in seeds)
        headings += [f"seed {seed}" if is_common else f"{n + 1}" for n, seed in enumerate(seeds[0])]
    rows = [
        SheetRow([*conditions[start], *(p for _, pictures in columns for p in pictures[start:end])], jobs[start].prompt)
        for start, end in groups
    ]
    path = first.with_name(f"{first.stem}_grid.png")
    make_sheet(headings, rows, blocks=1).save(path)
    return path
