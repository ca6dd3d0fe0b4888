"""Writes the doctor's report as one HTML page: the findings, their worst rows and a random sample, with pictures."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

import numpy as np

from t2i_adapter.data.profiles import quiet
from t2i_adapter.data.source import Source
from t2i_adapter.doctor.findings import Finding
from t2i_adapter.doctor.report import Report, summary
from t2i_adapter.doctor.scan import Scan
from t2i_adapter.errors import UserError
from t2i_adapter.reports.html import inline_image, make_page, table

WORST = 12
"""Rows shown of each finding."""

SAMPLE = 24
"""Rows in the random sample."""


def make_html(report: Report, source: Source, seed: int) -> str:
    """Returns the page; all text is escaped. It reads the rows that it shows once more. `seed` chooses the sample."""
    facts = [[escape(name), escape(text)] for name, text in summary(report).items()]
    parts = [f"<p>{escape(report.verdict)}.</p>", table(["", "the dataset, and what a run takes"], facts)]
    parts += [_section(finding, report.scan, source) for finding in report.findings]
    total = len(report.scan.rows)
    sample = np.random.default_rng(seed).choice(total, min(SAMPLE, total), replace=False).tolist()
    parts += ["<h2>A random sample</h2>", _rows(((n, "") for n in sorted(sample)), report.scan, source)]
    return make_page(f"Doctor: {report.place}", "\n".join(parts))


def _section(finding: Finding, scan: Scan, source: Source) -> str:
    kind = finding.about
    where = finding.whole or f"{len(finding.reasons)} of {len(scan.rows)} rows"
    shown = _rows(list(worst(finding, scan).items())[:WORST], scan, source) if finding.reasons else ""
    return (
        f"<h2>{escape(kind.level)}: {escape(kind.what)}</h2>\n"
        f"<p>{escape(where)}. What to do: {escape(kind.advice)}.</p>\n{shown}"
    )


def worst(finding: Finding, scan: Scan) -> dict[int, str]:
    """Returns the finding's rows and reasons, worst first if the kind has an order: farthest, longest or smallest."""
    rows = scan.rows
    badness = {
        "offset_row": lambda n: float(np.abs(rows["offset"][n]).max()),
        "long_caption": lambda n: int(rows["tokens"][n]),
        "tiny": lambda n: -int(rows["size"][n].min()),
        "tiny_condition": lambda n: -int(rows["condition_size"][n].min()),
    }.get(finding.kind)
    if badness is None:
        return dict(finding.reasons)
    return dict(sorted(finding.reasons.items(), key=lambda item: -badness(item[0])))


def _rows(rows: Iterable[tuple[int, str]], scan: Scan, source: Source) -> str:
    cells = []
    for number, reason in rows:
        text = f"<code>{escape(scan.keys[number])}</code>" + (f"<br>{escape(reason)}" if reason else "")
        cells.append([text, *_pictures(number, source)])
    return table(["row", "image", "condition", "caption"], cells)


def _pictures(number: int, source: Source) -> tuple[str, str, str]:
    """The image, condition and caption cells of a row; if it cannot be read, the reason."""
    try:
        with quiet():
            sample = source[number]
    except UserError as fault:
        return f"<small>{escape(str(fault))}</small>", "", ""
    condition = inline_image(sample.condition) if sample.condition is not None else ""
    return inline_image(sample.image), condition, "<br>".join(escape(caption) for caption in sample.captions)
