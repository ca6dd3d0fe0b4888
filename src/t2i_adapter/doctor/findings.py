"""From what was read to what is wrong: one finding a kind, with its rows, its reason for each and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from PIL import Image

from t2i_adapter.doctor.alike import confirmed, equal_groups, near_pairs
from t2i_adapter.doctor.content import BLACK_ON_WHITE, CONTENTS, WHITE_ON_BLACK
from t2i_adapter.doctor.offset import SURE
from t2i_adapter.doctor.scan import Scan
from t2i_adapter.types import TOKENS

TINY = 0.5
"""Share of the resolution below which a picture's shorter side is tiny: it would be scaled up to twice its size."""

STRAY = 0.1
"""Coloured conditions are out of place where they are at most this share of a set of grey ones."""

OFFSET = 1.0
"""Pixels that the median offset of a set may reach before it is one."""

OFFSET_ROW = 2.0
"""Pixels from the set's median from which on a row stands out; where it was told at a smaller scale, a pixel of that at
least."""

FEWEST = 5
"""Rows whose offset must be sure before anything is said of the set's."""

AGREEING = 0.5
"""Share of the sure rows that must lie about a pixel from the median at most; else their edges are not the image's."""

MAX_LOOKS = 1000
"""Pairs of pictures that look alike and are opened to be compared, about as many at most."""


@dataclass(frozen=True)
class Kind:
    """A kind of finding. `skip`: its rows are better left out of training."""

    level: Literal["error", "warning"]
    what: str
    advice: str
    skip: bool


KINDS: Mapping[str, Kind] = {
    "row": Kind("error", "a row of the table cannot be read", "mend the line, or leave the row out", True),
    "missing": Kind("error", "a picture is not there", "add the file, mend its path, or leave the row out", True),
    "empty": Kind("error", "a picture's file is empty", "write it again, or leave the row out", True),
    "unreadable": Kind("error", "a picture cannot be read", "write it again, or leave the row out", True),
    "huge": Kind("error", "a picture has more pixels than are decoded", "scale it down, or leave the row out", True),
    "caption": Kind("error", "there is no caption", 'add one ("" is allowed), or leave the row out', True),
    "aspect": Kind(
        "error", "the condition has another aspect than its image", "make it at its image's size again", True
    ),
    "offset": Kind(
        "error", "the conditions lie beside their images", "make them again from these very images, uncropped", False
    ),
    "offset_row": Kind("warning", "the condition lies beside its image", "make it from this very image", True),
    "polarity": Kind("warning", "lines in the reverse of the other rows' black and white", "invert it", True),
    "constant": Kind("warning", "the condition is one flat colour and controls nothing", "make it again", True),
    "coloured": Kind("warning", "a coloured condition in a set of grey ones", "see if it is another kind of map", True),
    "duplicate": Kind("warning", "the same picture as in an earlier row", "leave it out, or keep it on purpose", True),
    "near_duplicate": Kind("warning", "an earlier row's picture, saved anew", "leave it out, or keep it", True),
    "tiny": Kind("warning", "the image is less than half the resolution", "find it larger, or train smaller", False),
    "tiny_condition": Kind("warning", "the condition is less than half the resolution", "make it larger", False),
    "long_caption": Kind("warning", f"a caption is over {TOKENS} tokens; the rest is not seen", "shorten it", False),
    "mute_caption": Kind("warning", "a caption says nothing", "caption it, or leave it to be unprompted", False),
}
"""In the order of telling."""


@dataclass(frozen=True)
class Finding:
    """What is wrong, and where: rows' numbers, ascending, each with its reason; none where it is the whole set."""

    kind: str
    reasons: Mapping[int, str] = field(default_factory=dict)
    whole: str = ""

    @property
    def level(self) -> str:
        return KINDS[self.kind].level


def find(scan: Scan, resolution: int, open_image: Callable[[int], Image.Image]) -> list[Finding]:
    """All findings, in the order of KINDS. `open_image` gives the image of a row that can be read."""
    found = [
        *_faults(scan),
        *_offsets(scan),
        *_conditions(scan),
        *_copies(scan, open_image),
        *_small(scan, resolution),
        *_captions(scan),
    ]
    order = list(KINDS)
    return sorted(found, key=lambda finding: order.index(finding.kind))


def skip_keys(scan: Scan, findings: list[Finding]) -> list[str]:
    """Keys of the rows that are better left out, in the data's order."""
    numbers = {number for finding in findings if KINDS[finding.kind].skip for number in finding.reasons}
    return [scan.keys[number] for number in sorted(numbers)]


def median_offset(scan: Scan) -> tuple[np.ndarray, np.ndarray] | None:
    """(down, right) of the set's median and the numbers of the rows it is told by; None where it cannot be told."""
    sure = np.flatnonzero(scan.rows["margin"] >= SURE)
    if len(sure) < FEWEST:
        return None
    offsets = scan.rows["offset"][sure]
    median = np.median(offsets, axis=0)
    agree = (np.abs(offsets - median).max(axis=1) <= np.maximum(1, scan.rows["scale"][sure] / 2)).mean()
    return (median, sure) if agree >= AGREEING else None


def _finding(kind: str, reasons: Mapping[int, str]) -> Iterator[Finding]:
    if reasons:
        yield Finding(kind, dict(sorted(reasons.items())))


def _faults(scan: Scan) -> Iterator[Finding]:
    for kind in {fault.kind for fault in scan.faults.values()}:
        yield from _finding(kind, {n: fault.reason for n, fault in scan.faults.items() if fault.kind == kind})


def _offsets(scan: Scan) -> Iterator[Finding]:
    told = median_offset(scan)
    if told is None:
        return
    median, sure = told
    if np.abs(median).max() >= OFFSET:
        yield Finding("offset", whole=f"{_words(median)} of their images: the median of {len(sure)} rows")
    aside = scan.rows["offset"][sure] - median
    rows = sure[np.abs(aside).max(axis=1) >= np.maximum(OFFSET_ROW, scan.rows["scale"][sure])]
    yield from _finding("offset_row", {int(n): _words(scan.rows["offset"][n]) for n in rows})


def _words(offset: np.ndarray) -> str:
    """ "3 px right, 1 px above"."""
    down, right = (round(float(value)) for value in offset)
    parts = [f"{abs(right)} px {'right' if right > 0 else 'left'}"] if right else []
    parts += [f"{abs(down)} px {'below' if down > 0 else 'above'}"] if down else []
    return ", ".join(parts) or "0 px"


def _conditions(scan: Scan) -> Iterator[Finding]:
    rows = scan.rows
    flat = np.flatnonzero(rows["content"] == CONTENTS.index("constant"))
    yield from _finding("constant", dict.fromkeys(flat.tolist(), "one flat colour"))
    coloured = np.flatnonzero(rows["content"] == CONTENTS.index("colour"))
    if len(coloured) <= STRAY * np.count_nonzero(rows["content"]):
        yield from _finding("coloured", dict.fromkeys(coloured.tolist(), "has colours"))
    white, black = (np.flatnonzero(rows["polarity"] == value) for value in (WHITE_ON_BLACK, BLACK_ON_WHITE))
    fewer, words = (black, "black on white") if len(black) <= len(white) else (white, "white on black")
    yield from _finding("polarity", dict.fromkeys(fewer.tolist(), words))


def _copies(scan: Scan, open_image: Callable[[int], Image.Image]) -> Iterator[Finding]:
    readable = np.flatnonzero(scan.rows["is_read"])
    same = {
        int(readable[place]): f"the picture of {scan.keys[readable[group[0]]]}"
        for group in equal_groups(scan.rows["pixels"][readable])
        for place in group[1:]
    }
    yield from _finding("duplicate", same)
    single = np.array([number for number in readable if int(number) not in same], int)
    pairs = [(int(single[a]), int(single[b])) for a, b in near_pairs(scan.rows["look"][single], MAX_LOOKS)]
    near: dict[int, str] = {}
    for first, second in confirmed(pairs, open_image):
        near.setdefault(second, f"the picture of {scan.keys[first]}, saved anew")
    yield from _finding("near_duplicate", near)


def _small(scan: Scan, resolution: int) -> Iterator[Finding]:
    for kind, column in (("tiny", "size"), ("tiny_condition", "condition_size")):
        sizes = scan.rows[column]
        shorter = sizes.min(axis=1)
        rows = np.flatnonzero((shorter > 0) & (shorter < TINY * resolution))
        yield from _finding(kind, {int(n): f"{sizes[n][1]}x{sizes[n][0]} pixels" for n in rows})


def _captions(scan: Scan) -> Iterator[Finding]:
    tokens = scan.rows["tokens"]
    long = np.flatnonzero(tokens > TOKENS)
    yield from _finding("long_caption", {int(n): f"{tokens[n]} tokens" for n in long})
    mute = np.flatnonzero(scan.rows["is_mute"])
    yield from _finding("mute_caption", dict.fromkeys(mute.tolist(), "an empty caption"))
