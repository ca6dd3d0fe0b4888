"""Makes the image records of a source: finds what is in the cache by the pictures' bytes, and encodes what is
missing."""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from t2i_adapter.cache.context import PrepareContext, in_batches, run_ahead
from t2i_adapter.cache.keys import BLOCK, Keys
from t2i_adapter.cache.records import PackedCondition, image_record, pack_condition, view_keys
from t2i_adapter.cache.shards import Shards
from t2i_adapter.data.bad_rows import BadRow, BadRows
from t2i_adapter.data.pair import CroppedPair, PairTransform
from t2i_adapter.data.picture import narrow_range, notes_of
from t2i_adapter.data.source import Source
from t2i_adapter.devices import cores_of, release, sharing_cores
from t2i_adapter.errors import UserError
from t2i_adapter.files import show_bytes
from t2i_adapter.models.encoders import LatentEncoder, batch_size, encode_pixels

LOOK_ON = 256
"""Rows that are still checked after the first bad one, so that one error reports several."""


class Packed(NamedTuple):
    """The number of a row, one of its views cropped, that view's condition as it is stored, and `Notes.levels` of the
    row's condition picture."""

    number: int
    pair: CroppedPair
    condition: PackedCondition
    levels: tuple[int, int] | None


def find_rows(images: Shards, digests: np.ndarray, views: int) -> np.ndarray:
    """(views,N) int32 rows of the pictures' records, from their digests (N,32); -1 if a record is missing."""
    rows = np.empty((views, len(digests)), np.int32)
    for view in range(views):
        for at in range(0, len(digests), BLOCK):  # the keys of all pictures would be another 32 bytes each
            rows[view, at : at + BLOCK] = images.find(view_keys(digests[at : at + BLOCK], view))
    return rows


@dataclass(frozen=True)
class MissingRecord:
    """A row of the source, its digest (hex), and its views that have no record yet."""

    number: int
    digest: str
    views: tuple[int, ...]


def find_missing(rows: np.ndarray, numbers: np.ndarray, digests: np.ndarray) -> list[MissingRecord]:
    """The missing records, by number. Of rows with the same pictures only the first is listed."""
    found: dict[str, MissingRecord] = {}
    for place in np.flatnonzero((rows < 0).any(axis=0)).tolist():
        digest = digests[place].tobytes().hex()
        if digest not in found:
            views = tuple(np.flatnonzero(rows[:, place] < 0).tolist())
            found[digest] = MissingRecord(int(numbers[place]), digest, views)
    return list(found.values())


def is_bad(digests: np.ndarray, numbers: np.ndarray, bad: BadRows) -> np.ndarray:
    """(N,) bool: the row is bad, or has the same pictures as a bad row. Only one of such rows was decoded."""
    found = np.isin(numbers, list(bad.found))
    return Keys(digests[found]).find(digests) >= 0 if found.any() else found


def build_images(
    pool: Executor,
    source: Source,
    missing: Iterator[MissingRecord],
    transform: PairTransform,
    context: PrepareContext,
    bad: BadRows,
    images: Shards,
    *,
    crops: int,
) -> None:
    """Encodes the missing crops and appends their records to `images`. The pool decodes ahead of the encoder.

    `crops` is the number that all processes together make, at most. A row is bad, too, if its moments are NaN or inf.
    Raises UserError if a row is bad and may not be skipped, if too many rows are bad, and if the disk has too little
    room, as estimated from the first batch.
    """
    first = next(missing, None)
    if first is None:
        return
    missing = itertools.chain([first], missing)
    encoder = context.base.latent_encoder(context.device)
    size = batch_size(transform.framing.resolution**2, context.device)
    # Rows that are read ahead are taken from the other processes too, so of few rows few are read ahead.
    ahead = min(2 * size, max(1, crops // (4 * context.world)))
    results = run_ahead(pool, lambda one: _crop(source, transform, one), missing, ahead)
    pairs = _good(context.bar(results, -(-crops // context.world), "encoding pictures"), bad)
    levels: dict[int, tuple[int, int]] = {}
    is_first, started = True, time.monotonic()
    batches = in_batches(pairs, size, lambda packed: packed.pair.geometry.target)
    threads = cores_of(context.device)
    with images.writer() as writer, sharing_cores(threads) as encoding:
        for batch, moments in run_ahead(encoding, partial(_encoded, encoder), batches, threads):
            for (number, pair, condition, own_levels), moment in zip(batch, moments, strict=True):
                if own_levels:
                    levels[number] = own_levels
                try:
                    record = image_record(moment, condition, pair.geometry, name=pair.key)
                except UserError as fault:
                    if not bad.skips:
                        raise
                    bad.add(BadRow.of(source, number, fault))
                    continue
                digest = np.frombuffer(bytes.fromhex(pair.digest), np.uint8)
                writer.add(view_keys(digest[None], pair.view).tobytes(), record)
            if is_first:
                share, is_first = crops / len(batch), False
                _estimate(context, crops, writer.written * share, (time.monotonic() - started) * share / threads)
    del encoder
    release(context.device)
    bad.settle()
    _warn_of_range(context, levels.values())


def _warn_of_range(context: PrepareContext, levels: Collection[tuple[int, int]]) -> None:
    """Logs a line if the new conditions of 16 bits use little of their range."""
    if levels and (text := narrow_range(min(low for low, _ in levels), max(high for _, high in levels))):
        context.log(f"warning: {len(levels):,} new conditions have 16 bits: {text}")


def _encoded(encoder: LatentEncoder, batch: Sequence[Packed]) -> tuple[Sequence[Packed], np.ndarray]:
    """The batch with its moments (B,8,h,w) float16."""
    pixels = torch.from_numpy(np.stack([packed.pair.image for packed in batch])).to(encoder.device)
    return batch, encode_pixels(encoder, pixels).cpu().numpy()


def _estimate(context: PrepareContext, crops: int, size: float, seconds: float) -> None:
    """Logs the size and time of all crops, estimated from the first batch. Raises UserError if the disk has too little
    room."""
    seconds /= context.world
    duration = f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"
    context.log(f"pictures: {crops:,} new, about {show_bytes(size)} and {duration}")
    context.check_room(int(size))


def _crop(source: Source, transform: PairTransform, missing: MissingRecord) -> list[Packed] | BadRow:
    """The missing views of a row. The pool packs the conditions too: that takes as long as encoding."""
    try:
        sample = source[missing.number]
        if sample.digest != missing.digest:
            raise UserError(
                f"{sample.key}: its files have changed during this start, or they changed without a new size or date. "
                "Set a new date (touch) and start again."
            )
        pairs = [transform.crop(sample, view) for view in missing.views]
    except UserError as fault:
        return BadRow.of(source, missing.number, fault)
    levels = notes_of(sample.condition).levels if sample.condition else None
    return [Packed(missing.number, pair, pack_condition(pair.condition), levels) for pair in pairs]


def _good(results: Iterable[list[Packed] | BadRow], bad: BadRows) -> Iterator[Packed]:
    """The pairs of good rows. If bad rows may not be skipped, the pairs end at the first bad row, but up to LOOK_ON
    more rows are checked for others."""
    stops, looked_on = False, 0
    for result in results:
        if isinstance(result, BadRow):
            bad.add(result)
            stops = not bad.skips
        elif not stops:
            yield from result
        looked_on += stops
        if looked_on > LOOK_ON:
            return
