"""The verb `annotate`: it makes the condition map of one picture, or of every row of a dataset.

A dataset is written as an image folder that training reads: each picture with its map beside it. A list in the folder
gets a line as soon as a row's files are on the disk. The next start reads the list and continues: it makes rows that
failed, and rows whose picture has changed.
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
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from t2i_adapter.config.dataset import DatasetOptions
from t2i_adapter.errors import UserError, flag
from t2i_adapter.files import show_path, user_path, write_atomic

if TYPE_CHECKING:
    from PIL import Image

    from t2i_adapter.annotators.registry import Annotator
    from t2i_adapter.data.source import Source

LIST = ".annotated.jsonl"
"""Its first line has the options; each further line is a finished row: its index, its source's stamp, its metadata."""
BAD_ROWS = "bad_rows.txt"
BAD_ROWS_PRINTED = 10
ROWS_PER_PROCESS = 4
"""Rows that are submitted to each process at once."""


@dataclass(frozen=True, kw_only=True)
class AnnotateOptions(DatasetOptions):
    """Make the condition map of a picture, or of every picture of a dataset."""

    kind: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="KIND")]
    """Kind of map: one of `t2i-adapter conditions`, with its options after commas (canny,low=50,high=150), or your own,
    module:Class or file.py:Class."""
    photo: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[PHOTO]")] = None
    """A picture file. Either this or --data."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """The map's file (.png); with --data the image folder to write or to complete."""
    workers: int | None = None
    """Processes that make maps; None is one a core, 0 is this process alone. The maps do not depend on it."""

    def __post_init__(self) -> None:
        if self.photo is not None and self.data is not None:
            raise UserError(f"PHOTO and {flag('data')} are both set: use one of them")
        if self.photo is None and self.data is None:
            raise UserError(f"neither PHOTO nor {flag('data')} is set: use one of them")
        if self.out is None:
            raise UserError(f"is required: {'the file' if self.photo else 'the folder'} to write", option="out")
        if self.workers is not None and self.workers < 0:
            raise UserError(f"{self.workers}: allowed is 0 or more", option="workers")


def run(options: AnnotateOptions) -> None:
    """Writes the map of `photo`, or the maps of all rows of `data`."""
    if options.photo is None:
        annotate_dataset(options)
        return
    from t2i_adapter.annotators.registry import annotate, open_annotator
    from t2i_adapter.generation.condition import read_photo

    assert options.out is not None
    check_picture_file(options.out, "out")
    photo = read_photo(str(options.photo), "PHOTO")
    annotate(open_annotator(options.kind), photo).save(options.out)
    print(show_path(options.out))


def check_picture_file(path: Path, option: str) -> None:
    """Raises UserError if a picture cannot be saved under that name. `option`: the option that named it."""
    from PIL import Image

    Image.init()
    if path.is_dir() or path.suffix.lower() not in Image.EXTENSION:
        raise UserError(f"{path}: the name of a picture file must end in .png, .webp or .jpg", option=option)
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: the folder {path.parent} does not exist; make it first", option=option)


@dataclass(frozen=True)
class Work:
    """What making a row needs. Each process opens its own."""

    source: Source
    annotator: Annotator
    folder: Path
    digits: int

    def make(self, number: int) -> dict[str, Any]:
        """Writes a row's picture and map; returns its line of the metadata. Raises UserError naming the row."""
        from t2i_adapter.annotators.registry import annotate

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


def annotate_dataset(options: AnnotateOptions) -> None:
    """Writes or completes the image folder. Makes every row that it can, then raises UserError if others failed."""
    from t2i_adapter.data.folder import METADATA
    from t2i_adapter.progress import progress_bar

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
        progress_bar("annotating", len(missing), "row") as bar,
    ):
        for number, row, reason in make_rows(missing, work, options):
            if row is None:
                bad[number] = reason
            else:
                done[number] = row
                file.write(json.dumps([number, work.source.stamp(number), row]) + "\n")
                file.flush()
            bar.update()
    lines = [(json.dumps(done[number], ensure_ascii=False) + "\n").encode() for number in sorted(done)]
    write_atomic(work.folder / METADATA[0], lines)
    for temporary in work.folder.glob("*.png.*.tmp"):  # of a start that was killed while it wrote a picture
        temporary.unlink(missing_ok=True)
    report(work, options, len(done), bad)


def report(work: Work, options: AnnotateOptions, made: int, bad: dict[int, str]) -> None:
    """Prints the result, and lists the bad rows in a file. Raises UserError if there are any."""
    reasons = [bad[number] for number in sorted(bad)]
    listed = work.folder / BAD_ROWS
    listed.unlink(missing_ok=True)
    if not reasons:
        place = show_path(options.out or work.folder)
        print(f"{made:,} pairs in {show_path(work.folder)}; train on them with: --data {place}")
        return
    listed.write_text("".join(f"{reason}\n" for reason in reasons), encoding="utf-8")
    for reason in reasons[:BAD_ROWS_PRINTED]:
        print(f"skipped: {reason}")
    raise UserError(
        f"{options.data}: {len(bad):,} of {len(work.source):,} rows could not be made and are listed in {listed}; all "
        "others are done. Correct them and start again; only the missing rows are made then."
    )


def open_work(options: AnnotateOptions) -> Work:
    """Opens the dataset and the annotator. Raises UserError."""
    from t2i_adapter.annotators.registry import open_annotator
    from t2i_adapter.data.source import open_source

    assert options.out is not None and options.data is not None
    annotator = open_annotator(options.kind)
    data = options.dataset(condition=options.kind)  # so that no condition pictures are required
    source = open_source(data, seed=0)
    return Work(source, annotator, user_path(options.out) / options.split, max(5, len(str(len(source) - 1))))


def open_list(work: Work, options: AnnotateOptions) -> Path:
    """Returns the list of finished rows; begins it in an empty folder. Raises UserError if the folder has other
    content."""
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
                before = json.loads(file.readline())
            if before != settings:
                other = [f"{name} {before.get(name)}" for name in settings if before.get(name) != settings[name]]
                raise UserError(
                    f"{options.out}: its maps were made with other options ({'; '.join(other)}): name another folder",
                    option="out",
                )
        elif any(work.folder.iterdir()):
            raise UserError(f"{options.out}: {work.folder} is not empty: name a new or an empty folder", option="out")
        else:
            write_atomic(listing, [(json.dumps(settings) + "\n").encode()])
    except (FileExistsError, NotADirectoryError, PermissionError) as fault:
        raise UserError(f"{options.out}: the folder cannot be made ({fault.strerror})", option="out") from None
    return listing


def read_list(listing: Path) -> dict[int, tuple[str | None, dict[str, Any]]]:
    """Returns stamp and metadata of the finished rows, by index. Truncates a last line that a kill left incomplete."""
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
"""A row's index; then its metadata and "", or None and the reason why it failed."""


def make_rows(numbers: Iterable[int], work: Work, options: AnnotateOptions) -> Iterator[Made]:
    """Makes rows in several processes, in any order."""
    processes = (os.cpu_count() or 1) if options.workers is None else options.workers
    if processes == 0:
        yield from (_make(work, number) for number in numbers)
        return
    waiting: set[Future[Made]] = set()
    left = iter(numbers)
    # spawned, not forked: the parent may have threads of OpenCV or torch
    with ProcessPoolExecutor(processes, get_context("spawn"), _start, (options,)) as pool:
        try:
            while True:
                free = ROWS_PER_PROCESS * processes - len(waiting)
                waiting |= {pool.submit(_make_in_worker, number) for number in islice(left, free)}
                if not waiting:
                    return
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        except BrokenProcessPool:
            raise UserError(
                f"{processes}: one of these processes was killed, perhaps because memory ran out. Start again with "
                "fewer; finished rows are not made again.",
                option="workers",
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def write_picture(path: Path, picture: Image.Image) -> None:
    """Writes a PNG atomically."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_atomic(path, [buffer.getbuffer()])


def _make(work: Work, number: int) -> Made:
    try:
        return number, work.make(number), ""
    except UserError as fault:
        return number, None, str(fault)


_work: Work | None = None
"""The work of this process, if it is a worker."""


def _start(options: AnnotateOptions) -> None:
    global _work
    import cv2

    cv2.setNumThreads(1)  # the processes share the cores
    _work = open_work(options)


def _make_in_worker(number: int) -> Made:
    assert _work is not None
    return _make(_work, number)
