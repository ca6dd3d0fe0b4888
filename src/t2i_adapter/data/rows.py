"""What a kind of data gives of itself, by number: stored bytes, captions as they stand, names for messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from t2i_adapter.data.picture import StoredPicture


@dataclass(frozen=True)
class Row:
    """One row as it is stored, nothing decoded or checked; `condition` is None where an annotator makes it."""

    image: StoredPicture
    condition: StoredPicture | None
    captions: Any
    meta: Mapping[str, Any]


class Rows(Protocol):
    """Data of one kind: what `TableSource` makes pairs of. Each call depends on the number alone, from any thread, and
    it can be sent to loader processes.

    Attributes:
        place: where the data is, for people.
        shards: how many rows lie together in storage, in order; they sum to the number of rows.
        annotate: the annotator that is to make the conditions; None where the data has them.
    """

    place: str
    shards: tuple[int, ...]
    annotate: str | None

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """Names the row, unlike any other; also one that cannot be read."""
        ...

    def where(self, index: int) -> str:
        """Names file and row in messages."""
        ...

    def caption_cell(self, index: int) -> str:
        """Names where the caption stands in messages."""
        ...

    def row(self, index: int) -> Row:
        """Raises UserError naming the row or file."""
        ...

    def captions(self, index: int) -> Any:
        """What `row` gives as captions, no picture read."""
        ...

    def stamp(self, index: int) -> str | None:
        """As `Source.stamp`."""
        ...
