"""What batches draw from, however it is kept: on disk (`cache.prepare`) or not at all (`cache.live`)."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from t2i_adapter.cache.records import ImageRecord, TextRecord


class Facts(Protocol):
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
