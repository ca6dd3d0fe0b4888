"""Training pairs by number, whatever they come from: rows chosen, pictures decoded, every fault of a row named."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL.Image import Image

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.formats import open_kind
from t2i_adapter.data.geometry import aspect_gap
from t2i_adapter.data.picture import color, decode
from t2i_adapter.data.rows import Row, Rows
from t2i_adapter.errors import UserError
from t2i_adapter.files import user_path
from t2i_adapter.types import Sample

_HALF_LETTER = re.compile("[\ud800-\udfff]")  # JSON can write them, UTF-8 cannot
MAX_ASPECT_GAP = 1.0  # pixels: what rounding a size makes


@dataclass(frozen=True)
class Identity:
    """What is known of a row before its pictures are decoded; fields as in `Sample`."""

    key: str
    captions: tuple[str, ...]
    digest: str


class Source(Protocol):
    """Training pairs by number. Every call reads afresh and depends on nothing but the number.

    Attributes:
        shards: how many pairs lie together in storage, in order; they sum to the number of pairs. Reading them in that
            order is cheap; a source where all orders are has one.
        annotate: the annotator that is to make the conditions, `Sample.condition` being None; None where the data has
            them.
    """

    @property
    def shards(self) -> tuple[int, ...]: ...

    @property
    def annotate(self) -> str | None: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """The pair, decoded and checked. Raises UserError naming the row or file."""
        ...

    def key(self, index: int) -> str:
        """Names the pair, as `Sample.key`, also where the row cannot be read."""
        ...

    def identify(self, index: int, digest: str | None = None) -> Identity:
        """The pair's key, captions and content hash. Decodes nothing; reads the stored bytes to hash them, or takes
        `digest` where it is known and reads no picture. Raises UserError."""
        ...

    def stamp(self, index: int) -> str | None:
        """What is the same for as long as the row's stored bytes are, told without reading them: each file's absolute
        path, size and time of change (a shard's, and the row in it). None where nothing tells."""
        ...

    def describe(self) -> str:
        """One line for the plan: how many pairs, from where, of what kind."""
        ...


def open_source(options: DataOptions, seed: int) -> Source:
    """Opens the data that the options name; `seed` chooses the rows where max_train_samples is set.

    What concerns all rows is checked here, a row's faults when it is read. Raises UserError.
    """
    background = color(options.background)
    rows, what = open_kind(options)
    numbers, unused = leave_out(rows, options.skip)
    numbers = choose(numbers, options.max_train_samples, seed)
    if not len(numbers):
        raise UserError(f"{options.skip}: skips all {len(rows)} rows of {rows.place}.", option="data.skip")
    return TableSource(rows, numbers, background=background, what=what + unused)


def leave_out(rows: Rows, skip: str | None) -> tuple[Sequence[int] | np.ndarray, str]:
    """Numbers of the rows whose keys the file `skip` does not list, ascending, and words for the keys that no row has.

    Raises UserError where the file cannot be read.
    """
    if skip is None:
        return range(len(rows)), ""
    try:
        text = user_path(skip).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as fault:
        reason = getattr(fault, "strerror", None) or fault
        text = f"{skip}: cannot be read ({reason}). It holds keys of rows, one a line."
        raise UserError(text, option="data.skip") from fault
    keys = {line.strip() for line in text.splitlines() if line.strip()}
    found = np.fromiter((rows.key(number) in keys for number in range(len(rows))), bool, len(rows))
    known = {rows.key(int(number)) for number in np.flatnonzero(found)}
    words = f"; {len(known)} rows are left out by {skip}"
    if keys - known:
        words += f", where {len(keys - known)} keys are of no row, such as {min(keys - known)!r}"
    return np.flatnonzero(~found), words


def choose(numbers: Sequence[int] | np.ndarray, most: int | None, seed: int) -> Sequence[int] | np.ndarray:
    """All of the ascending `numbers`, or `most` of them drawn by the seed, ascending."""
    if most is None or most >= len(numbers):
        return numbers
    chosen = np.sort(np.random.default_rng(seed).choice(len(numbers), most, replace=False))
    return chosen if isinstance(numbers, range) else np.asarray(numbers)[chosen]


class TableSource:
    """Pairs made of some rows, by number."""

    def __init__(
        self, rows: Rows, numbers: Sequence[int] | np.ndarray, *, background: tuple[int, int, int], what: str
    ) -> None:
        self._rows, self._numbers, self._background, self._what = rows, numbers, background, what
        self.annotate = rows.annotate
        self.shards = shards_of(rows.shards, numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Sample:
        number = int(self._numbers[index])
        row = self._rows.row(number)
        image = decode(row.image, self._background)
        condition = row.condition and decode(row.condition, self._background)
        if condition:
            self._check_aspect(number, image, condition)
        return Sample(
            self._rows.key(number), image, condition, self._texts(number, row.captions), hash_row(row), row.meta
        )

    def key(self, index: int) -> str:
        return self._rows.key(int(self._numbers[index]))

    def identify(self, index: int, digest: str | None = None) -> Identity:
        number = int(self._numbers[index])
        if digest is not None:
            return Identity(self._rows.key(number), self._texts(number, self._rows.captions(number)), digest)
        row = self._rows.row(number)
        return Identity(self._rows.key(number), self._texts(number, row.captions), hash_row(row))

    def stamp(self, index: int) -> str | None:
        return self._rows.stamp(int(self._numbers[index]))

    def describe(self) -> str:
        of = f" of {len(self._rows)}" if len(self) < len(self._rows) else ""
        return f"{len(self)}{of} pairs from {self._rows.place}, read as {self._what}"

    def _texts(self, number: int, captions: Any) -> tuple[str, ...]:
        check_caption(captions, self._rows.caption_cell(number))
        return (captions,) if isinstance(captions, str) else tuple(captions)

    def _check_aspect(self, number: int, image: Image, condition: Image) -> None:
        if aspect_gap((image.height, image.width), (condition.height, condition.width)) > MAX_ASPECT_GAP:
            raise UserError(
                f"{self._rows.where(number)} ({self._rows.key(number)}): the condition is "
                f"{condition.width}x{condition.height} and its image {image.width}x{image.height}: another aspect, so "
                "they would not align. Make the condition at its image's size, or at a multiple of it.",
                kind="aspect",
            )


def shards_of(stored: tuple[int, ...], numbers: Sequence[int] | np.ndarray) -> tuple[int, ...]:
    """How many of the ascending `numbers` lie in each stored shard, empty ones left out."""
    if isinstance(numbers, range):
        return stored
    ends = np.searchsorted(numbers, np.cumsum(stored))
    return tuple(int(count) for count in np.diff(ends, prepend=0) if count)


def check_caption(value: Any, cell: str) -> None:
    """A caption is a string, or a list of at least one; the empty string is allowed. Raises UserError."""
    texts = value if isinstance(value, list | tuple) else [value]
    if not texts:
        raise UserError(f'{cell}: an empty list; write at least one caption ("" is allowed).', kind="caption")
    for text in texts:
        if text is None:
            raise UserError(f'{cell}: there is no caption. Add one ("" is allowed) or skip the row.', kind="caption")
        if not isinstance(text, str):
            words = f"{cell}: holds {type(text).__name__}; a caption is a string or a list of strings."
            raise UserError(words, kind="caption")
        if _HALF_LETTER.search(text):
            raise UserError(f"{cell}: holds a lone surrogate (half a letter), which is not text.", kind="caption")


def hash_row(row: Row) -> str:
    """sha256 (hex) of both pictures' stored bytes."""
    whole = hashlib.sha256(len(row.image.data).to_bytes(8, "little"))
    whole.update(row.image.data)
    if row.condition:
        whole.update(row.condition.data)
    return whole.hexdigest()
