"""Makes the image records of a source: finds what is in the cache by the pictures' bytes, and encodes what is
missing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from t2i_adapter.cache.context import STAMPS, PrepareContext, check_room, in_batches, run_ahead
from t2i_adapter.cache.records import PackedCondition, image_record, pack_condition, view_keys
from t2i_adapter.cache.shards import BLOCK, Keys, Shards, ShardWriter
from t2i_adapter.cache.stamps import Stamps
from t2i_adapter.data.bad_rows import BadRow, BadRows
from t2i_adapter.data.pair import CroppedPair, PairTransform
from t2i_adapter.data.picture import narrow_range, notes_of
from t2i_adapter.data.source import Source
from t2i_adapter.devices import cores_of, release, sharing_cores
from t2i_adapter.errors import UserError
from t2i_adapter.files import show_bytes
from t2i_adapter.models.encoders import LatentEncoder, batch_size, encode_pixels

CHUNK = 4096
"""Rows whose stamps are looked up at once."""
SAVE_SECONDS = 30.0
"""Seconds between saves of the stamps: a killed run reads at most this much again."""
LOOK_ON = 256
"""Rows that are still checked after the first bad one, so that one error reports several."""


class Packed(NamedTuple):
    """The number of a row, one of its views cropped, that view's condition as it is stored, and `Notes.levels` of the
    row's condition picture."""

    number: int
    pair: CroppedPair
    condition: PackedCondition
    levels: tuple[int, int] | None


def read_digests(
    pool: Executor, source: Source, context: PrepareContext, bad: BadRows
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (N,) of the good rows, ascending, and their digests (N,32) uint8.

    Only rows whose files are new or have changed are read. Raises UserError with up to ten bad rows.
    """
    stamps = Stamps(context.root / STAMPS)
    digests = np.zeros((len(source), 32), np.uint8)
    saved = time.monotonic()
    try:
        for chunk in in_batches(context.bar(range(len(source)), len(source), "reading"), CHUNK):
            digests[chunk[0] : chunk[0] + len(chunk)] = _read_chunk(pool, source, chunk, stamps, bad)
            if time.monotonic() - saved > SAVE_SECONDS:
                stamps.save()
                saved = time.monotonic()
    finally:
        with contextlib.suppress(OSError):  # rows whose stamps are not saved are read again
            stamps.save()
    bad.settle()
    if not bad.found:
        return np.arange(len(source), dtype=np.int32), digests
    good = ~np.isin(np.arange(len(source)), list(bad.found))
    return np.flatnonzero(good).astype(np.int32), digests[good]


def _read_chunk(pool: Executor, source: Source, chunk: list[int], stamps: Stamps, bad: BadRows) -> np.ndarray:
    """Digests (n,32) of the rows of a chunk, zeros for bad rows."""
    names = [source.stamp(number) for number in chunk]
    digests, known = stamps.digests(names)
    if bad.skips:
        known &= [_has_captions(source, number, bad) for number in chunk]
    unread = [place for place in np.flatnonzero(~known) if chunk[place] not in bad.found]
    answers = run_ahead(pool, lambda number: _digest(source, number), (chunk[place] for place in unread), 256)
    good = []
    for place, answer in zip(unread, answers, strict=True):
        if isinstance(answer, BadRow):
            bad.add(answer)
        else:
            digests[place] = np.frombuffer(answer, np.uint8)
            good.append(place)
    stamps.add([names[place] for place in good], digests[good])
    return digests


def _has_captions(source: Source, number: int, bad: BadRows) -> bool:
    """Captions can change while the pictures stay, so a row with a known digest may have become bad."""
    try:
        return bool(source.identify(number, "").captions)
    except UserError as fault:
        bad.add(BadRow.of(source, number, fault))
        return False


def _digest(source: Source, number: int) -> bytes | BadRow:
    try:
        return bytes.fromhex(source.identify(number).digest)
    except UserError as fault:
        return BadRow.of(source, number, fault)


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
    missing: Sequence[MissingRecord],
    transform: PairTransform,
    context: PrepareContext,
    bad: BadRows,
    folder: Path,
    *,
    crops: int,
) -> None:
    """Encodes the missing crops and appends their records. The pool decodes ahead of the encoder.

    `crops` is the number that all processes together make. A row is bad, too, if its moments are NaN or inf. Raises
    UserError if a row is bad and may not be skipped, if too many rows are bad, and if the disk has too little room, as
    estimated from the first batch.
    """
    encoder = context.base.latent_encoder(context.device)
    size = batch_size(transform.framing.resolution**2, context.device)
    results = run_ahead(pool, lambda one: _crop(source, transform, one), missing, 2 * size)
    pairs = _good(context.bar(results, len(missing), "encoding pictures"), bad)
    levels: dict[int, tuple[int, int]] = {}
    is_first, started = True, time.monotonic()
    batches = in_batches(pairs, size, lambda packed: packed.pair.geometry.target)
    threads = cores_of(context.device)
    with ShardWriter(folder) as writer, sharing_cores(threads) as encoding:
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
    check_room(context.root, int(size))


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
