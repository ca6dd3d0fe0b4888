"""Pictures to records: which are known by their bytes, which are lacking, and how those are made."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from t2i_adapter.cache.layout import STAMPS, check_room
from t2i_adapter.cache.progress import PrepareContext, bar, batched, batched_alike, run_ahead
from t2i_adapter.cache.records import PackedCondition, image_record, pack_condition, view_keys
from t2i_adapter.cache.shards import Keys, Shards, ShardWriter
from t2i_adapter.cache.stamps import Stamps
from t2i_adapter.data.bad_rows import BadRow, BadRows
from t2i_adapter.data.pair import CroppedPair, PairTransform
from t2i_adapter.data.source import Source
from t2i_adapter.devices import cores_of, release, sharing_cores
from t2i_adapter.errors import UserError
from t2i_adapter.files import show_bytes
from t2i_adapter.models.encoders import LatentEncoder, batch_size, encode_pixels

CHUNK = 4096
"""Rows whose stamps are looked up at once."""
SAVE_SECONDS = 30.0
"""A killed start has so much to read again."""
LOOK_ON = 256
"""Rows that are still looked at after a bad one, so that its like are told together."""


def identify(pool: Executor, source: Source, machine: PrepareContext, bad: BadRows) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (N,) of the rows that can be read, ascending, and their digests (N,32) uint8.

    Only rows whose files are not known, or have changed, are read. Raises UserError, of up to ten bad rows together.
    """
    stamps = Stamps(machine.root / STAMPS)
    digests = np.zeros((len(source), 32), np.uint8)
    saved = time.monotonic()
    rows = bar(range(len(source)), len(source), "reading", machine.show)
    try:
        for chunk in batched(rows, CHUNK):
            told = [source.stamp(number) for number in chunk]
            found, known = stamps.digests(told)
            if bad.skips:
                known &= [_has_captions(source, number, bad) for number in chunk]
            fresh = [place for place in np.flatnonzero(~known) if chunk[place] not in bad.found]
            answers = run_ahead(pool, lambda number: _digest(source, number), (chunk[place] for place in fresh), 256)
            good = []
            for place, answer in zip(fresh, answers, strict=True):
                if isinstance(answer, BadRow):
                    bad.add(answer)
                else:
                    found[place] = np.frombuffer(answer, np.uint8)
                    good.append(place)
            stamps.add([told[place] for place in good], found[good])
            digests[chunk[0] : chunk[0] + len(chunk)] = found
            if time.monotonic() - saved > SAVE_SECONDS:
                stamps.save()
                saved = time.monotonic()
    finally:
        with contextlib.suppress(OSError):  # what is not remembered is read again
            stamps.save()
    bad.settle()
    kept = ~np.isin(np.arange(len(source)), list(bad.found))
    return np.flatnonzero(kept).astype(np.int32), digests[kept]


def _has_captions(source: Source, number: int, bad: BadRows) -> bool:
    """Captions change without their pictures, so those of known pictures may have become bad."""
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


def rows_of(images: Shards, digests: np.ndarray, views: int) -> np.ndarray:
    """(views,N) int32 rows of the pictures' records, from their digests (N,32); -1 where there is none yet."""
    return np.stack([images.find(view_keys(digests, view)).astype(np.int32) for view in range(views)])


@dataclass(frozen=True)
class MissingRecord:
    """A row of the source, its digest (hex), and its views that have no record yet."""

    number: int
    digest: str
    views: tuple[int, ...]


def lacking(rows: np.ndarray, numbers: np.ndarray, digests: np.ndarray) -> list[MissingRecord]:
    """What is to be made, by number; of rows that hold the same pictures the first."""
    found: dict[str, MissingRecord] = {}
    for place in np.flatnonzero((rows < 0).any(axis=0)).tolist():
        digest = digests[place].tobytes().hex()
        if digest not in found:
            found[digest] = MissingRecord(
                int(numbers[place]), digest, tuple(np.flatnonzero(rows[:, place] < 0).tolist())
            )
    return list(found.values())


@dataclass(frozen=True)
class PackedPair:
    """A crop, and its condition packed as it is stored."""

    cut: CroppedPair
    condition: PackedCondition


def same_as_bad(digests: np.ndarray, numbers: np.ndarray, bad: BadRows) -> np.ndarray:
    """(N,) bool: which of the rows are bad, or hold the same pictures as one that is, which alone was looked at."""
    found = np.isin(numbers, list(bad.found))
    return Keys(digests[found]).find(digests) >= 0 if found.any() else found


def build_images(
    pool: Executor,
    source: Source,
    work: Sequence[MissingRecord],
    stage: PairTransform,
    machine: PrepareContext,
    bad: BadRows,
    folder: Path,
    *,
    crops: int,
) -> None:
    """Encodes what is lacking and appends the records; decoding runs ahead of the encoder.

    `crops` are made by all processes together. Raises UserError where a row is bad and may not be left out, where
    there are too many, and where the disk has no room for what the first batch lets expect.
    """
    encoder = machine.base.latent_encoder(machine.device)
    size = batch_size(stage.framing.resolution**2, machine.device)
    results = run_ahead(pool, lambda lack: _ready(source, stage, lack), work, 2 * size)
    ready = _good(bar(results, len(work), "encoding pictures", machine.show), bad)
    is_first, started = True, time.monotonic()
    batches = batched_alike(ready, lambda one: one.cut.geometry.target, size)
    lanes = cores_of(machine.device)
    with ShardWriter(folder) as writer, sharing_cores(lanes) as encoding:
        for batch, moments in run_ahead(encoding, partial(_encoded, encoder), batches, lanes):
            for one, moment in zip(batch, moments, strict=True):
                record = image_record(moment, one.condition, one.cut.geometry, name=one.cut.key)
                writer.add(view_keys(_row(one.cut.digest), one.cut.view).tobytes(), record)
            if is_first:
                share, is_first = crops / len(batch), False
                _predict(machine, crops, writer.written * share, (time.monotonic() - started) * share / lanes)
    del encoder
    release(machine.device)
    bad.settle()


def _encoded(encoder: LatentEncoder, batch: Sequence[PackedPair]) -> tuple[Sequence[PackedPair], np.ndarray]:
    """The batch with its moments (B,8,h,w) float16."""
    pixels = torch.from_numpy(np.stack([one.cut.image for one in batch])).to(encoder.device)
    return batch, encode_pixels(encoder, pixels).cpu().numpy()


def _predict(machine: PrepareContext, crops: int, size: float, seconds: float) -> None:
    """Says what the pictures will take, as the first batch lets expect; refuses what the disk has no room for."""
    seconds /= machine.world
    took = f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"
    machine.say(f"pictures: {crops:,} new, about {show_bytes(size)} and {took}")
    check_room(machine.root, int(size))


def _row(digest: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(digest), np.uint8)[None]


def _ready(source: Source, stage: PairTransform, lack: MissingRecord) -> list[PackedPair] | BadRow:
    """The lacking views of a row. Packing is done here too, in the pool: it takes as long as the encoder does."""
    try:
        sample = source[lack.number]
        if sample.digest != lack.digest:
            raise UserError(
                f"{sample.key}: its files have changed just now, or in a way that left their size and date as they "
                "were. Give them a new date (touch), and start again."
            )
        cuts = [stage.cut(sample, view) for view in lack.views]
    except UserError as fault:
        return BadRow.of(source, lack.number, fault)
    return [PackedPair(cut, pack_condition(cut.condition)) for cut in cuts]


def _good(results: Iterable[list[PackedPair] | BadRow], bad: BadRows) -> Iterator[PackedPair]:
    """The crops of good rows. Where a bad row may not be left out it is the last, but for others close behind it."""
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


def moments_bytes(resolution: int) -> int:
    """What one crop's moments take at least: 8 numbers of 2 bytes a latent cell."""
    return 16 * (resolution // 8) ** 2
