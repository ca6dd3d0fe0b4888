"""Rows with several conditions for each picture: what `adapter.compose` trains on.

One dataset is opened once for each condition, with the options that find this condition. So every layout works, and
every condition may come from an annotator, a column or a folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from t2i_adapter.annotators.mirror import Kind
from t2i_adapter.config.tree import COLUMN, FOLDER, DataOptions
from t2i_adapter.data.generated import EmojiRows, ShapesRows
from t2i_adapter.data.paired import PairedRows
from t2i_adapter.data.rows import Row, Rows
from t2i_adapter.errors import UserError


@dataclass(frozen=True)
class Part:
    """One of the conditions of each pair.

    Attributes:
        origin: where it comes from, as an item of `data.conditions`.
        channels: 1 (grey) or 3.
        kind: what the colours of a stored condition picture mean (`DataOptions.condition_kind`).
        annotate: the annotator that makes it; None if the data has it, or if the data is not opened yet.
    """

    origin: str
    channels: int
    kind: Kind = "map"
    annotate: str | None = None

    def options(self, data: DataOptions) -> DataOptions:
        """The options that open the dataset with this condition alone."""
        common = replace(data, conditions=(), condition=None, conditioning_dir=None, condition_kind=self.kind)
        if self.origin.startswith(COLUMN):
            return replace(common, conditioning_image_column=self.origin.removeprefix(COLUMN))
        if self.origin.startswith(FOLDER):
            return replace(common, conditioning_dir=self.origin.removeprefix(FOLDER))
        return replace(common, condition=self.origin)


def open_joined(
    data: DataOptions, parts: Sequence[Part], open_layout: Callable[[DataOptions], tuple[Rows, str]]
) -> tuple[JoinedRows, str]:
    """The rows of the dataset with all of its conditions, and the name of its layout. Raises UserError."""
    opened = []
    for part in parts:
        try:
            rows, what = open_layout(part.options(data))
        except UserError as fault:
            raise fault.within(part.origin) from fault
        _check_origin(part.origin, rows, what)
        opened.append((rows, what))
    layers = [rows for rows, _ in opened]
    known = tuple(replace(part, annotate=rows.annotate) for part, rows in zip(parts, layers, strict=True))
    return JoinedRows(layers, known), opened[0][1]


def _check_origin(origin: str, rows: Rows, what: str) -> None:
    """Raises UserError if a layout cannot have conditions of this origin, which it would not notice."""
    is_folder = isinstance(rows, PairedRows)
    if origin.startswith(FOLDER) and not is_folder:
        instead = f"name a column ({COLUMN}NAME) or an annotator"
    elif origin.startswith(COLUMN) and (is_folder or isinstance(rows, ShapesRows | EmojiRows)):
        instead = f"name a folder ({FOLDER}DIR) or an annotator" if is_folder else "name one of its maps"
    else:
        return
    raise UserError(f"{origin}: {rows.place} is read as {what}, which has none; {instead}.", option="data.conditions")


class JoinedRows(Rows):
    """The rows of one dataset, opened once for each condition.

    Attributes:
        parts: the conditions in order; `row` returns the first as `condition` and the others as `others`.
    """

    def __init__(self, layers: Sequence[Rows], parts: tuple[Part, ...]) -> None:
        """layers: the same rows, each with another condition. Raises UserError if their numbers differ."""
        first, *others = layers
        self._layers, self.parts = tuple(layers), parts
        self.place, self.shards, self.annotate = first.place, first.shards, None
        self.notes = tuple(dict.fromkeys(note for rows in layers for note in rows.notes))
        self.captions_are_remote = first.captions_are_remote
        for part, rows in zip(parts[1:], others, strict=True):
            if len(rows) != len(first):
                raise UserError(
                    f"{part.origin}: {rows.place} has {len(rows)} rows with this condition and {len(first)} with "
                    f"{parts[0].origin}. Every picture needs every condition.",
                    option="data.conditions",
                )

    def key(self, index: int) -> str:
        return self._layers[0].key(index)

    def where(self, index: int) -> str:
        return self._layers[0].where(index)

    def caption_cell(self, index: int) -> str:
        return self._layers[0].caption_cell(index)

    def row(self, index: int) -> Row:
        first, *others = (rows.row(index) for rows in self._layers)
        for part, row in zip(self.parts[1:], others, strict=True):
            if row.image.data != first.image.data:
                raise UserError(
                    f"{self.where(index)}: the row with the condition {part.origin} is of another picture "
                    f"({row.image.name}). All conditions must belong to the same rows.",
                    option="data.conditions",
                )
        return replace(first, others=tuple(row.condition for row in others))

    def captions(self, index: int) -> Any:
        return self._layers[0].captions(index)

    def stamp(self, index: int) -> str | None:
        stamps = [rows.stamp(index) for rows in self._layers]
        # The digest covers all conditions, so the stamp may not be equal to that of a row with one of them.
        return None if None in stamps else "\n".join([f"{len(stamps)} conditions", *map(str, stamps)])

    def file_name(self, index: int) -> str | None:
        return self._layers[0].file_name(index)
