"""The dataset that batches are built from: records in the cache (`CachedDataset`), or pairs read when they are drawn
(`LiveDataset`). `prepare` returns one of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from t2i_adapter.cache.records import unpack_image
from t2i_adapter.cache.shards import Shards
from t2i_adapter.cache.texts import CaptionTable, Texts
from t2i_adapter.data.pair import PairTransform
from t2i_adapter.data.source import Source
from t2i_adapter.types import ImageRecord, TextRecord


class PairDataset(Protocol):
    """Samples by number, from 0. A dataset can be pickled, so that loader processes can use it.

    Attributes:
        groups: sample numbers by crop size, each an ascending integer array. All samples of a group have one size, and
            every number is in one group.
        shards: numbers of samples that are stored together, in storage order; they sum to the number of samples.
        views: number of crops of each sample.
    """

    @property
    def groups(self) -> tuple[np.ndarray, ...]: ...

    @property
    def shards(self) -> tuple[int, ...]: ...

    @property
    def views(self) -> int: ...

    def __len__(self) -> int: ...

    def key(self, number: int) -> str:
        """Names the sample's row in messages. This may read the row."""
        ...

    def fetch(self, number: int, view: int, draw: str = "") -> ImageRecord:
        """One view of a sample, with `moments`, or with `pixels` that are still to be encoded. A random condition is a
        function of `draw`. Raises UserError that names the row or the damaged file."""
        ...

    def captions(self, number: int) -> tuple[str, ...]:
        """The sample's captions, one or more. Raises UserError that names the row."""
        ...

    def text(self, caption: str) -> TextRecord | None:
        """The states of a caption; None if they are still to be encoded. Raises UserError that names the damaged
        file."""
        ...


@dataclass(frozen=True)
class _SourceDataset:
    """What both datasets share; methods as in `PairDataset`.

    Attributes:
        numbers: (N,) rows of the source that the samples are.
        groups, shards: as in `PairDataset`.
        texts: captions whose states are in the cache; None encodes all captions when they are drawn.
        digests: (N,8) uint8, the first bytes of each sample's digest; None if its pictures were not read.
    """

    source: Source
    transform: PairTransform
    numbers: np.ndarray
    groups: tuple[np.ndarray, ...]
    shards: tuple[int, ...]
    texts: Texts | None
    digests: np.ndarray | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.numbers)

    def key(self, number: int) -> str:
        return self.source.key(int(self.numbers[number]))

    def captions(self, number: int) -> tuple[str, ...]:
        return self.source.identify(int(self.numbers[number]), "").captions

    def text(self, caption: str) -> TextRecord | None:
        return self.texts.get(caption) if self.texts else None


@dataclass(frozen=True)
class LiveDataset(_SourceDataset):
    """Pairs that are read, cropped and annotated when they are drawn."""

    @property
    def views(self) -> int:
        return self.transform.framing.count

    def fetch(self, number: int, view: int, draw: str = "") -> ImageRecord:
        pair = self.transform.crop(self.source[int(self.numbers[number])], view)
        record = ImageRecord(None, pair.condition, pair.geometry, pixels=pair.image)
        return self.transform.random_condition(record, draw)


@dataclass(frozen=True)
class CachedDataset(_SourceDataset):
    """Pairs whose records are in the cache. Records are read by memory map, and the object itself holds arrays only.

    Attributes:
        rows: (views,N) row of each view's record in `images`.
        table: each sample's captions; None asks the source.
    """

    rows: np.ndarray
    images: Shards
    table: CaptionTable | None = None

    @property
    def views(self) -> int:
        return len(self.rows)

    def fetch(self, number: int, view: int, draw: str = "") -> ImageRecord:
        record = unpack_image(self.images.read(int(self.rows[view, number])))
        return self.transform.random_condition(record, draw)

    def captions(self, number: int) -> tuple[str, ...]:
        return self.table.of(number) if self.table else super().captions(number)
