"""The findings as one HTML file: what is wrong, the worst rows and a random sample as pictures, all text escaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

import numpy as np

from t2i_adapter.data.source import Source
from t2i_adapter.doctor.findings import KINDS, Finding
from t2i_adapter.doctor.report import Report, facts_lines
from t2i_adapter.errors import UserError
from t2i_adapter.reports.page import inline, make_page, table

WORST = 12
"""Rows shown of each finding."""

SAMPLE = 24
"""Rows shown of the whole, drawn by the seed."""


def make_html(report: Report, source: Source, seed: int) -> str:
    """The page. Reads the rows that it shows once more."""
    facts = [[escape(name), escape(words)] for name, words in facts_lines(report).items()]
    parts = [f"<p>{escape(report.verdict)}.</p>", table(["", "what the data is, and what it takes"], facts)]
    parts += [_section(finding, report, source) for finding in report.findings]
    total = len(report.scan.rows)
    drawn = np.random.default_rng(seed).choice(total, min(SAMPLE, total), replace=False).tolist()
    parts += ["<h2>A random sample</h2>", _rows(((n, "") for n in sorted(drawn)), report, source)]
    return make_page(f"{report.place}, looked over", "\n".join(parts))


def _section(finding: Finding, report: Report, source: Source) -> str:
    kind = KINDS[finding.kind]
    about = finding.whole or f"{len(finding.reasons)} of {len(report.scan.rows)} rows"
    shown = _rows(list(worst(finding, report).items())[:WORST], report, source) if finding.reasons else ""
    return (
        f"<h2>{escape(kind.level)}: {escape(kind.what)}</h2>\n"
        f"<p>{escape(about)}. What to do: {escape(kind.advice)}.</p>\n{shown}"
    )


def worst(finding: Finding, report: Report) -> dict[int, str]:
    """The finding's rows and reasons, the worst first where there is a worse: the farthest, longest, smallest."""
    rows = report.scan.rows
    badness = {
        "offset_row": lambda n: float(np.abs(rows["offset"][n]).max()),
        "long_caption": lambda n: int(rows["tokens"][n]),
        "tiny": lambda n: -int(rows["size"][n].min()),
        "tiny_condition": lambda n: -int(rows["condition_size"][n].min()),
    }.get(finding.kind)
    if badness is None:
        return dict(finding.reasons)
    return dict(sorted(finding.reasons.items(), key=lambda item: -badness(item[0])))


def _rows(rows: Iterable[tuple[int, str]], report: Report, source: Source) -> str:
    cells = []
    for number, reason in rows:
        words = f"<code>{escape(report.scan.keys[number])}</code>" + (f"<br>{escape(reason)}" if reason else "")
        cells.append([words, *_pictures(number, source)])
    return table(["row", "image", "condition", "caption"], cells)


def _pictures(number: int, source: Source) -> tuple[str, str, str]:
    try:
        sample = source[number]
    except UserError as fault:
        return f"<small>{escape(str(fault))}</small>", "", ""
    condition = inline(sample.condition) if sample.condition is not None else ""
    return inline(sample.image), condition, "<br>".join(escape(caption) for caption in sample.captions)
