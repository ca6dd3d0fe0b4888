"""Writes the doctor's report as one HTML page: the findings, their worst rows and a random sample, with pictures."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from t2i_adapter.data.profiles import quiet
from t2i_adapter.data.source import Source
from t2i_adapter.doctor.findings import Finding
from t2i_adapter.doctor.report import Report, summary
from t2i_adapter.doctor.scan import Scan
from t2i_adapter.errors import UserError
from t2i_adapter.reports.html import inline_image, make_page, quoted, table, text

WORST = 12
"""Rows shown of each finding."""

SAMPLE = 24
"""Rows in the random sample."""


def make_html(report: Report, source: Source, seed: int) -> str:
    """Returns the page; all text is escaped. It reads the rows that it shows once more. `seed` chooses the sample."""
    facts = table(["name", "value"], [[text(name), text(value)] for name, value in summary(report).items()], "facts")
    total = len(report.scan.rows)
    sample = np.random.default_rng(seed).choice(total, min(SAMPLE, total), replace=False).tolist()
    look = "bad" if report.count("error") else "warn" if report.findings else "good"
    body = f"""<main>
<p class="kicker">{text(report.place)}</p>
<section class="answer {look}">
<h1>{text(report.verdict[0].upper() + report.verdict[1:])}.</h1>
</section>
{"".join(_section(finding, report.scan, source) for finding in report.findings)}
<h2>The dataset, and what a run takes</h2>
{facts}
<h2>A random sample</h2>
{_rows(((n, "") for n in sorted(sample)), report.scan, source)}
</main>"""
    return make_page(f"Doctor: {report.place}", body)


def _section(finding: Finding, scan: Scan, source: Source) -> str:
    kind = finding.about
    where = finding.whole or f"{len(finding.reasons)} of {len(scan.rows)} rows"
    shown = list(worst(finding, scan).items())[:WORST]
    if 0 < len(shown) < len(finding.reasons):
        where += f"; {len(shown)} of them are shown"
    return f"""<section class="finding {text(kind.level)}">
<h2><span class="level">{text(kind.level)}</span>{text(kind.what)}</h2>
<p>{text(where)}. What to do: {text(kind.advice)}.</p>
{_rows(shown, scan, source) if shown else ""}
</section>
"""


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
    return f'<section class="rows">\n{"".join(_row(number, reason, scan, source) for number, reason in rows)}</section>'


def _row(number: int, reason: str, scan: Scan, source: Source) -> str:
    """The image, the condition and the captions of a row, if it can be read, with its key and the reason."""
    try:
        with quiet():
            sample = source[number]
    except UserError as fault:
        shown, reason = "", reason or str(fault)
    else:
        condition = inline_image(sample.condition, "condition") if sample.condition is not None else ""
        captions = "".join(f"<p>{quoted(caption)}</p>" for caption in sample.captions)
        shown = f'<div class="shown">{inline_image(sample.image, "image")}{condition}</div>\n{captions}'
    why = f"<p><b>{quoted(reason)}</b></p>" if reason else ""
    return f'<article class="row">\n{shown}\n<p><code>{quoted(scan.keys[number])}</code></p>{why}\n</article>\n'
