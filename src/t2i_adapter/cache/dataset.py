"""What batches draw from, however it is kept: on disk (`cache.prepare`) or not at all (`cache.live`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from t2i_adapter.cache.records import unpack_image
from t2i_adapter.cache.shards import Shards
from t2i_adapter.cache.texts import (
    CaptionTable,
    Texts,
)
from t2i_adapter.data.pair import PairTransform
from t2i_adapter.data.source import Source
from t2i_adapter.types import ImageRecord, TextRecord


class PairDataset(Protocol):
    """What is known of a run's samples, by number. It can be sent to loader processes.

    Attributes:
        groups: sample numbers by crop size, each an ascending integer array; all samples of a group have one size.
            Every number is in one group.
        shards: how many samples lie together in storage, in order; they sum to the number of samples.
        views: how many crops there are of each sample.
    """

    @property
    def groups(self) -> tuple[np.ndarray, ...]: ...

    @property
    def shards(self) -> tuple[int, ...]: ...

    @property
    def views(self) -> int: ...

    def __len__(self) -> int: ...

    def fetch(self, number: int, view: int, draw: str = "") -> ImageRecord:
        """One view of a sample: `moments`, or `pixels` where they are still to be encoded. What chance decides about
        its condition is a function of `draw`. Raises UserError naming the row, or the damaged file."""
        ...

    def captions(self, number: int) -> tuple[str, ...]:
        """The sample's captions, one or more. Raises UserError naming the row."""
        ...

    def text(self, caption: str) -> TextRecord | None:
        """What the text encoders made of a caption; None where it is still to be encoded. Raises UserError naming the
        damaged file."""
        ...


def prefixed(caption: str, prefix: str) -> str:
    """What the text encoders are given for a caption; the empty one stays empty."""
    return prefix + caption if caption else ""


@dataclass(frozen=True)
class LiveDataset:
    """The pairs of a source, read, cut and annotated when they are drawn (`cache.facts.PairDataset`).

    Attributes:
        numbers: (N,) which of the source's rows these are.
        groups, shards: as in `PairDataset`.
        texts: the captions that are on disk; None encodes them all as they come.
    """

    source: Source
    stage: PairTransform
    numbers: np.ndarray
    groups: tuple[np.ndarray, ...]
    shards: tuple[int, ...]
    texts: Texts | None

    @property
    def views(self) -> int:
        return self.stage.framing.count

    def __len__(self) -> int:
        return len(self.numbers)

    def fetch(self, number: int, view: int, draw: str = "") -> ImageRecord:
        """Raises UserError naming the row."""
        cut = self.stage.cut(self.source[int(self.numbers[number])], view)
        record = ImageRecord(cut.key, None, cut.condition, cut.geometry, pixels=cut.image)
        return self.stage.drawn(record, draw)

    def captions(self, number: int) -> tuple[str, ...]:
        """Raises UserError naming the row."""
        return self.source.identify(int(self.numbers[number]), "").captions

    def text(self, caption: str) -> TextRecord | None:
        """Raises UserError where its file is damaged."""
        return self.texts.get(caption) if self.texts else None


@dataclass(frozen=True)
class CachedDataset:
    """The prepared pairs of a source (`cache.facts.PairDataset`); reading is memory-mapped, and it holds arrays only.

    Attributes:
        numbers: (N,) which of the source's rows these are.
        rows: (views,N) where each view's record is in `images`.
        groups, shards: as in `PairDataset`.
        texts: the captions that are on disk; None encodes them all as they come.
        table: what each sample's captions are; None asks the source.
    """

    source: Source
    stage: PairTransform
    numbers: np.ndarray
    rows: np.ndarray
    groups: tuple[np.ndarray, ...]
    shards: tuple[int, ...]
    images: Shards
    texts: Texts | None
    table: CaptionTable | None = None

    @property
    def views(self) -> int:
        return len(self.rows)

    def __len__(self) -> int:
        return len(self.numbers)

    def fetch(self, number: int, view: int, draw: str = "") -> ImageRecord:
        """Raises UserError where the record's file is damaged."""
        key = self.source.key(int(self.numbers[number]))
        record = unpack_image(self.images.read(int(self.rows[view, number])), key)
        return self.stage.drawn(record, draw)

    def captions(self, number: int) -> tuple[str, ...]:
        """Raises UserError naming the row."""
        if self.table:
            return self.table.of(number)
        return self.source.identify(int(self.numbers[number]), "").captions

    def text(self, caption: str) -> TextRecord | None:
        """Raises UserError where its file is damaged."""
        return self.texts.get(caption) if self.texts else None
