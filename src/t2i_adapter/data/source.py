"""`Source`: a dataset as samples by number. Rows are chosen, pictures decoded, and errors name the row.

`open_source` opens the dataset that the options name, in any layout.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL.Image import Image

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.formats import open_layout
from t2i_adapter.data.geometry import aspect_gap
from t2i_adapter.data.joined import JoinedRows, Part, open_joined
from t2i_adapter.data.names import split_ending
from t2i_adapter.data.picture import color, decode
from t2i_adapter.data.rows import Row, Rows
from t2i_adapter.errors import UserError
from t2i_adapter.files import user_path
from t2i_adapter.types import Sample

_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write them, UTF-8 cannot
_LINE = re.compile(r" \((line|object) \d+\)$")
MAX_ASPECT_GAP = 1.0  # pixels: what rounding a size makes
MAX_ROWS = 2**31 - 1
"""Row numbers are held as int32, which halves the memory that a run needs for each row."""


@dataclass(frozen=True)
class Identity:
    """A row's fields that need no decoded picture; as in `Sample`."""

    captions: tuple[str, ...]
    digest: str


class Source:
    """Training pairs by number. A call reads the row again, and its result depends on the number alone.

    Attributes:
        shards: number of pairs of each stored shard, in order; they sum to the number of pairs. Reading shard by shard
            is cheap. A source that reads equally fast in any order has one.
        annotate: the annotator that makes the conditions, in which case `Sample.condition` is None; None if the data
            has condition pictures.
        captions_are_remote: whether reading captions may download the pictures too.
        parts: the conditions of each pair if there are several; () if there is one.
    """

    def __init__(
        self,
        rows: Rows,
        numbers: Sequence[int] | np.ndarray,
        *,
        background: tuple[int, int, int],
        what: str,
        captions: str = "auto",
    ) -> None:
        """`numbers`: the rows to use, ascending. `what`: the layout, for `describe`. `captions`: as in the options."""
        self._rows, self._numbers, self._background, self._what = rows, numbers, background, what
        self._captions = captions
        self.annotate, self.captions_are_remote = rows.annotate, rows.captions_are_remote
        self.parts: tuple[Part, ...] = rows.parts if isinstance(rows, JoinedRows) else ()
        self.shards = shards_of(rows.shards, numbers)

    def subset(self, indices: np.ndarray) -> Source:
        """The pairs `indices`, ascending, as a source of their own."""
        # All rows, as a range, would become an array of 8 bytes a row.
        numbers = indices if isinstance(self._numbers, range) else np.asarray(self._numbers)[indices]
        return Source(self._rows, numbers, background=self._background, what=self._what, captions=self._captions)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Sample:
        """The pair, decoded and checked. Raises UserError that names the row or file."""
        number = int(self._numbers[index])
        row = self._rows.row(number)
        image = decode(row.image, self._background, is_photo=True)
        conditions = [stored and decode(stored, self._background) for stored in (row.condition, *row.others)]
        for condition in filter(None, conditions):
            self._check_aspect(number, image, condition)
        first, *others = conditions
        captions = self._texts(number, row.captions)
        return Sample(self._rows.key(number), image, first, captions, hash_row(row), row.meta, tuple(others))

    def key(self, index: int) -> str:
        """The pair's name, as in `Sample.key`; a row that cannot be read has one too. May read a line of a table, so
        ask for it when a message needs it."""
        return self._rows.key(int(self._numbers[index]))

    def identify(self, index: int, digest: str | None = None) -> Identity:
        """The pair's captions and content hash; decodes no picture. Raises UserError.

        Reads the stored bytes to hash them. If `digest` is known, pass it, and no picture is read.
        """
        number = int(self._numbers[index])
        if digest is not None:
            stored = None if self._captions in ("none", "filename") else self._rows.captions(number)
            return Identity(self._texts(number, stored), digest)
        row = self._rows.row(number)
        return Identity(self._texts(number, row.captions), hash_row(row))

    def write_captions(self, index: int, captions: tuple[str, ...], was: tuple[str, ...]) -> None:
        """Stores other captions of a pair, which had `was`. The dataset must be opened again afterwards.

        Raises UserError: of kind "changed" if the pair has other captions by now, of kind "read_only" if its layout
        does not allow it.
        """
        number = int(self._numbers[index])
        present = self.identify(index, "").captions
        if present != was:
            text = f"{self.key(index)}: the caption was changed meanwhile; it is {present[0]!r} now."
            raise UserError(text, kind="changed")
        if not captions or any(not isinstance(one, str) for one in captions):
            raise UserError(f"{self.key(index)}: a pair needs one caption or more.", kind="caption")
        self._rows.write_captions(number, captions)

    def files(self, index: int) -> tuple[str | None, str | None]:
        """Local paths of the pair's image and condition; None for one that is no file of its own. Raises UserError."""
        row = self._rows.row(int(self._numbers[index]))
        names = row.image.name, row.condition.name if row.condition else ""
        image, condition = (name if os.path.isfile(name) else None for name in names)  # noqa: PTH113 - any text
        return image, condition

    def stamp(self, index: int) -> str | None:
        """A text that changes when the pair's stored bytes change, found without reading them; None if unknown."""
        return self._rows.stamp(int(self._numbers[index]))

    def local_files(self, index: int) -> list[str]:
        """Paths of the local files that the pair is read from, links not resolved; of a shard none."""
        return self._rows.local_files(int(self._numbers[index]))

    def caption_files(self, index: int) -> list[str]:
        """Those of `local_files` that the pair's captions are read from."""
        return self._rows.caption_files(int(self._numbers[index]))

    def describe(self) -> str:
        """Lines for the plan: how many pairs, from which place, in which layout; then the layout's notes."""
        of = f" of {len(self._rows)}" if len(self) < len(self._rows) else ""
        captions = {"none": ", without captions", "filename": ", captions from the files' names"}.get(
            self._captions, ""
        )
        line = f"{len(self)}{of} pairs from {self._rows.place}, read as {self._what}{captions}"
        return "\n".join([line, *(f"  {note}" for note in self._rows.notes)])

    def _texts(self, number: int, captions: Any) -> tuple[str, ...]:
        if self._captions == "none":
            return ("",)
        if self._captions == "filename":
            return (caption_of(self._rows.file_name(number) or ""),)
        check_caption(captions, self._rows.caption_cell(number))
        return (captions,) if isinstance(captions, str) else tuple(captions)

    def _check_aspect(self, number: int, image: Image, condition: Image) -> None:
        if aspect_gap((image.height, image.width), (condition.height, condition.width)) > MAX_ASPECT_GAP:
            raise UserError(
                f"{self._rows.where(number)} ({self._rows.key(number)}): the condition is "
                f"{condition.width}x{condition.height} and its image {image.width}x{image.height}: another aspect, so "
                "they do not align. Make the condition at its image's size, or at a multiple of it.",
                kind="aspect",
            )


def open_source(options: DataOptions, seed: int, parts: Sequence[Part] = ()) -> Source:
    """Opens the dataset that the options name; `seed` chooses the rows if max_train_samples is set.

    parts: the conditions of each pair if there are several; otherwise the options name the only one.

    Checks the dataset as a whole; a row is checked when it is read. Raises UserError.
    """
    background = color(options.background)
    rows, what = open_joined(options, parts, open_layout) if parts else open_layout(options)
    if len(rows) > MAX_ROWS:
        raise UserError(
            f"{rows.place}: has {len(rows):,} rows; at most {MAX_ROWS:,} are supported. Name some of its shards, or "
            "divide it into datasets that you train on one after another.",
            option="data.location",
        )
    if options.captions == "filename" and rows.file_name(0) is None:
        text = "filename: the pictures of this dataset have no file names; allowed here are auto and none."
        raise UserError(text, option="data.captions")
    numbers, skipped = skip_rows(rows, options.skip)
    numbers = choose(numbers, options.max_train_samples, seed)
    if not len(numbers):
        raise UserError(f"{options.skip}: skips all {len(rows)} rows of {rows.place}.", option="data.skip")
    return Source(rows, numbers, background=background, what=what + skipped, captions=options.captions)


def caption_of(file_name: str) -> str:
    """The caption that a picture's file name makes: without its ending, underscores as spaces."""
    return " ".join(split_ending(file_name)[0].replace("_", " ").split())


def skip_rows(rows: Rows, skip: str | None) -> tuple[Sequence[int] | np.ndarray, str]:
    """Numbers of the rows whose keys the file `skip` does not list, ascending; and a text about the skipped rows.

    A key with a line number, "a.png (line 3)", may also be listed without it. Raises UserError if the file cannot be
    read.
    """
    if skip is None:
        return range(len(rows)), ""
    try:
        text = user_path(skip).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as fault:
        reason = getattr(fault, "strerror", None) or fault
        message = f"{skip}: cannot be read ({reason}). It holds keys of rows, one a line."
        raise UserError(message, option="data.skip") from fault
    listed = {line.strip() for line in text.splitlines() if line.strip()}
    is_used, found = np.ones(len(rows), bool), set[str]()
    for number in range(len(rows)):
        key = rows.key(number)
        matches = listed & {key, _LINE.sub("", key)}
        found |= matches
        is_used[number] = not matches
    words = f"; {skip} skips {np.count_nonzero(~is_used)} rows"
    if listed - found:
        words += f" and lists {len(listed - found)} keys that no row has, such as {min(listed - found)!r}"
    return np.flatnonzero(is_used), words


def choose(numbers: Sequence[int] | np.ndarray, most: int | None, seed: int) -> Sequence[int] | np.ndarray:
    """All of the ascending `numbers`, or `most` of them chosen by the seed, ascending."""
    if most is None or most >= len(numbers):
        return numbers
    chosen = np.sort(np.random.default_rng(seed).choice(len(numbers), most, replace=False))
    return chosen if isinstance(numbers, range) else np.asarray(numbers)[chosen]


def shards_of(stored: tuple[int, ...], numbers: Sequence[int] | np.ndarray) -> tuple[int, ...]:
    """How many of the ascending `numbers` lie in each stored shard; shards without any are left out."""
    if isinstance(numbers, range):
        return stored
    # The same dtype on both sides: otherwise `searchsorted` copies the numbers.
    ends = np.searchsorted(numbers, np.cumsum(stored).astype(np.asarray(numbers).dtype))
    return tuple(int(count) for count in np.diff(ends, prepend=0) if count)


def check_caption(value: Any, cell: str) -> None:
    """Raises UserError unless `value` is a string, which may be empty, or a list of at least one string."""
    texts = value if isinstance(value, list | tuple) else [value]
    if not texts:
        raise UserError(f'{cell}: an empty list; write at least one caption ("" is allowed).', kind="caption")
    for text in texts:
        if text is None:
            raise UserError(f'{cell}: there is no caption. Add one ("" is allowed) or skip the row.', kind="caption")
        if not isinstance(text, str):
            words = f"{cell}: holds {type(text).__name__}; a caption is a string or a list of strings."
            raise UserError(words, kind="caption")
        if _SURROGATE.search(text):
            raise UserError(f"{cell}: holds half a letter (a lone surrogate), which is not text.", kind="caption")


def hash_row(row: Row) -> str:
    """sha256 (hex) of the stored bytes of all pictures."""
    whole = hashlib.sha256(len(row.image.data).to_bytes(8, "little"))
    whole.update(row.image.data)
    if row.condition:
        whole.update(row.condition.data)
    for stored in row.others:
        data = stored.data if stored else b""
        whole.update(len(data).to_bytes(8, "little"))
        whole.update(data)
    return whole.hexdigest()
