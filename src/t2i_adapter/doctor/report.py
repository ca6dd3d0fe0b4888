"""The doctor's report: made from a dataset (`diagnose`), printed as text and written as JSON."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.geometry import Framing
from t2i_adapter.data.pair import PairTransform
from t2i_adapter.data.profiles import quiet
from t2i_adapter.data.source import Source
from t2i_adapter.doctor.content import BLACK_ON_WHITE, CONTENTS, WHITE_ON_BLACK
from t2i_adapter.doctor.findings import Finding, find, median_offset
from t2i_adapter.doctor.needs import Measured, Needs, predict_needs, time_encoders
from t2i_adapter.doctor.scan import Examiner, Scan, scan
from t2i_adapter.files import show_bytes
from t2i_adapter.models.base import Base
from t2i_adapter.models.encoders import count_tokens

VERSION = 1
"""Version of the JSON's form."""

_NAMED_ROWS = 3
_MAX_REASON = 60  # characters


@dataclass(frozen=True)
class Report:
    """What the doctor found. `place` names the dataset; `seconds` is the time that reading took."""

    place: str
    scan: Scan
    findings: Sequence[Finding]
    needs: Needs
    framing: Framing
    seconds: float

    def count(self, level: str) -> int:
        """Number of findings of a level, "error" or "warning"."""
        return sum(finding.about.level == level for finding in self.findings)

    @property
    def verdict(self) -> str:
        """For example "2 errors, 1 warning"."""
        if not self.findings:
            return "nothing is wrong"
        counts = {level: self.count(level) for level in ("error", "warning")}
        return ", ".join(f"{n} {level}{'s' * (n > 1)}" for level, n in counts.items() if n)


def diagnose(
    source: Source, transform: PairTransform, base: Base, data: DataOptions, *, timed_rows: int, workers: int | None
) -> Report:
    """Reads every row, finds what is wrong and predicts what a run takes.

    Args:
        timed_rows: readable rows, from the first on, that are encoded to measure time and memory.
        workers: as in `scan`.
    """
    started = time.monotonic()
    count = partial(count_tokens, base.tokenizers()[0])
    scanned = scan(Examiner(source, transform), count, data.caption_prefix, workers)
    seconds = time.monotonic() - started
    with quiet():
        findings = find(scanned, data, lambda number: source[number].image)
        measured = _measure(scanned, source, transform, base, timed_rows, data.max_tokens)
    if data.captions == "none":
        findings = [finding for finding in findings if finding.kind != "empty_caption"]
    needs = predict_needs(scanned, base, data, transform.framing.count, measured)
    return Report(source.describe(), scanned, findings, needs, transform.framing, seconds)


def _measure(
    scan: Scan, source: Source, transform: PairTransform, base: Base, count: int, max_tokens: int
) -> Measured | None:
    """Encodes the first `count` readable rows."""
    numbers: Sequence[Any] = np.flatnonzero(scan.rows["is_read"])[:count].tolist()
    if not numbers:
        return None
    samples = [source[number] for number in numbers]
    crops = [transform.crop(sample, 0).image for sample in samples]
    return time_encoders(base, crops, [sample.captions[0] for sample in samples], max_tokens)


def to_json(report: Report) -> dict[str, Any]:
    """Returns plain JSON types; offsets are [down, right] and sizes [height, width], in pixels."""
    scan = report.scan
    offset = median_offset(scan)
    return {
        "version": VERSION,
        "data": report.place,
        "rows": len(scan.rows),
        "seconds": round(report.seconds, 3),
        "errors": report.count("error"),
        "warnings": report.count("warning"),
        "findings": [_finding_json(finding, scan) for finding in report.findings],
        "sizes": _sizes(scan),
        "crops": [{"height": h, "width": w, "pictures": n} for (h, w), n in crops(scan, report.framing).items()],
        "conditions": conditions(scan),
        "offset": {"median": [round(float(value), 2) for value in offset[0]], "rows": len(offset[1])}
        if offset
        else None,
        "captions": {"distinct": report.needs.captions, "most_tokens": int(scan.rows["tokens"].max(initial=0))},
        "needs": {**asdict(report.needs), "seconds": report.needs.seconds},
    }


def _finding_json(finding: Finding, scan: Scan) -> dict[str, Any]:
    kind = finding.about
    rows = [{"number": n, "key": scan.keys[n], "reason": reason} for n, reason in finding.reasons.items()]
    return {
        "kind": finding.kind,
        "level": kind.level,
        "what": kind.what,
        "whole": finding.whole,
        "advice": kind.advice,
        "skipped": kind.skip,
        "rows": rows,
    }


def to_text(report: Report) -> str:
    """Returns one screen of text: a line per finding, then the summary and the verdict."""
    rows_per_second = len(report.scan.rows) / max(report.seconds, 1e-9)
    findings = [finding_line(finding, report.scan) for finding in report.findings]
    facts = summary(report)
    width = max(map(len, facts))
    lines = [f"  {name:<{width}}  {text}" for name, text in facts.items()]
    place, *notes = report.place.splitlines()
    top = f"{place}: read in {report.seconds:.1f} s ({rows_per_second:.0f} rows/s)"
    return "\n".join([top, *notes, *findings, *lines, report.verdict])


def finding_line(finding: Finding, scan: Scan) -> str:
    """For example "error: a picture is missing: 2 rows (train/3.png, train/7.png). What to do: add the file"."""
    kind = finding.about
    if finding.whole:
        return f"{kind.level}: {kind.what}: {finding.whole}. What to do: {kind.advice}"
    named = [f"{_one_line(scan.keys[n])}{_reason(finding, n)}" for n in list(finding.reasons)[:_NAMED_ROWS]]
    named += ["..."] * (len(finding.reasons) > _NAMED_ROWS)
    count = f"{len(finding.reasons)} row{'s' * (len(finding.reasons) > 1)}"
    return f"{kind.level}: {kind.what}: {count} ({', '.join(named)}). What to do: {kind.advice}"


def summary(report: Report) -> dict[str, str]:
    """Name -> text: what the dataset holds and what a run over it takes."""
    scan, framing = report.scan, report.framing
    counted = crops(scan, framing)
    contents = [f"{name} {n}" for name, n in conditions(scan).items()]
    return {
        "images": _describe_sizes(scan),
        "crops": ", ".join(f"{w}x{h}: {n}" for (h, w), n in counted.items()) or "none",
        "conditions": ", ".join(contents) or "made from the images",
        "offset": _describe_offset(scan),
        "captions": _describe_captions(report),
        **_describe_needs(report.needs),
    }


def crops(scan: Scan, framing: Framing) -> dict[tuple[int, int], int]:
    """Returns size of a crop (height, width) -> number of pictures, most frequent first."""
    sizes = scan.rows["size"][scan.rows["is_read"]]
    distinct, counts = np.unique(sizes, axis=0, return_counts=True)
    found: Counter[tuple[int, int]] = Counter()
    for (height, width), count in zip(distinct.tolist(), counts.tolist(), strict=True):
        found[framing.target((height, width))] += count
    return dict(found.most_common())


def conditions(scan: Scan) -> dict[str, int]:
    """Returns content of a condition -> number of rows."""
    counts = {name: int((scan.rows["content"] == n).sum()) for n, name in enumerate(CONTENTS) if n}
    for name, value in (("lines white on black", WHITE_ON_BLACK), ("lines black on white", BLACK_ON_WHITE)):
        counts[name] = int((scan.rows["polarity"] == value).sum())
    return {name: count for name, count in counts.items() if count}


def _sizes(scan: Scan) -> dict[str, list[int]] | None:
    sizes = scan.rows["size"][scan.rows["is_read"]]
    if not len(sizes):
        return None
    order = sizes[np.argsort(sizes.astype(np.int64).prod(axis=1), kind="stable")]
    return {name: order[place].tolist() for name, place in (("least", 0), ("median", len(order) // 2), ("most", -1))}


def _describe_sizes(scan: Scan) -> str:
    sizes = _sizes(scan)
    readable = int(scan.rows["is_read"].sum())
    if sizes is None:
        return "none can be read"
    least, median, most = (f"{width}x{height}" for height, width in sizes.values())
    return f"{readable} of {len(scan.rows)} rows can be read; width x height {least} to {most}, median {median}"


def _describe_offset(scan: Scan) -> str:
    found = median_offset(scan)
    if found is None:
        return "unknown: too few conditions have the edges of their image"
    down, right = (round(float(value), 1) + 0.0 for value in found[0])  # + 0.0 turns -0.0 into 0.0
    return f"median {right:+.1f} px right, {down:+.1f} px down, of {len(found[1])} rows"


def _describe_captions(report: Report) -> str:
    most = int(report.scan.rows["tokens"].max(initial=0))
    longest = f"the longest has {most} tokens" if most else "all are short"
    return f"{report.needs.captions} distinct, with the empty one; {longest}"


def _describe_needs(needs: Needs) -> dict[str, str]:
    measured = needs.measured
    total = needs.picture_bytes + needs.caption_bytes
    pictures, captions = show_bytes(needs.picture_bytes), show_bytes(needs.caption_bytes)
    disk = f"{show_bytes(total)}: pictures {pictures}, captions {captions}"
    if measured is None or needs.seconds is None:
        return {"disk": disk, "time": "not measured", "memory": "not measured"}
    where = "in this process, on the CPU" if measured.device == "cpu" else f"on {measured.device}"
    return {
        "disk": disk,
        "time": (
            f"encoding the dataset takes about {needs.seconds:.0f} s on {measured.device}: "
            f"{measured.picture_seconds:.3f} s a crop, {measured.caption_seconds:.3f} s a caption; "
            "training not measured"
        ),
        "memory": f"encoding took {show_bytes(measured.peak_bytes)} {where}; training not measured",
    }


def _reason(finding: Finding, number: int) -> str:
    """The row's reason if it is short and adds something to the finding's text."""
    is_same = len(set(finding.reasons.values())) == 1
    reason = _one_line(finding.reasons[number])
    if len(reason) > _MAX_REASON or (is_same and reason in finding.about.what):
        return ""
    return f": {reason}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
