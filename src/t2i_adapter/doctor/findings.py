"""Turns the measurements of a scan into findings: what is wrong, in which rows, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from PIL import Image

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.picture import narrow_range
from t2i_adapter.doctor.content import BLACK_ON_WHITE, CONTENTS, WHITE_ON_BLACK
from t2i_adapter.doctor.duplicates import confirm_pairs, equal_groups, near_pairs
from t2i_adapter.doctor.offset import SURE_MARGIN
from t2i_adapter.doctor.scan import Scan

TINY = 0.5
"""A picture is tiny if its shorter side is below this share of the resolution: it would be enlarged more than twice."""

MAX_COLOURED_SHARE = 0.1
"""Coloured conditions are a finding if they are at most this share of the dataset's conditions."""

DATASET_OFFSET = 1.0
"""Pixels from which the median offset of the dataset is a finding."""

ROW_OFFSET = 2.0
"""Pixels from the median from which a row's offset is a finding; at least one pixel of the scale it was found at."""

MIN_SURE_ROWS = 5
"""Rows with a sure offset that a statement on the dataset's offset needs."""

MIN_AGREEING = 0.5
"""Share of the sure rows that must lie about one pixel from the median; below it, the conditions' edges are not those
of the images, and offsets mean nothing."""

MAX_NEAR_PAIRS = 1000
"""Pairs with similar perceptual hashes that are opened and compared, about."""


@dataclass(frozen=True)
class FindingKind:
    """Describes one kind of finding. `skip`: its rows are better skipped in training."""

    level: Literal["error", "warning"]
    what: str
    advice: str
    skip: bool


FINDING_KINDS: Mapping[str, FindingKind] = {
    "row": FindingKind("error", "a row of the table cannot be read", "fix the line or skip the row", True),
    "missing": FindingKind("error", "a picture is missing", "add the file, fix its path or skip the row", True),
    "empty": FindingKind("error", "a picture's file is empty", "write it again or skip the row", True),
    "unreadable": FindingKind("error", "a picture cannot be read", "write it again or skip the row", True),
    "heif": FindingKind(
        "error",
        "a HEIC or HEIF picture cannot be read without an extra",
        "pip install 'sdxl-t2i-adapter[heif]', or save it as JPEG or PNG",
        True,
    ),
    "huge": FindingKind("error", "a picture has too many pixels to decode", "scale it down or skip the row", True),
    "caption": FindingKind("error", "a caption is missing", 'add one ("" is allowed) or skip the row', True),
    "aspect": FindingKind(
        "error", "the condition and its image differ in aspect ratio", "make it again at its image's size", True
    ),
    "offset": FindingKind(
        "error", "the conditions are shifted against their images", "make them again from these images", False
    ),
    "offset_row": FindingKind("warning", "the condition is shifted against its image", "make it again", True),
    "polarity": FindingKind("warning", "black and white are inverted compared with most rows", "invert it", True),
    "constant": FindingKind("warning", "the condition is one flat colour and controls nothing", "make it again", True),
    "transparent": FindingKind(
        "warning",
        "the condition is one flat colour because its transparent pixels become the background colour",
        "choose another --data.background, such as black for white lines, or save it without transparency",
        True,
    ),
    "range": FindingKind(
        "warning",
        "conditions of 16 bits use little of their range, so most of their detail is lost",
        "scale them, all by the same numbers",
        False,
    ),
    "colours": FindingKind(
        "warning", "an image's colours may be off", "save it again as sRGB, or with the right colour profile", False
    ),
    "coloured": FindingKind(
        "warning", "a coloured condition in a dataset of grey ones", "check that it is the right kind of map", True
    ),
    "duplicate": FindingKind(
        "warning", "the same picture as in an earlier row", "skip it, or keep it on purpose", True
    ),
    "near_duplicate": FindingKind("warning", "an earlier row's picture, saved again", "skip it, or keep it", True),
    "tiny": FindingKind(
        "warning", "the image is less than half the resolution", "find a larger one or lower the resolution", False
    ),
    "tiny_condition": FindingKind(
        "warning", "the condition is less than half the resolution", "make a larger one", False
    ),
    "long_caption": FindingKind(
        "warning",
        "a caption has more tokens than --data.max_tokens; the model does not see the rest",
        "shorten it, or raise --data.max_tokens",
        False,
    ),
    "empty_caption": FindingKind("warning", "an empty caption", "write one, or keep it on purpose", False),
}
"""Every kind of finding, in the order of the report. The first eight are also kinds of `UserError` (`BadRow.kind`)."""


@dataclass(frozen=True)
class Finding:
    """What is wrong and where: row number -> reason, ascending. A finding on the whole dataset has `whole` instead."""

    kind: str
    reasons: Mapping[int, str] = field(default_factory=dict)
    whole: str = ""

    @property
    def about(self) -> FindingKind:
        return FINDING_KINDS[self.kind]


def find(scan: Scan, data: DataOptions, open_image: Callable[[int], Image.Image]) -> list[Finding]:
    """Returns all findings, in the order of FINDING_KINDS. open_image: number of a readable row -> its image."""
    found = [
        *_bad_rows(scan),
        *_offsets(scan),
        *_conditions(scan, data.background),
        *_ranges(scan),
        *_finding("colours", scan.colours),
        *_duplicates(scan, open_image),
        *_small(scan, data.resolution),
        *_captions(scan, data.max_tokens),
    ]
    order = list(FINDING_KINDS)
    return sorted(found, key=lambda finding: order.index(finding.kind))


def skip_keys(scan: Scan, findings: Sequence[Finding]) -> list[str]:
    """Returns the keys of the rows that are better skipped, in the order of the dataset."""
    numbers = {number for finding in findings if finding.about.skip for number in finding.reasons}
    return [scan.keys[number] for number in sorted(numbers)]


def median_offset(scan: Scan) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the dataset's median offset (down, right) and the numbers of the rows it comes from; None if too few rows
    have a sure offset or they disagree."""
    sure = np.flatnonzero(scan.rows["margin"] >= SURE_MARGIN)
    if len(sure) < MIN_SURE_ROWS:
        return None
    offsets = scan.rows["offset"][sure]
    median = np.median(offsets, axis=0)
    agree = (np.abs(offsets - median).max(axis=1) <= np.maximum(1, scan.rows["scale"][sure] / 2)).mean()
    return (median, sure) if agree >= MIN_AGREEING else None


def _finding(kind: str, reasons: Mapping[int, str]) -> Iterator[Finding]:
    if reasons:
        yield Finding(kind, dict(sorted(reasons.items())))


def _bad_rows(scan: Scan) -> Iterator[Finding]:
    reasons: dict[str, dict[int, str]] = {}
    for number, bad in scan.bad.items():
        kind = bad.kind if bad.kind in FINDING_KINDS else "unreadable"
        reasons.setdefault(kind, {})[number] = bad.reason
    for kind in reasons:
        yield from _finding(kind, reasons[kind])


def _offsets(scan: Scan) -> Iterator[Finding]:
    found = median_offset(scan)
    if found is None:
        return
    median, sure = found
    if np.abs(median).max() >= DATASET_OFFSET:
        yield Finding("offset", whole=f"{_describe(median)} of their images: the median of {len(sure)} rows")
    deviation = scan.rows["offset"][sure] - median
    rows = sure[np.abs(deviation).max(axis=1) >= np.maximum(ROW_OFFSET, scan.rows["scale"][sure])]
    yield from _finding("offset_row", {int(n): _describe(scan.rows["offset"][n]) for n in rows})


def _describe(offset: np.ndarray) -> str:
    """Formats (down, right) as "3 px right, 1 px above"."""
    down, right = (round(float(value)) for value in offset)
    parts = [f"{abs(right)} px {'right' if right > 0 else 'left'}"] if right else []
    parts += [f"{abs(down)} px {'below' if down > 0 else 'above'}"] if down else []
    return ", ".join(parts) or "0 px"


def _conditions(scan: Scan, background: str) -> Iterator[Finding]:
    rows = scan.rows
    is_flat = rows["content"] == CONTENTS.index("constant")
    flat, transparent = (np.flatnonzero(is_flat & (rows["is_transparent"] == value)) for value in (False, True))
    yield from _finding("constant", dict.fromkeys(flat.tolist(), "one flat colour"))
    yield from _finding("transparent", dict.fromkeys(transparent.tolist(), f"over --data.background {background}"))
    coloured = np.flatnonzero(rows["content"] == CONTENTS.index("colour"))
    if len(coloured) <= MAX_COLOURED_SHARE * np.count_nonzero(rows["content"]):
        yield from _finding("coloured", dict.fromkeys(coloured.tolist(), "has colours"))
    white, black = (np.flatnonzero(rows["polarity"] == value) for value in (WHITE_ON_BLACK, BLACK_ON_WHITE))
    fewer, reason = (black, "black on white") if len(black) <= len(white) else (white, "white on black")
    yield from _finding("polarity", dict.fromkeys(fewer.tolist(), reason))


def _ranges(scan: Scan) -> Iterator[Finding]:
    """All conditions of 16 bits together: a single map of a near scene may use little of the dataset's range."""
    levels = scan.rows["levels"][scan.rows["levels"][:, 1] > 0]
    text = narrow_range(int(levels[:, 0].min()), int(levels[:, 1].max())) if len(levels) else ""
    if text:
        yield Finding("range", whole=f"{len(levels)} of {len(scan.rows)} rows: {text}")


def _duplicates(scan: Scan, open_image: Callable[[int], Image.Image]) -> Iterator[Finding]:
    readable = np.flatnonzero(scan.rows["is_read"])
    same = {
        int(readable[place]): f"the picture of {scan.keys[readable[group[0]]]}"
        for group in equal_groups(scan.rows["pixel_hash"][readable])
        for place in group[1:]
    }
    yield from _finding("duplicate", same)
    single = np.array([number for number in readable if int(number) not in same], int)
    hashes = scan.rows["perceptual_hash"][single]
    pairs = [(int(single[a]), int(single[b])) for a, b in near_pairs(hashes, MAX_NEAR_PAIRS)]
    near: dict[int, str] = {}
    for first, second in confirm_pairs(pairs, open_image):
        near.setdefault(second, f"the picture of {scan.keys[first]}, saved again")
    yield from _finding("near_duplicate", near)


def _small(scan: Scan, resolution: int) -> Iterator[Finding]:
    for kind, column in (("tiny", "size"), ("tiny_condition", "condition_size")):
        sizes = scan.rows[column]
        shorter = sizes.min(axis=1)
        rows = np.flatnonzero((shorter > 0) & (shorter < TINY * resolution))
        yield from _finding(kind, {int(n): f"{sizes[n][1]}x{sizes[n][0]} pixels" for n in rows})


def _captions(scan: Scan, max_tokens: int) -> Iterator[Finding]:
    tokens = scan.rows["tokens"]
    long = np.flatnonzero(tokens > max_tokens)
    yield from _finding("long_caption", {int(n): f"{tokens[n]} tokens" for n in long})
    empty = np.flatnonzero(scan.rows["has_empty_caption"])
    yield from _finding("empty_caption", dict.fromkeys(empty.tolist(), "an empty caption"))
