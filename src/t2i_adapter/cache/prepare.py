"""Prepares a dataset for training: finds which records are in the cache, makes the missing ones, returns the dataset.

Records lie under ROOT/images/FINGERPRINT and ROOT/texts/FINGERPRINT (`context`). The fingerprint covers the weights and
the options that the stage depends on, and no others. Within a folder the key of an image record is made of its
pictures' bytes and its view, and the key of a text record of its caption. So other weights at the same path are a miss,
and another learning rate, output folder, caption dropout or batch size is a hit.
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from t2i_adapter.cache.context import NOTES, PrepareContext, check_room, open_folder, run_ahead, wait_for
from t2i_adapter.cache.dataset import CachedDataset, LiveDataset
from t2i_adapter.cache.images import build_images, find_missing, find_rows, is_bad, read_digests
from t2i_adapter.cache.records import add_prefix, caption_bytes, picture_bytes
from t2i_adapter.cache.shards import Shards
from t2i_adapter.cache.texts import CaptionTable, Texts, build_texts, choose_captions, open_texts, warn_of_long
from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.bad_rows import BadRow, BadRows, list_bad_rows
from t2i_adapter.data.pair import PairTransform
from t2i_adapter.data.source import Source, shards_of
from t2i_adapter.errors import UserError
from t2i_adapter.files import sweep

HEAD_BYTES = 8
"""Bytes of a digest that a dataset keeps of each sample."""


def prepare(
    source: Source,
    options: DataOptions,
    context: PrepareContext,
    *,
    in_channels: int,
    extra_captions: Sequence[str] = ("",),
    bad_list: Path | None = None,
    check: Callable[[Source, np.ndarray, np.ndarray], None] | None = None,
) -> CachedDataset | LiveDataset:
    """The dataset of a run; its missing records are made first.

    Args:
        in_channels: of the condition, 1 (grey) or 3; not used if the source has several conditions, which have their
            own.
        extra_captions: captions to encode besides the source's; "" is for dropped captions.
        bad_list: file that gets a line for each skipped row (`on_bad_sample skip`).
        check: called before a picture is encoded, with the source, the numbers (N,) of its good rows and their digests
            (N,32). What it raises ends the preparation.

    With a cache, files that are new or have changed are read, so a damaged or missing picture is found here. With
    `cache none` the pictures are opened only if they must be sorted by crop size. Raises UserError.
    """
    started = time.monotonic()
    transform = PairTransform.of(options, in_channels, source.annotate, source.parts)
    notes = context.root / NOTES / context.run_id if context.world > 1 else None
    sweep(context.root / NOTES, "*")
    bad = BadRows(options, len(source), notes, context.rank)
    make = _live if options.cache == "none" else partial(_cached, check=check)
    try:
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            dataset, new = make(pool, source, transform, bad, context)
        texts, table, captions = _texts(source, dataset.numbers, options, context, extra_captions)
    finally:
        if bad_list and context.rank == 0 and bad.found:
            list_bad_rows(bad_list, [(row.key, row.reason) for _, row in sorted(bad.found.items())])
    if bad.found:
        where = f"; listed in {bad_list}" if bad_list else ""
        context.log(f"{len(bad.found)} of {len(source)} rows cannot be used and are skipped{where}")
    seconds = time.monotonic() - started
    context.log(f"prepared: {len(dataset)} pairs ({new}), {captions} in {seconds:.0f} s at {context.root}")
    return replace(dataset, texts=texts, **({"table": table} if isinstance(dataset, CachedDataset) else {}))


def _cached(
    pool: Executor,
    source: Source,
    transform: PairTransform,
    bad: BadRows,
    context: PrepareContext,
    check: Callable[[Source, np.ndarray, np.ndarray], None] | None,
) -> tuple[CachedDataset, str]:
    """The pairs with all their image records in the cache; and how many pairs are new, in words."""
    made_by = transform.fingerprint(context.base.vae_fingerprint)
    folder = open_folder(context.root, "images", made_by, {"base": context.base.name, **transform.about()})
    numbers, digests = read_digests(pool, source, context, bad)
    if check:
        check(source, numbers, digests)
    images, views = Shards(folder), transform.framing.count
    rows = find_rows(images, digests, views)
    missing = find_missing(rows, numbers, digests)
    if missing:
        crops = sum(len(one.views) for one in missing)
        check_room(context.root, crops * picture_bytes(transform.framing.resolution))
        share = [one for one in missing if one.number % context.world == context.rank]
        if share:
            build_images(pool, source, share, transform, context, bad, folder, crops=crops)

        def count_missing() -> int:
            bad.exchange()
            return int((find_rows(images, digests[~is_bad(digests, numbers, bad)], views) < 0).sum())

        wait_for(count_missing, images, context.timeout)
        lost = is_bad(digests, numbers, bad)
        for number in numbers[lost].tolist():
            bad.add(BadRow.of(source, number, UserError("has the same pictures as another row, which is bad.")))
        numbers, digests = numbers[~lost], digests[~lost]
        rows = find_rows(images, digests, views)
    _check_any(numbers, source)
    groups, shards = groups_of(images.tags[rows[0]]), shards_of(source.shards, numbers)
    heads = digests[:, :HEAD_BYTES].copy()
    images.forget_keys()
    dataset = CachedDataset(source, transform, numbers, groups, shards, None, rows, images, digests=heads)
    return dataset, f"{len(missing)} new"


def _live(
    pool: Executor, source: Source, transform: PairTransform, bad: BadRows, context: PrepareContext
) -> tuple[LiveDataset, str]:
    """The pairs without records. Pictures are opened, once, only to sort them by crop size."""
    numbers = np.arange(len(source), dtype=np.int32)
    groups: tuple[np.ndarray, ...] = (numbers,)
    heads = None
    if len(transform.framing.targets()) > 1:
        answers = run_ahead(pool, lambda number: _crop_size(source, transform, number), range(len(source)), 64)
        tags, heads = np.zeros(len(source), np.int64), np.zeros((len(source), HEAD_BYTES), np.uint8)
        for number, answer in enumerate(context.bar(answers, len(source), "measuring pictures")):
            if isinstance(answer, BadRow):
                bad.add(answer)
            else:
                tags[number], head = answer
                heads[number] = np.frombuffer(head, np.uint8)
        bad.settle()
        numbers = numbers[~np.isin(numbers, list(bad.found))]
        groups, heads = groups_of(tags[numbers]), heads[numbers]
    _check_any(numbers, source)
    shards = shards_of(source.shards, numbers)
    return LiveDataset(source, transform, numbers, groups, shards, None, digests=heads), "read when drawn"


def _crop_size(source: Source, transform: PairTransform, number: int) -> tuple[int, bytes] | BadRow:
    """A row's crop size, as in `groups_of`, and the first bytes of its digest."""
    try:
        sample = source[number]
    except UserError as fault:
        return BadRow.of(source, number, fault)
    height, width = transform.framing.target((sample.image.height, sample.image.width))
    return height << 16 | width, bytes.fromhex(sample.digest)[:HEAD_BYTES]


def _check_any(numbers: np.ndarray, source: Source) -> None:
    if not len(numbers):
        raise UserError(f"{source.describe().splitlines()[0]}: all rows are bad.")


def groups_of(tags: np.ndarray) -> tuple[np.ndarray, ...]:
    """Sample numbers by crop size, from each sample's tag (`records.size_of_tag`), sizes ascending."""
    return tuple(np.flatnonzero(tags == tag).astype(np.int32) for tag in np.unique(tags))


def _texts(
    source: Source, numbers: np.ndarray, options: DataOptions, context: PrepareContext, extra: Sequence[str]
) -> tuple[Texts | None, CaptionTable | None, str]:
    """The text states in the cache, missing ones made; each sample's captions; and words for the log."""
    distinct: dict[str, int] = {}
    places, ends = array("i"), array("q")

    def all_captions() -> Iterator[str]:
        yield from extra
        for number in numbers.tolist():
            for caption in source.identify(number, "").captions:
                places.append(distinct.setdefault(caption, len(distinct)))
                yield add_prefix(caption, options.caption_prefix)
            ends.append(len(places))

    captions, why = choose_captions(all_captions(), options, caption_bytes(context.base, options.max_tokens))
    context.log(why)
    if captions is None:
        return None, None, "captions encoded when drawn"
    texts = open_texts(context.root, context.base, context.dtype, options.max_tokens)
    keys = texts.keys(captions)
    missing = np.flatnonzero(texts.shards.find(keys) < 0)
    check_room(context.root, len(missing) * caption_bytes(context.base))
    # Shares by key, not by place in `missing`: a process that looks later finds fewer missing.
    share = [captions[place] for place in missing if int(keys[place, 0]) % context.world == context.rank]
    if share:
        build_texts(share, texts, context)
    wait_for(lambda: int((texts.shards.find(keys) < 0).sum()), texts.shards, context.timeout)
    for line in warn_of_long(texts, captions):
        context.log(line)
    table = CaptionTable(tuple(distinct), np.array(places, np.int32), np.array(ends, np.int64))
    return texts, table, f"{len(captions)} captions ({len(missing)} new)"
