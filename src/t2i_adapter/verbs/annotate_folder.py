"""A data set's condition maps, written as an image folder that training reads: each picture with its map beside it.

What has been made is kept in a list, a line as soon as a row's files are on the disk. A start that finds the list goes
on after it; rows that could not be made are tried again, and those whose picture has changed are made again.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from t2i_adapter.annotators.registry import Annotator, annotate, open_annotator
from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.folder import METADATA
from t2i_adapter.data.formats import located
from t2i_adapter.data.source import Source, open_source
from t2i_adapter.errors import UserError
from t2i_adapter.files import user_path, write_atomic
from t2i_adapter.verbs.annotate_options import AnnotateOptions

LIST = ".annotated.jsonl"
"""The settings, then a line a finished row: its number, its source's stamp and its line of the metadata."""
BAD_ROWS = "bad_rows.txt"
SHOWN = 10
IN_FLIGHT = 4
"""Rows a process that are handed out at once."""


@dataclass(frozen=True)
class Work:
    """All that making a row takes; opened anew in each process."""

    source: Source
    annotator: Annotator
    folder: Path
    digits: int

    def make(self, number: int) -> dict[str, Any]:
        """Writes a row's picture and map; returns its line of the metadata. Raises UserError naming the row."""
        sample = self.source[number]
        condition = annotate(self.annotator, sample.image, f"{sample.digest}/0")
        stem = f"{number:0{self.digits}d}"
        write_picture(self.folder / f"{stem}.png", sample.image)
        write_picture(self.folder / f"{stem}_cond.png", condition)
        captions = sample.captions
        return {
            **sample.meta,
            "file_name": f"{stem}.png",
            "conditioning_image_file_name": f"{stem}_cond.png",
            "text": captions[0] if len(captions) == 1 else list(captions),
        }


def annotate_data(options: AnnotateOptions) -> None:
    """Writes, or completes, the image folder. Raises UserError naming rows that could not be made, all others done."""
    assert options.out is not None
    work = open_work(options)
    total = len(work.source)
    listing = open_list(work, options)
    done = {n: row for n, (stamp, row) in read_list(listing).items() if stamp == work.source.stamp(n)}
    missing = [number for number in range(total) if number not in done]
    if total > len(missing):
        print(f"{total - len(missing):,} of {total:,} rows are there already", flush=True)
    bad: dict[int, str] = {}
    with (
        listing.open("a", encoding="utf-8") as file,
        tqdm(total=len(missing), desc="annotating", unit="row", leave=False, delay=0.5) as bar,
    ):
        for number, row, reason in make_all(missing, work, options):
            if row is None:
                bad[number] = reason
            else:
                done[number] = row
                file.write(json.dumps([number, work.source.stamp(number), row]) + "\n")
                file.flush()
            bar.update()
    write_metadata(work.folder, [done[number] for number in sorted(done)])
    for left in work.folder.glob("*.png.*.tmp"):  # by a start that was killed while it wrote a picture
        left.unlink(missing_ok=True)
    tell(work, options, len(done), bad)


def tell(work: Work, options: AnnotateOptions, made: int, bad: dict[int, str]) -> None:
    """What stands; raises UserError where rows are bad."""
    reasons = [bad[number] for number in sorted(bad)]
    listed = work.folder / BAD_ROWS
    listed.unlink(missing_ok=True)
    if not reasons:
        print(f"{made:,} pairs in {work.folder}; train on them with: --data.train_data_dir {options.out}")
        return
    listed.write_text("".join(f"{reason}\n" for reason in reasons), encoding="utf-8")
    for reason in reasons[:SHOWN]:
        print(f"left out: {reason}")
    raise UserError(
        f"{options.data}: {len(bad):,} of {len(work.source):,} rows could not be made, all listed in {listed}; the "
        "others are. Mend them and start again: what is made is kept."
    )


def open_work(options: AnnotateOptions) -> Work:
    """Opens data and annotator. Raises UserError."""
    assert options.out is not None and options.data is not None
    annotator = open_annotator(options.kind)
    data = DataOptions(
        kind=options.layout,
        split=options.split,
        image_column=options.image_column,
        caption_column=options.caption_column,
        condition=options.kind,  # then no condition column is asked for
    )
    source = open_source(located(options.data, data), seed=0)
    return Work(source, annotator, user_path(options.out) / options.split, max(5, len(str(len(source) - 1))))


def open_list(work: Work, options: AnnotateOptions) -> Path:
    """The list of what is made, begun where there is none. Raises UserError where the folder holds anything else."""
    listing = work.folder / LIST
    assert options.data is not None
    place = user_path(options.data)
    settings = {
        "annotator": work.annotator.fingerprint,
        "condition": json.loads(json.dumps(work.annotator.record())),
        "data": str(place.resolve()) if place.exists() else options.data,
        "columns": [options.image_column, options.caption_column],
        "rows": len(work.source),
    }
    try:
        work.folder.mkdir(parents=True, exist_ok=True)
        if listing.is_file():
            with listing.open(encoding="utf-8") as file:
                there = json.loads(file.readline())
            if there != settings:
                other = [f"{name} {there.get(name)}" for name in settings if there.get(name) != settings[name]]
                raise UserError(
                    f"--out {options.out}: holds maps made otherwise ({'; '.join(other)}): name another folder"
                )
        elif any(work.folder.iterdir()):
            raise UserError(f"--out {options.out}: {work.folder} is not empty: name a folder that is new or empty")
        else:
            write_atomic(listing, [(json.dumps(settings) + "\n").encode()])
    except (FileExistsError, NotADirectoryError, PermissionError) as fault:
        raise UserError(f"--out {options.out}: the folder cannot be made ({fault.strerror})") from None
    return listing


def read_list(listing: Path) -> dict[int, tuple[str | None, dict[str, Any]]]:
    """Stamp and row of what is finished, by number. A line that a kill cut off is taken away: the next follows a whole
    one."""
    done: dict[int, tuple[str | None, dict[str, Any]]] = {}
    with listing.open("r+b") as file:
        whole = len(file.readline())
        for line in file:
            if not line.endswith(b"\n"):
                break
            number, stamp, row = json.loads(line)
            done[number] = stamp, row
            whole += len(line)
        file.truncate(whole)
    return done


Made = tuple[int, dict[str, Any] | None, str]
"""(number, line of the metadata or None, why not)."""


def make_all(numbers: Iterable[int], work: Work, options: AnnotateOptions) -> Iterator[Made]:
    """Makes rows, by several processes in no certain order."""
    processes = (os.cpu_count() or 1) if options.workers is None else options.workers
    if processes == 0:
        yield from (_make(work, number) for number in numbers)
        return
    waiting: set[Future[Made]] = set()
    left = iter(numbers)
    # spawned, not forked: the parent may hold threads of OpenCV or torch
    with ProcessPoolExecutor(processes, get_context("spawn"), _start, (options,)) as pool:
        try:
            while True:
                waiting |= {pool.submit(_make_here, n) for n in islice(left, IN_FLIGHT * processes - len(waiting))}
                if not waiting:
                    return
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        except BrokenProcessPool:
            raise UserError(
                f"--workers {processes}: one of them was killed, for memory perhaps. Start again with fewer: what is "
                "made is kept."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def write_metadata(folder: Path, rows: list[dict[str, Any]]) -> None:
    write_atomic(folder / METADATA, [(json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows])


def write_picture(path: Path, picture: Image.Image) -> None:
    """A PNG, whole or not at all."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_atomic(path, [buffer.getbuffer()])


def _make(work: Work, number: int) -> Made:
    try:
        return number, work.make(number), ""
    except UserError as fault:
        return number, None, str(fault)


_here: Work | None = None  # of this process, where it is a worker


def _start(options: AnnotateOptions) -> None:
    global _here
    import cv2

    cv2.setNumThreads(1)  # the processes share the cores
    _here = open_work(options)


def _make_here(number: int) -> Made:
    assert _here is not None
    return _make(_here, number)
