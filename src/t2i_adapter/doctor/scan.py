"""Reads and measures every row of a dataset once, in several processes and in bounded memory.

A row's measurements are numbers of a fixed size (`ROW`); text is stored only for bad rows. Worker processes import this
module, so it loads no torch.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from t2i_adapter.cache.context import run_ahead
from t2i_adapter.cache.records import add_prefix, pack_image, stored_bytes, text_key
from t2i_adapter.data.bad_rows import BadRow
from t2i_adapter.data.pair import CroppedPair, PairTransform
from t2i_adapter.data.picture import notes_of
from t2i_adapter.data.profiles import quiet
from t2i_adapter.data.source import Source
from t2i_adapter.doctor.content import find_content, find_polarity
from t2i_adapter.doctor.duplicates import hash_pixels, perceptual_hash
from t2i_adapter.doctor.offset import find_offset
from t2i_adapter.errors import UserError
from t2i_adapter.progress import progress_bar
from t2i_adapter.types import Sample

CHUNK_ROWS = 8
"""Rows in one task of a worker process."""

CHUNKS_AHEAD = 4
"""Chunks per process that may be finished before they are collected."""

SHORT_BYTES = 40
"""A caption of at most so many UTF-8 bytes is not tokenized: it cannot exceed 75 tokens. Each token takes at
least one byte, and lower-casing may lengthen the text."""

ROW = np.dtype(
    [
        ("is_read", "?"),
        ("size", "<i4", 2),  # of the image, (height, width)
        ("condition_size", "<i4", 2),  # (height, width); (0, 0) if the row has no condition picture
        ("digest", "<u8"),  # first 64 bits of the pair's digest
        ("pixel_hash", "<u8"),
        ("perceptual_hash", "<u8"),
        ("content", "u1"),  # index into CONTENTS
        ("polarity", "i1"),
        ("offset", "<f4", 2),  # (down, right), pixels of the crop
        ("margin", "<f4"),  # of the offset; 0 if none was found
        ("scale", "u1"),  # of the offset
        ("levels", "<i4", 2),  # lowest and highest level of a condition of 16 bits (`Notes.levels`); else (0, 0)
        ("is_transparent", "?"),  # the background colour is visible in the condition
        ("bytes", "<u8"),  # of the pair's records in the cache, all views together
        ("tokens", "<i4"),  # of the longest caption; 0 if all are short
        ("has_empty_caption", "?"),
    ]
)
"""The measurements of one row, 78 bytes. The main process, which has the tokenizer, fills in the last two."""


@dataclass(frozen=True)
class Chunk:
    """The rows of one task.

    Attributes:
        start: number of the first row.
        rows: (n,) of ROW.
        keys: (n,)
        captions: (n,); a row's captions, () if it cannot be read.
        bad: number -> the bad row.
        colours: number -> why the image's colours may be off, of such rows only.
    """

    start: int
    rows: np.ndarray
    keys: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    bad: dict[int, BadRow]
    colours: dict[int, str]


@dataclass(frozen=True)
class Examiner:
    """Reads rows, crops them as training does and measures them. It is pickled to the worker processes."""

    source: Source
    transform: PairTransform

    def examine(self, numbers: range) -> Chunk:
        """Reads the rows of a range. A bad row is recorded and does not stop the others."""
        rows = np.zeros(len(numbers), ROW)
        keys: list[str] = []
        captions: list[tuple[str, ...]] = []
        bad: dict[int, BadRow] = {}
        colours: dict[int, str] = {}
        for row, number in zip(rows, numbers, strict=True):
            try:
                with quiet():  # the report lists them
                    sample = self.source[number]
                self._measure(sample, row)
            except UserError as fault:
                bad[number] = BadRow.of(self.source, number, fault)
                keys.append(bad[number].key)
                captions.append(())
            else:
                keys.append(sample.key)
                captions.append(sample.captions)
                if reason := notes_of(sample.image).colours:
                    colours[number] = sys.intern(reason)
        return Chunk(numbers.start, rows, tuple(keys), tuple(captions), bad, colours)

    def _measure(self, sample: Sample, row: np.void) -> None:
        """Fills in a row of ROW. Raises UserError if the pair cannot be cropped."""
        crops = [self.transform.crop(sample, view) for view in range(self.transform.framing.count)]
        row["size"] = sample.image.height, sample.image.width
        row["digest"] = int(sample.digest[:16], 16)
        row["pixel_hash"], row["perceptual_hash"] = hash_pixels(sample.image), perceptual_hash(sample.image)
        row["bytes"] = sum(map(record_bytes, crops))
        if sample.condition is not None and self.transform.annotator is None:
            _measure_condition(np.asarray(sample.condition.convert("RGB")), crops[0], row)
            notes = notes_of(sample.condition)
            row["levels"], row["is_transparent"] = notes.levels or (0, 0), notes.is_transparent
        row["is_read"] = True


def _measure_condition(picture: np.ndarray, crop: CroppedPair, row: np.void) -> None:
    """picture: the stored condition, (H,W,3) uint8."""
    row["condition_size"] = picture.shape[:2]
    row["content"], row["polarity"] = find_content(picture), find_polarity(picture)
    offset = find_offset(crop.image, crop.condition)
    if offset is not None:
        row["offset"] = offset.down, offset.right
        row["margin"], row["scale"] = offset.margin, offset.scale


def record_bytes(crop: CroppedPair) -> int:
    """Bytes of one view's record in the cache, with its entry in the index."""
    height, width = crop.geometry.target
    moments = np.zeros((8, height // 8, width // 8), np.float16)
    return stored_bytes(pack_image(moments, crop.condition, crop.geometry, name=crop.key))


@dataclass
class Scan:
    """The measurements of a whole dataset.

    Attributes:
        rows: (N,) of ROW.
        keys: (N,); each names its row.
        bad: number -> the bad row.
        colours: number -> why the image's colours may be off, of such rows only.
        captions: hashes (uint64) of the distinct captions, with the empty one among them.
        caption_tokens: tokens of each distinct caption; 0 if it is short.
    """

    rows: np.ndarray
    keys: list[str]
    bad: dict[int, BadRow] = field(default_factory=dict)
    colours: dict[int, str] = field(default_factory=dict)
    captions: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    caption_tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))


def scan(examiner: Examiner, count_tokens: Callable[[str], int], prefix: str, workers: int | None) -> Scan:
    """Examines every row of the examiner's source.

    Args:
        count_tokens: caption -> its tokens, without start and end.
        prefix: text that training puts before every caption that is not empty.
        workers: processes; None starts one a core, 0 reads in the main process.
    """
    total = len(examiner.source)
    result = Scan(np.zeros(total, ROW), [])
    distinct = [_measure_captions({"": 0})]  # the empty caption, which training uses for dropped captions
    with progress_bar("reading", total, "row") as bar:
        for chunk in _chunks(examiner, total, workers):
            result.rows[chunk.start : chunk.start + len(chunk.rows)] = chunk.rows
            result.keys += chunk.keys
            result.bad |= chunk.bad
            result.colours |= chunk.colours
            distinct.append(_add_captions(result, chunk, count_tokens, prefix))
            bar.update(len(chunk.rows))
    hashes, tokens = (np.concatenate(parts) for parts in zip(*distinct, strict=True))
    result.captions, first = np.unique(hashes, return_index=True)
    result.caption_tokens = tokens[first]
    return result


def _add_captions(
    result: Scan, chunk: Chunk, count_tokens: Callable[[str], int], prefix: str
) -> tuple[np.ndarray, np.ndarray]:
    """Writes the captions' columns of a chunk into `result`; returns its distinct captions as `_measure_captions`."""
    distinct: dict[str, int] = {}
    for number, captions in enumerate(chunk.captions, start=chunk.start):
        prompts = [add_prefix(caption, prefix) for caption in captions]
        tokens = {prompt: count_tokens(prompt) if len(prompt.encode()) > SHORT_BYTES else 0 for prompt in prompts}
        result.rows["tokens"][number] = max(tokens.values(), default=0)
        result.rows["has_empty_caption"][number] = any(not caption.strip() for caption in captions)
        distinct |= tokens
    return _measure_captions(distinct)


def _measure_captions(tokens: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns hash (uint64) and tokens (int32) of each caption."""
    hashes = np.frombuffer(b"".join(text_key(caption, "")[:8] for caption in tokens), np.uint64)
    return hashes, np.fromiter(tokens.values(), np.int32, len(tokens))


def _chunks(examiner: Examiner, total: int, workers: int | None) -> Iterator[Chunk]:
    """Yields the chunks in the order of the rows."""
    ranges = (range(start, min(start + CHUNK_ROWS, total)) for start in range(0, total, CHUNK_ROWS))
    processes = min(_cores() if workers is None else workers, -(-total // CHUNK_ROWS))
    if processes == 0:
        yield from map(examiner.examine, ranges)
        return
    # Spawned, not forked: a fork would copy the locks of this process's threads, some of them held.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=(examiner,)) as pool:
        yield from run_ahead(pool, _examine, ranges, CHUNKS_AHEAD * processes)


_examiner: Examiner | None = None  # set in worker processes only


def _start_worker(examiner: Examiner) -> None:
    global _examiner
    _examiner = examiner
    import cv2

    cv2.setNumThreads(1)  # there is one process a core


def _examine(numbers: range) -> Chunk:
    assert _examiner is not None
    return _examiner.examine(numbers)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
