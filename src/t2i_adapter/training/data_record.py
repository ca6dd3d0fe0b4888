"""The data record of a run: a short hash of each pair's pictures and captions, stored in every checkpoint.

A resumed run compares it with its own, so that pictures or captions that were edited in place, and rows in another
order, are found before training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from t2i_adapter.cache.dataset import CachedDataset, LiveDataset
from t2i_adapter.data.source import Source
from t2i_adapter.errors import UserError, flag
from t2i_adapter.training.checkpoint import read_state, read_tensors

MOST_HASHES = 2**20
"""Largest number of hashes of a column, 8 bytes each. If there are more pairs, a hash covers consecutive pairs."""
MOST_READ = 2**16
"""Pairs that are looked at only for the record: of more pairs, this many, in evenly spread runs."""
RUN = 16
"""Consecutive pairs of a run: they are stored together, so that a shard is opened once for all of them."""
Kind = Literal["bytes", "stamps", "texts", "runs of stamps", "runs of texts"]
"""What a column's hashes are made of: the pictures' bytes, their files' sizes and dates, the captions; of all pairs, or
of evenly spread runs."""
_TENSORS = {"pictures": "data.pictures", "captions": "data.captions"}
"""Column -> its name in a checkpoint's training.safetensors."""
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses no bit


class Column(NamedTuple):
    """hashes: (E,) uint64, in the order of the pairs."""

    kind: Kind
    hashes: np.ndarray


@dataclass(frozen=True)
class DataRecord:
    """What the pairs of a run are. A column is None if reading it would download the data."""

    pairs: int
    pictures: Column | None
    captions: Column | None

    @classmethod
    def of(cls, dataset: CachedDataset | LiveDataset) -> DataRecord:
        """Reads at most MOST_READ captions and file dates; what the cache knows costs no reading."""
        source, numbers = dataset.source, dataset.numbers
        if dataset.digests is not None:
            pictures = pictures_column(dataset.digests)
        else:
            looked_at = numbers[_looked_at(len(numbers))]
            kind = "stamps" if len(looked_at) == len(numbers) else "runs of stamps"
            pictures = Column(kind, _hashes(source.stamp(int(number)) or "" for number in looked_at))
        if isinstance(dataset, CachedDataset) and dataset.table is not None:
            table = dataset.table
            captions = Column("texts", _fold(_join(_hashes(table.distinct)[table.numbers], table.ends)))
        else:
            captions = captions_column(source, numbers[_looked_at(len(numbers))], len(numbers))
        return cls(len(dataset), pictures, captions)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON) for a checkpoint."""
        found = {name: column for name in _TENSORS if (column := getattr(self, name)) is not None}
        tensors = {_TENSORS[name]: torch.from_numpy(column.hashes.view(np.int64)) for name, column in found.items()}
        return tensors, {"pairs": self.pairs, **{name: column.kind for name, column in found.items()}}

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None) -> DataRecord | None:
        """What `pack` returned; None if the checkpoint has no record."""
        if facts is None:
            return None
        columns = {
            name: Column(facts[name], tensors[tensor].numpy().view(np.uint64)) if name in facts else None
            for name, tensor in _TENSORS.items()
        }
        return cls(facts["pairs"], **columns)

    @classmethod
    def read(cls, checkpoint: Path) -> DataRecord | None:
        """The record in a checkpoint's folder; None if an older version wrote the checkpoint."""
        tensors, state = read_tensors(checkpoint, _TENSORS.values()), read_state(checkpoint)
        return cls.unpack(tensors, state.get("data"))


def pictures_column(digests: np.ndarray) -> Column:
    """digests: (N,K) uint8 with K at least 8, of the pictures' stored bytes."""
    return Column("bytes", _fold(np.ascontiguousarray(digests[:, :8]).view("<u8")[:, 0]))


def captions_column(source: Source, numbers: np.ndarray, pairs: int) -> Column | None:
    """The captions of the rows `numbers`, those of all pairs of the run or of `_looked_at`; None if reading them would
    download the data. pairs: their number in the run."""
    if source.captions_are_remote:
        return None
    captions = [_captions(source, int(number)) for number in numbers]
    ends = np.cumsum([len(some) for some in captions])
    hashes = _join(_hashes(caption for some in captions for caption in some), ends)
    return Column("texts", _fold(hashes)) if len(numbers) == pairs else Column("runs of texts", hashes)


def _captions(source: Source, number: int) -> tuple[str, ...]:
    """A row's captions; none if they cannot be read, which ends the run when the row is drawn."""
    try:
        return source.identify(number, "").captions
    except UserError:
        return ()


def _hashes(texts: Iterable[str]) -> np.ndarray:
    """(N,) uint64, one for each text."""
    joined = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(joined, "<u8").astype(np.uint64)


def _join(hashes: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(M,) hashes of all pairs' captions, and (N,) where each pair's end -> (N,) hashes of the pairs."""
    starts = np.concatenate([[0], ends[:-1]])
    places = np.arange(len(hashes)) - np.repeat(starts, ends - starts)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(hashes * _powers(int(places.max(initial=0)) + 1)[places])])
    return sums[ends] - sums[starts]


def _powers(count: int) -> np.ndarray:
    """(count,) uint64: odd factors, so that a sum of hashes depends on their order."""
    return np.cumprod(np.full(count, _MIX))


def _looked_at(count: int) -> np.ndarray:
    """The pairs, of `count`, that are looked at: all, or MOST_READ in evenly spread runs of RUN."""
    if count <= MOST_READ:
        return np.arange(count)
    runs = MOST_READ // RUN
    starts = np.arange(runs) * (count - RUN) // (runs - 1)
    return (starts[:, None] + np.arange(RUN)).ravel()


def _span(count: int, most: int) -> int:
    """How many of `count` pairs a hash covers, if at most `most` hashes cover all."""
    return max(1, -(-count // most))


def _fold(hashes: np.ndarray) -> np.ndarray:
    """(N,) -> (E,), E at most MOST_HASHES: consecutive hashes mixed into one, which depends on their order."""
    span = _span(len(hashes), MOST_HASHES)
    if span == 1:
        return hashes
    padded = np.zeros(-(-len(hashes) // span) * span, np.uint64)
    padded[: len(hashes)] = hashes
    return (padded.reshape(-1, span) * _powers(span)).sum(axis=1, dtype=np.uint64)


# Comparison ---------------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """difference: words for what has changed, "" if nothing has; notes: lines about what is not known."""

    difference: str
    notes: list[str]


def compare(before: DataRecord | None, after: DataRecord, key: Callable[[int], str], checkpoint: str) -> Comparison:
    """Compares a checkpoint's record with that of the run that resumes from it. key: pair's number -> its name."""
    if before is None:
        return Comparison("", [f"{checkpoint} has no data record, so changed pictures or captions are not detected."])
    if before.pairs != after.pairs:
        return Comparison(f"the number of usable pairs {before.pairs:,} -> {after.pairs:,}", [])
    count, notes = after.pairs, []
    changed: dict[str, np.ndarray] = {}
    for name in _TENSORS:
        one, other = getattr(before, name), getattr(after, name)
        if one is None or other is None or one.kind != other.kind:
            notes.append(f"The {name} are not compared with those of {checkpoint}: {_reason(one, other)}.")
            continue
        places = _pairs_of(np.flatnonzero(one.hashes != other.hashes), one.kind, count)
        if one.kind not in ("stamps", "runs of stamps"):
            changed[name] = places
        elif len(places):
            notes.append(
                f"The files of {_words(len(places), count, one.kind)} have another date, size or path than at "
                f"{checkpoint}. Whether the pictures have changed is not known without a cache."
            )
    places = np.unique(np.concatenate([np.empty(0, np.int64), *changed.values()]))
    if not len(places):
        return Comparison("", notes)
    kinds = [kind for name in changed if (kind := getattr(after, name).kind)]
    parts = ", ".join(f"{name} {len(some):,}" for name, some in changed.items())
    words = f"{_words(len(places), count, *kinds)} have changed ({parts}), first {key(int(places[0]))}"
    return Comparison(words + _order_words(before, after, list(changed)), notes)


_FOLDED = ("bytes", "texts")
"""Kinds whose hashes cover all pairs, each several consecutive ones if there are many."""


def _pairs_of(places: np.ndarray, kind: Kind, count: int) -> np.ndarray:
    """The (first) pair of `count` that each of the hashes `places` is made of."""
    return places * _span(count, MOST_HASHES) if kind in _FOLDED else _looked_at(count)[places]


def _words(found: int, count: int, *kinds: Kind) -> str:
    is_exact = all(count <= (MOST_HASHES if kind in _FOLDED else MOST_READ) for kind in kinds)
    return f"{'' if is_exact else 'at least '}{found:,} of {count:,} pairs"


def _order_words(before: DataRecord, after: DataRecord, names: list[str]) -> str:
    """Words for pairs that are the same in another order."""
    old, new = ([getattr(record, name).hashes for name in names] for record in (before, after))
    if len({len(hashes) for hashes in old}) > 1 or not np.array_equal(_sorted(old), _sorted(new)):
        return ""
    return "; they are the same pairs in another order"


def _sorted(columns: list[np.ndarray]) -> np.ndarray:
    return np.stack(columns)[:, np.lexsort(columns)]


def _reason(one: Column | None, other: Column | None) -> str:
    if one is None or other is None:
        return "reading them would download the data"
    older = {"stamps", "some texts"} & {one.kind, other.kind}
    if any("runs" in kind for kind in (one.kind, other.kind)) and older:
        return "an older version chose other pairs of this many to look at"
    return "one of the two runs has a cache (--data.cache, --data.text_cache) and the other has none"


@dataclass(frozen=True)
class DataCheck:
    """Whether a run's data is that of the checkpoint that it resumes from.

    before: the checkpoint's record, None if it has none. checkpoint: its name. allowed: the data may have changed.
    """

    before: DataRecord | None
    checkpoint: str
    allowed: bool

    def check_pictures(self, source: Source, numbers: np.ndarray, digests: np.ndarray) -> None:
        """Checks the pictures of the rows `numbers` by their digests (N,32). Raises UserError if they have changed.

        The captions are read only for the message.
        """
        before = self.before
        if before is None or self.allowed:
            return
        after = DataRecord(len(numbers), pictures_column(digests), None)
        if self._compare(after, source, numbers).difference:
            if before.captions is not None:
                read = numbers if before.captions.kind == "texts" else numbers[_looked_at(len(numbers))]
                after = replace(after, captions=captions_column(source, read, len(numbers)))
            self._refuse(self._compare(after, source, numbers))

    def check(self, after: DataRecord, source: Source, numbers: np.ndarray) -> list[str]:
        """Lines about what has changed and what is not known. Raises UserError if the data has changed and may not.

        numbers: rows of the source that the pairs of `after` are.
        """
        found = self._compare(after, source, numbers)
        if not self.allowed:
            self._refuse(found)
        lines = [f"Changed since {self.checkpoint}: {found.difference}"] if found.difference else []
        return lines + found.notes

    def _compare(self, after: DataRecord, source: Source, numbers: np.ndarray) -> Comparison:
        return compare(self.before, after, lambda pair: source.key(int(numbers[pair])), self.checkpoint)

    def _refuse(self, found: Comparison) -> None:
        if found.difference:
            raise UserError(
                f"would mix two runs: {found.difference}, since {self.checkpoint}. Restore the data, name another "
                f"{flag('output_dir')}, or resume in spite of it with {flag('checkpoint.allow_changed')}.",
                option="checkpoint.resume",
            )
