"""One row, read and measured: numbers of fixed size for a table, and words only where something is wrong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from t2i_adapter.cache.records import pack_image, stored_bytes
from t2i_adapter.data.bad_rows import BadRow
from t2i_adapter.data.pair import CroppedPair, PairTransform
from t2i_adapter.data.source import Source
from t2i_adapter.doctor.alike import look, pixels_hash
from t2i_adapter.doctor.content import content, polarity
from t2i_adapter.doctor.offset import find_offset
from t2i_adapter.errors import UserError
from t2i_adapter.types import Sample

ROW = np.dtype(
    [
        ("is_read", "?"),
        ("size", "<i4", 2),  # of the image, (height, width)
        ("condition_size", "<i4", 2),  # (0, 0) where the row has no condition picture of its own
        ("digest", "<u8"),  # head of the pair's
        ("pixels", "<u8"),
        ("look", "<u8"),
        ("content", "u1"),
        ("polarity", "i1"),
        ("offset", "<f4", 2),  # (down, right)
        ("margin", "<f4"),  # of the offset; 0 where none was found
        ("scale", "u1"),  # of the offset
        ("bytes", "<u8"),  # that the cache takes, all views together
        ("tokens", "<i4"),  # of the longest caption
        ("is_mute", "?"),  # a caption of it says nothing
    ]
)
"""What is kept of each row; a million take 69 MB. The captions' part is filled in by who has the tokenizer."""


@dataclass(frozen=True)
class Fault:
    """Why a row cannot be used: a kind of `findings.KINDS`, and the reason in words."""

    kind: str
    reason: str


@dataclass(frozen=True)
class Chunk:
    """What a worker tells of some rows, in their order.

    Attributes:
        start: number of the first.
        rows: (n,) of ROW.
        keys: (n,); each names its row.
        captions: (n,); what each is told, none where it cannot be read.
        faults: number -> why it cannot be used.
    """

    start: int
    rows: np.ndarray
    keys: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    faults: dict[int, Fault]


@dataclass(frozen=True)
class Examiner:
    """Reads rows and measures them, cut as training would. It goes to worker processes."""

    source: Source
    stage: PairTransform

    def examine(self, numbers: range) -> Chunk:
        """Reads the rows of a range. Where one is at fault that is told, and the next one read."""
        rows = np.zeros(len(numbers), ROW)
        keys: list[str] = []
        captions: list[tuple[str, ...]] = []
        faults: dict[int, Fault] = {}
        for row, number in zip(rows, numbers, strict=True):
            try:
                sample = self.source[number]
                self._measure(sample, row)
            except UserError as fault:
                bad = BadRow.of(self.source, number, fault)
                faults[number] = Fault(kind_of(bad.reason), bad.reason)
                keys.append(bad.key)
                captions.append(())
            else:
                keys.append(sample.key)
                captions.append(sample.captions)
        return Chunk(numbers.start, rows, tuple(keys), tuple(captions), faults)

    def _measure(self, sample: Sample, row: np.void) -> None:
        """Fills in a row of ROW. Raises UserError where the pair cannot be cut."""
        cuts = [self.stage.crop(sample, view) for view in range(self.stage.framing.count)]
        row["size"] = sample.image.height, sample.image.width
        row["digest"] = int(sample.digest[:16], 16)
        row["pixels"], row["look"] = pixels_hash(sample.image), look(sample.image)
        row["bytes"] = sum(map(record_bytes, cuts))
        if sample.condition is not None and self.stage.annotator is None:
            _measure_condition(np.asarray(sample.condition.convert("RGB")), cuts[0], row)
        row["is_read"] = True


def _measure_condition(picture: np.ndarray, cut: CroppedPair, row: np.void) -> None:
    """picture (H,W,3) u8, the condition as it is stored."""
    row["condition_size"] = picture.shape[:2]
    row["content"], row["polarity"] = content(picture), polarity(picture)
    offset = find_offset(cut.image, cut.condition)
    if offset is not None:
        row["offset"] = offset.down, offset.right
        row["margin"], row["scale"] = offset.margin, offset.scale


def record_bytes(cut: CroppedPair) -> int:
    """What the cache keeps of one view, its entry in the index included."""
    height, width = cut.geometry.target
    moments = np.zeros((8, height // 8, width // 8), np.float16)
    return stored_bytes(pack_image(moments, cut.condition, cut.geometry, name=cut.key))


_WORDS = (
    ("file is empty", "empty"),
    ("pixels; at most", "huge"),
    ("pixels; a side has at most", "huge"),
    ("too large to decode", "huge"),
    ("another aspect", "aspect"),
    ("no caption", "caption"),
    ("give at least one caption", "caption"),
    ("a caption is", "caption"),
    ("there is no picture", "missing"),
    ("no such file", "missing"),
    ("leaves the data folder", "missing"),
    ("is an address", "missing"),
    ("no condition picture", "missing"),
    ("has no condition", "missing"),
    ("no member ends in", "missing"),
    ("not JSON", "row"),
    ("each line is one object", "row"),
)
"""What a reason says -> the kind of fault: sources tell people why, and this sorts it."""


def kind_of(reason: str) -> str:
    """The kind of fault that a source's message tells of; "unreadable" where it says none of the known."""
    return next((kind for words, kind in _WORDS if words in reason), "unreadable")
