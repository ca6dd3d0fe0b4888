"""What was found, for people on a terminal and as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from t2i_adapter.data.geometry import Framing
from t2i_adapter.doctor.content import BLACK_ON_WHITE, CONTENTS, WHITE_ON_BLACK
from t2i_adapter.doctor.findings import KINDS, Finding, median_offset
from t2i_adapter.doctor.needs import Needs
from t2i_adapter.doctor.scan import Scan
from t2i_adapter.files import show_bytes

VERSION = 1
"""Of the JSON's form."""

_NAMED = 3  # rows a line


@dataclass(frozen=True)
class Report:
    """All that is told of a data set; `seconds` is what reading it took."""

    place: str
    scan: Scan
    findings: Sequence[Finding]
    needs: Needs
    framing: Framing
    seconds: float

    def count(self, level: str) -> int:
        """Findings of a level, "error" or "warning"."""
        return sum(finding.level == level for finding in self.findings)

    @property
    def verdict(self) -> str:
        """ "2 errors, 1 warning"."""
        if not self.findings:
            return "nothing is wrong"
        counts = {level: self.count(level) for level in ("error", "warning")}
        return ", ".join(f"{n} {level}{'s' * (n > 1)}" for level, n in counts.items() if n)


def to_json(report: Report) -> dict[str, Any]:
    """Plain JSON types; offsets are [down, right] and sizes [height, width], in pixels."""
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
    kind = KINDS[finding.kind]
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
    """A screenful: a line a finding, then what the data is and what it takes."""
    rows = len(report.scan.rows)
    pace = rows / max(report.seconds, 1e-9)
    findings = [finding_line(finding, report.scan) for finding in report.findings]
    facts = facts_lines(report)
    width = max(map(len, facts))
    told = [f"  {name:<{width}}  {words}" for name, words in facts.items()]
    top = f"{report.place}: read in {report.seconds:.1f} s ({pace:.0f} rows/s)"
    return "\n".join([top, *findings, *told, report.verdict])


def finding_line(finding: Finding, scan: Scan) -> str:
    """ "error: a picture cannot be read: 2 rows (train/3.png, train/7.png). What to do: write it again"."""
    kind = KINDS[finding.kind]
    if finding.whole:
        return f"{kind.level}: {kind.what}: {finding.whole}. What to do: {kind.advice}"
    named = [f"{_one_line(scan.keys[n])}{_detail(finding, n)}" for n in list(finding.reasons)[:_NAMED]]
    named += ["..."] * (len(finding.reasons) > _NAMED)
    count = f"{len(finding.reasons)} row{'s' * (len(finding.reasons) > 1)}"
    return f"{kind.level}: {kind.what}: {count} ({', '.join(named)}). What to do: {kind.advice}"


def facts_lines(report: Report) -> dict[str, str]:
    """What the data is and what it takes, in words."""
    scan, framing = report.scan, report.framing
    counted = crops(scan, framing)
    kinds = [f"{words} {n}" for words, n in conditions(scan).items()]
    return {
        "images": _size_words(scan),
        "crops": ", ".join(f"{w}x{h}: {n}" for (h, w), n in counted.items()) or "none",
        "conditions": ", ".join(kinds) or "made from the images",
        "offset": _offset_words(scan),
        "captions": _caption_words(report),
        **_needs_words(report.needs),
    }


def crops(scan: Scan, framing: Framing) -> dict[tuple[int, int], int]:
    """(height, width) of crops -> how many pictures are cut so, most first."""
    sizes = scan.rows["size"][scan.rows["is_read"]]
    distinct, counts = np.unique(sizes, axis=0, return_counts=True)
    found: Counter[tuple[int, int]] = Counter()
    for (height, width), count in zip(distinct.tolist(), counts.tolist(), strict=True):
        found[framing.target((height, width))] += count
    return dict(found.most_common())


def conditions(scan: Scan) -> dict[str, int]:
    """What conditions hold -> how many do."""
    counts = {words: int((scan.rows["content"] == n).sum()) for n, words in enumerate(CONTENTS) if n}
    for words, value in (("lines white on black", WHITE_ON_BLACK), ("lines black on white", BLACK_ON_WHITE)):
        counts[words] = int((scan.rows["polarity"] == value).sum())
    return {words: count for words, count in counts.items() if count}


def _sizes(scan: Scan) -> dict[str, list[int]] | None:
    sizes = scan.rows["size"][scan.rows["is_read"]]
    if not len(sizes):
        return None
    order = sizes[np.argsort(sizes.astype(np.int64).prod(axis=1), kind="stable")]
    return {name: order[place].tolist() for name, place in (("least", 0), ("median", len(order) // 2), ("most", -1))}


def _size_words(scan: Scan) -> str:
    sizes = _sizes(scan)
    readable = int(scan.rows["is_read"].sum())
    if sizes is None:
        return "none can be read"
    least, median, most = (f"{width}x{height}" for height, width in sizes.values())
    return f"{readable} of {len(scan.rows)} rows can be read; width x height {least} to {most}, median {median}"


def _offset_words(scan: Scan) -> str:
    told = median_offset(scan)
    if told is None:
        return "not told: too few conditions whose edges are their image's"
    down, right = (round(float(value), 1) + 0.0 for value in told[0])  # no "-0.0"
    return f"median {right:+.1f} px right, {down:+.1f} px down, by {len(told[1])} rows"


def _caption_words(report: Report) -> str:
    most = int(report.scan.rows["tokens"].max(initial=0))
    longest = f"the longest has {most} tokens" if most else "all short"
    return f"{report.needs.captions} distinct with the empty one; {longest}"


def _needs_words(needs: Needs) -> dict[str, str]:
    measured = needs.measured
    kept = needs.picture_bytes + needs.caption_bytes
    disk = f"{show_bytes(kept)}: pictures {show_bytes(needs.picture_bytes)}, captions {show_bytes(needs.caption_bytes)}"
    if measured is None or needs.seconds is None:
        return {"disk": disk, "time": "not measured", "memory": "not measured"}
    where = "the GPU" if measured.device == "cuda" else "this process, on the CPU"
    return {
        "disk": disk,
        "time": (
            f"encoding everything about {needs.seconds:.0f} s on {measured.device}: {measured.picture_seconds:.3f} s a "
            f"crop, {measured.caption_seconds:.3f} s a caption; training not measured"
        ),
        "memory": f"encoding took {show_bytes(measured.peak_bytes)} of {where}; training not measured",
    }


def _detail(finding: Finding, number: int) -> str:
    """The reason, where it is short and differs from row to row."""
    reasons = set(finding.reasons.values())
    reason = _one_line(finding.reasons[number])
    return f": {reason}" if len(reason) <= 40 and (len(reasons) > 1 or reason not in KINDS[finding.kind].what) else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())
