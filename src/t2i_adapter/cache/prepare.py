"""Finds what is known of a source's pairs and makes what is missing, then hands out a reader.

Records lie under ROOT/images/FINGERPRINT and ROOT/texts/FINGERPRINT (`folders`). The fingerprint covers the weights and
the options of that stage alone; within a folder an image record is keyed by its pictures' bytes and its view, and a
text record by its caption. So other weights at the same path are a miss, and another learning rate, output folder,
caption dropout or batch size is a hit.
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from t2i_adapter.cache.dataset import CachedDataset, LiveDataset, prefixed
from t2i_adapter.cache.images import build_images, identify, lacking, moments_bytes, rows_of, same_as_bad
from t2i_adapter.cache.layout import NOTES, check_room, open_folder
from t2i_adapter.cache.progress import PrepareContext, bar, count_absent, run_ahead, wait_for
from t2i_adapter.cache.shards import Shards
from t2i_adapter.cache.texts import (
    CaptionTable,
    Texts,
    build_texts,
    caption_bytes,
    choose_captions,
    open_texts,
    tell_long,
)
from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.bad_rows import BadRow, BadRows, list_bad_rows
from t2i_adapter.data.pair import PairTransform
from t2i_adapter.data.source import Source, shards_of
from t2i_adapter.errors import UserError
from t2i_adapter.files import sweep


def prepare(
    source: Source,
    options: DataOptions,
    machine: PrepareContext,
    *,
    in_channels: int,
    extra_captions: Sequence[str] = ("",),
    bad_list: Path | None = None,
) -> CachedDataset | LiveDataset:
    """Everything a run needs of its pairs: from the cache where it is there, and made where it is not.

    Args:
        in_channels: of the condition, 1 (grey) or 3.
        extra_captions: captions to have besides the source's, "" for dropped ones.
        bad_list: file that takes a line for each row left out (`on_bad_sample skip`).

    With a cache every row's files are looked at, and those read that are new or have changed, so a damaged or missing
    picture is found here; with `cache none` nothing is read but what the options cannot do without. Raises UserError.
    """
    started = time.monotonic()
    stage = PairTransform.of(options, in_channels, source.annotate)
    notes = machine.root / NOTES / machine.meeting if machine.world > 1 else None
    sweep(machine.root / NOTES, "*")
    bad = BadRows(options, len(source), notes, machine.rank)
    try:
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            if options.cache == "none":
                pairs, new = _live(pool, source, stage, bad, machine), " read as they come"
            else:
                pairs, new = _prepared(pool, source, stage, bad, machine)
        texts, table, told = _texts(source, pairs.numbers, options, machine, extra_captions)
    finally:
        if bad_list and machine.rank == 0 and bad.found:
            list_bad_rows(bad_list, [(row.key, row.reason) for _, row in sorted(bad.found.items())])
    if bad.found:
        listed = f"; listed in {bad_list}" if bad_list else ""
        machine.say(f"{len(bad.found)} of {len(source)} rows cannot be used and are left out{listed}")
    machine.say(f"prepared: {len(pairs)} pairs{new}, {told} in {time.monotonic() - started:.0f} s at {machine.root}")
    return replace(pairs, texts=texts, table=table) if isinstance(pairs, CachedDataset) else replace(pairs, texts=texts)


def _prepared(
    pool: Executor, source: Source, stage: PairTransform, bad: BadRows, machine: PrepareContext
) -> tuple[CachedDataset, str]:
    """The pairs whose pictures are on disk by now, and how many of them were not before."""
    made_by = stage.fingerprint(machine.base.vae_fingerprint)
    folder = open_folder(machine.root, "images", made_by, {"base": machine.base.name, **stage.about()})
    numbers, digests = identify(pool, source, machine, bad)
    images, views = Shards(folder), stage.framing.count
    rows = rows_of(images, digests, views)
    missing = lacking(rows, numbers, digests)
    if missing:
        crops = sum(len(lack.views) for lack in missing)
        check_room(machine.root, crops * moments_bytes(stage.framing.resolution))
        share = [lack for lack in missing if lack.number % machine.world == machine.rank]
        if share:
            build_images(pool, source, share, stage, machine, bad, folder, crops=crops)

        def absent() -> int:
            bad.exchange()
            return int((rows_of(images, digests[~same_as_bad(digests, numbers, bad)], views) < 0).sum())

        wait_for(absent, images, machine.patience)
        lost = same_as_bad(digests, numbers, bad)
        for number in numbers[lost].tolist():
            bad.add(BadRow.of(source, number, UserError("holds the same pictures as another row that is bad.")))
        rows, numbers = rows_of(images, digests[~lost], views), numbers[~lost]
    _check_any(numbers, source)
    groups = groups_of(images.tags[rows[0]])
    shards = shards_of(source.shards, numbers)
    return CachedDataset(source, stage, numbers, rows, groups, shards, images, None), f" ({len(missing)} new)"


def _live(pool: Executor, source: Source, stage: PairTransform, bad: BadRows, machine: PrepareContext) -> LiveDataset:
    """The pairs as they are. Only to sort them by crop size is each picture opened, once."""
    numbers = np.arange(len(source), dtype=np.int32)
    groups: tuple[np.ndarray, ...] = (numbers,)
    if len(stage.framing.targets()) > 1:
        answers = run_ahead(pool, lambda number: _crop_size(source, stage, number), range(len(source)), 64)
        tags = np.zeros(len(source), np.int64)
        for number, answer in enumerate(bar(answers, len(source), "measuring pictures", machine.show)):
            if isinstance(answer, BadRow):
                bad.add(answer)
            else:
                tags[number] = answer
        bad.settle()
        numbers = numbers[~np.isin(numbers, list(bad.found))]
        groups = groups_of(tags[numbers])
    _check_any(numbers, source)
    return LiveDataset(source, stage, numbers, groups, shards_of(source.shards, numbers), None)


def _crop_size(source: Source, stage: PairTransform, number: int) -> int | BadRow:
    try:
        image = source[number].image
    except UserError as fault:
        return BadRow.of(source, number, fault)
    height, width = stage.framing.target((image.height, image.width))
    return height << 16 | width


def _check_any(numbers: np.ndarray, source: Source) -> None:
    if not len(numbers):
        raise UserError(f"{source.describe()}: none of the rows can be used.")


def groups_of(tags: np.ndarray) -> tuple[np.ndarray, ...]:
    """Numbers of the samples by crop size, from each one's tag (`records.size_of_tag`), sizes ascending."""
    return tuple(np.flatnonzero(tags == tag).astype(np.int32) for tag in np.unique(tags))


def _texts(
    source: Source, numbers: np.ndarray, options: DataOptions, machine: PrepareContext, extra: Sequence[str]
) -> tuple[Texts | None, CaptionTable | None, str]:
    """The captions on disk, made where they were not; whose they are; and what a person is told of them."""
    distinct: dict[str, int] = {}
    places, ends = array("i"), array("q")

    def all_captions() -> Iterator[str]:
        yield from extra
        for number in numbers.tolist():
            for caption in source.identify(number, "").captions:
                places.append(distinct.setdefault(caption, len(distinct)))
                yield prefixed(caption, options.caption_prefix)
            ends.append(len(places))

    captions, why = choose_captions(all_captions(), options, caption_bytes(machine.base))
    machine.say(why)
    if captions is None:
        return None, None, "captions as they come"
    texts = open_texts(machine.root, machine.base, machine.dtype)
    keys = texts.keys(captions)
    missing = np.flatnonzero(texts.shards.find(keys) < 0)
    check_room(machine.root, len(missing) * caption_bytes(machine.base))
    # By the key, for what is missing is not the same for a process that looks later
    share = [captions[place] for place in missing if int(keys[place, 0]) % machine.world == machine.rank]
    if share:
        build_texts(share, texts, machine)
    wait_for(lambda: count_absent(texts.shards, keys), texts.shards, machine.patience)
    for line in tell_long(texts, captions):
        machine.say(line)
    table = CaptionTable(tuple(distinct), np.array(places, np.int32), np.array(ends, np.int64))
    return texts, table, f"{len(captions)} captions ({len(missing)} new)"
