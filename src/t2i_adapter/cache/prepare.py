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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from t2i_adapter.cache.context import PrepareContext, run_ahead
from t2i_adapter.cache.crew import Crew, mark_of
from t2i_adapter.cache.dataset import CachedDataset, LiveDataset
from t2i_adapter.cache.digests import read_digests
from t2i_adapter.cache.images import MissingRecord, build_images, find_missing, find_rows, is_bad
from t2i_adapter.cache.parts import describe_missing, rows_of, write_parts
from t2i_adapter.cache.records import add_prefix, caption_bytes, picture_bytes
from t2i_adapter.cache.shards import Shards
from t2i_adapter.cache.texts import CaptionTable, Texts, build_texts, choose_captions, open_texts, warn_of_long
from t2i_adapter.config.tree import DataOptions, part_of
from t2i_adapter.data.bad_rows import BadRow, BadRows, list_bad_rows
from t2i_adapter.data.notes import sweep_notes
from t2i_adapter.data.pair import PairTransform
from t2i_adapter.data.source import Source, shards_of
from t2i_adapter.errors import UserError
from t2i_adapter.files import show_bytes

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
    """The dataset of a run, or of the part of it that the options name; its missing records are made first.

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
    whole = source
    if options.part:
        source = whole.subset(rows_of(whole.shards, part_of(options.part)))
    sweep_notes(context.root)
    with context.open_crew() as crew:
        bad = BadRows(options, len(source), crew.notes, crew.rank, crew.world)
        try:
            with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
                if options.cache == "none":
                    dataset, new = _live(pool, source, transform, bad, context)
                else:
                    dataset, new = _Images(pool, source, transform, bad, context, crew, options).prepare(whole, check)
            texts, table, captions = _texts(source, dataset.numbers, options, context, crew, extra_captions)
        finally:
            if bad_list and context.rank == 0 and bad.found:
                list_bad_rows(bad_list, [(row.key, row.reason) for _, row in sorted(bad.found.items())])
    if bad.found:
        where = f"; listed in {bad_list}" if bad_list else ""
        context.log(f"{len(bad.found)} of {len(source)} rows cannot be used and are skipped{where}")
    seconds = time.monotonic() - started
    part = f"part {options.part}, " if options.part else ""
    context.log(f"prepared: {part}{len(dataset)} pairs ({new}), {captions} in {seconds:.0f} s at {context.address}")
    return replace(dataset, texts=texts, **({"table": table} if isinstance(dataset, CachedDataset) else {}))


@dataclass(frozen=True)
class _Images:
    """Makes the image records of the pairs."""

    pool: Executor
    source: Source
    transform: PairTransform
    bad: BadRows
    context: PrepareContext
    crew: Crew
    options: DataOptions

    def prepare(
        self, whole: Source, check: Callable[[Source, np.ndarray, np.ndarray], None] | None
    ) -> tuple[CachedDataset, str]:
        """The pairs with all their image records in the cache; and how many pairs are new, in words.

        whole: the dataset that `source` may be a part of.
        """
        source, context, views = self.source, self.context, self.transform.framing.count
        about = {"base": context.base.name, **self.transform.about()}
        images = context.open_shards("images", self.transform.fingerprint(context.base.vae_fingerprint), about)
        if self.options.part and context.rank == 0:
            write_parts(images, part_of(self.options.part).parts, len(whole))
        numbers, digests = read_digests(self.pool, source, context, self.bad, self.crew)
        if check:
            check(source, numbers, digests)
        images.refresh()  # other processes have added records while the pictures were read
        rows = find_rows(images, digests, views)
        missing = find_missing(rows, numbers, digests)
        if missing:
            if not self.options.part:
                self._report(images, about, missing, len(numbers))
            places = np.flatnonzero((rows < 0).any(axis=0))
            self._make(images, missing, numbers[places], digests[places], f"images-{mark_of(digests)}")
            lost = is_bad(digests, numbers, self.bad)
            for number in numbers[lost].tolist():
                fault = UserError("has the same pictures as another row, which is bad.")
                self.bad.add(BadRow.of(source, number, fault))
            numbers, digests = numbers[~lost], digests[~lost]
        rows = find_rows(images, digests, views)
        _check_any(numbers, source)
        if context.mirror and len(source.shards) == 1 and images.stored_bytes > context.mirror.store.limit:
            context.log(
                f"warning: the cache holds {show_bytes(images.stored_bytes)} at {context.address}, and "
                f"{show_bytes(context.mirror.store.limit)} may be copied (--data.local_gb). Pairs of a dataset without "
                "shards are drawn in any order, so most draws download a shard again."
            )
        groups, shards = groups_of(images.tags[rows[0]]), shards_of(source.shards, numbers)
        heads = digests[:, :HEAD_BYTES].copy()
        images.forget_keys()
        dataset = CachedDataset(source, self.transform, numbers, groups, shards, None, rows, images, digests=heads)
        return dataset, f"{len(missing)} new"

    def _report(self, images: Shards, about: dict[str, Any], missing: list[MissingRecord], total: int) -> None:
        """Logs which parts are missing. Raises UserError if nothing may be encoded."""
        numbers = np.array([one.number for one in missing])
        words = describe_missing(images, self.source.shards, numbers, about)
        if self.options.on_missing == "fail":
            raise UserError(
                f"fail: {len(missing):,} of {total:,} pictures have no record at {self.context.address}"
                f"{', ' * bool(words)}{words or '; run `t2i-adapter prepare` with the options of the training'}.",
                option="data.on_missing",
            )
        if words:
            self.context.log(f"pictures: {len(missing):,} of {total:,} have no record, {words}")

    def _make(
        self, images: Shards, missing: list[MissingRecord], numbers: np.ndarray, digests: np.ndarray, stage: str
    ) -> None:
        """Returns when all records exist but those of bad rows, whichever process makes them.

        numbers, digests: of all rows without records, of which `missing` has one of each digest.
        """
        source, context, crew, views = self.source, self.context, self.crew, self.transform.framing.count
        crops = sum(len(one.views) for one in missing)
        context.check_room(crops * picture_bytes(self.transform.framing.resolution))

        def make(some: Iterator[MissingRecord]) -> None:
            build_images(self.pool, source, some, self.transform, context, self.bad, images, crops=crops)

        def unit_of(one: MissingRecord) -> int:
            return one.number * crew.units // len(source)

        def find_left() -> list[MissingRecord]:
            nonlocal numbers, digests
            self.bad.exchange()
            images.refresh()
            good = ~is_bad(digests, numbers, self.bad)
            rows = find_rows(images, digests[good], views)
            left = (rows < 0).any(axis=0)
            numbers, digests = numbers[good][left], digests[good][left]
            return find_missing(rows[:, left], numbers, digests)

        make(crew.share(stage, missing, unit_of, crew.units))
        crew.complete(stage, find_left, unit_of, lambda some: make(iter(some)), context.timeout, context.address)


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
    source: Source,
    numbers: np.ndarray,
    options: DataOptions,
    context: PrepareContext,
    crew: Crew,
    extra: Sequence[str],
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

    each, parts = caption_bytes(context.base, options.max_tokens), part_of(options.part).parts if options.part else 1
    captions, why = choose_captions(all_captions(), options, each, parts)
    context.log(why)
    if captions is None:
        return None, None, "captions encoded when drawn"
    texts = open_texts(context, options.max_tokens)
    keys = texts.keys(captions)

    def find_left() -> list[int]:
        texts.shards.refresh()
        return np.flatnonzero(texts.shards.find(keys) < 0).tolist()

    def unit_of(place: int) -> int:
        """By key, because a process that looks later finds fewer missing captions."""
        return int.from_bytes(keys[place, :4].tobytes(), "little") % crew.units

    def make(some: Iterable[int]) -> None:
        build_texts((captions[place] for place in some), texts, context, -(-len(missing) // crew.world))

    missing = find_left()
    if missing and options.on_missing == "fail" and not options.part:
        raise UserError(
            f"fail: {len(missing):,} of {len(captions):,} captions have no record at {context.address}; run "
            "`t2i-adapter prepare` with the options of the training.",
            option="data.on_missing",
        )
    context.check_room(len(missing) * caption_bytes(context.base))
    stage = f"texts-{mark_of(keys)}"
    make(crew.share(stage, missing, unit_of, crew.units))
    crew.complete(stage, find_left, unit_of, make, context.timeout, context.address)
    for line in warn_of_long(texts, captions):
        context.log(line)
    table = CaptionTable(tuple(distinct), np.array(places, np.int32), np.array(ends, np.int64))
    return texts, table, f"{len(captions)} captions ({len(missing)} new)"
