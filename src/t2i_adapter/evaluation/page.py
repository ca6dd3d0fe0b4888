"""Makes report.html of an evaluation: the answer, typical pairs, the distribution, all numbers, settings, all pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from t2i_adapter.evaluation.compare import control_differences
from t2i_adapter.evaluation.evaluate import ADAPTER, NO_ADAPTER, OTHER_CONDITION, TARGET, Evaluation
from t2i_adapter.evaluation.headline import (
    METRICS,
    Headline,
    headline,
    rank_pairs,
    typical_pairs,
)
from t2i_adapter.evaluation.metrics import Estimate
from t2i_adapter.reports.html import inline_image, make_page, quoted, table, text
from t2i_adapter.reports.plot import Dots, dot_plot

COLUMNS = {
    ADAPTER: "adapter",
    OTHER_CONDITION: "another pair's condition",
    NO_ADAPTER: "no adapter",
    TARGET: "target (ceiling)",
}
"""Columns of the tables and their names."""
CONDITION = "condition"
PICTURES = (CONDITION, NO_ADAPTER, ADAPTER, OTHER_CONDITION, TARGET)
"""Order of a pair's pictures."""
PICTURE_NAMES = {**COLUMNS, CONDITION: "condition", TARGET: "target"}

TYPICAL_SIDE = 1024
"""Most pixels of a side of a typical pair's pictures."""
LOSSLESS_SIDE = 256
LOSSLESS_PIXELS = 8e6
"""Pictures up to this side are lossless if all of the page have so few pixels together."""
LOSSY_PIXELS = 40e6
"""Most pixels that the pictures of the other pairs have together; beyond it they are scaled down."""
LEAST_SIDE = 192
"""Pixels of a side to which a picture may be scaled down for the page."""
MOST_OTHERS = 400
"""Most pairs that the page shows beside the typical ones."""


_DOUBT = (
    "The dataset does not describe its scenes, so the true objects are the foreground that was found in the target. "
    "On photographs that fill the frame this number means little; the option judge compares conditions instead."
)


@dataclass(frozen=True)
class Sizes:
    """How the page holds its pictures: sides in pixels of the typical and of the other pairs, and the encoding."""

    typical: int
    others: int
    lossless: bool


def picture_sizes(side: int, pairs: int, typical: int, columns: int) -> Sizes:
    """Returns how a page holds the pictures of `pairs` pairs, `typical` of them large, `columns` pictures each.

    side: of the generated pictures, in pixels.
    """
    count = max(1, (pairs - typical) * columns)
    others = min(side, max(LEAST_SIDE, math.isqrt(int(LOSSY_PIXELS / count))))
    lossless = side <= LOSSLESS_SIDE and pairs * columns * side**2 <= LOSSLESS_PIXELS
    return Sizes(min(side, TYPICAL_SIDE), others, lossless)


def make_report(evaluation: Evaluation, settings: Mapping[str, Any], changed: Mapping[str, Any], command: str) -> str:
    """Returns the page. All text is escaped; the page loads nothing.

    Args:
        settings: everything that the numbers depend on, plain JSON types.
        changed: the options that differ from their defaults.
        command: the command line that repeats the evaluation.
    """
    answer = headline(evaluation)
    typical = typical_pairs(evaluation)
    columns = [column for column in PICTURES if column in {CONDITION, TARGET, *evaluation.pictures}]
    side = max(evaluation.pairs[0].target.size)
    names = {column: PICTURE_NAMES[column] for column in columns}
    sizes = picture_sizes(side, min(len(evaluation.pairs), MOST_OTHERS), len(typical), len(columns))
    pages = PairElements(evaluation, answer.metric, names, (ADAPTER,), sizes)
    adapter = text(settings.get("adapter", "adapter"))
    body = f"""<main>
<p class="kicker">Evaluation of {adapter} on {describe_pairs(evaluation)}</p>
{_answer(evaluation, answer)}
<h2>Typical pairs</h2>
<p class="note">The pairs are ranked by the adapter's own value, from the best to the worst, and these are evenly spaced
among them. All generated pictures of a pair begin with the same noise. <span class="screen">Choose a picture to see it
large over its condition. <a href="#all">All pairs</a> are at the end of the page.</span>
{pages.note(pages.sizes.typical)}</p>
<section class="featured">
{"".join(pages.typical(typical))}
</section>
{distribution(evaluation, answer.metric, {c: COLUMNS[c] for c in COLUMNS if c in evaluation.pictures}, answer.sentence)}
<h2>All metrics</h2>
<p class="note">{intervals_note(evaluation)} The target is the pair's true picture: its value is
the best that a generated picture can reach.</p>
{numbers_table(evaluation, {c: COLUMNS[c] for c in COLUMNS if c in evaluation.estimates[answer.metric]})}
{_notes(settings)}
{_differences(evaluation)}
<h2>Settings</h2>
{settings_section(settings, changed, command)}
{pages.others_section({index for index, _ in typical})}
</main>"""
    return make_page(f"Does the adapter control? {answer.title}", body, viewer=True)


def _notes(settings: Mapping[str, Any]) -> str:
    """Returns what the second judge says and what is not measured, a paragraph each."""
    lines = [settings.get("second_opinion"), *settings.get("pair_faults", ()), *settings.get("not_measured", ())]
    return "\n".join(f'<p class="note">{text(line)}</p>' for line in lines if line)


def _answer(evaluation: Evaluation, answer: Headline) -> str:
    look = {"better": "good", "open": "open", "worse": "bad"}[answer.verdict]
    is_found = answer.metric == "iou" and any(pair.truth_from == "picture" for pair in evaluation.pairs)
    return f"""<section class="answer {look}">
<h1>{text(answer.title)}</h1>
<p class="lead">{text(answer.sentence)}</p>
<p>{text(answer.wins)}
<span class="faint">{text(METRICS[answer.metric].meaning)} In brackets: 95 % intervals.</span></p>
{f'<p class="faint">{_DOUBT}</p>' if is_found else ""}
</section>"""


def describe_pairs(evaluation: Evaluation) -> str:
    """For example "64 held-out pairs, 4 pictures each"."""
    each = f", {evaluation.repeats} pictures each" if evaluation.repeats > 1 else ""
    return f"{len(evaluation.pairs)} held-out pairs{each}"


def intervals_note(evaluation: Evaluation) -> str:
    """Says what the means and intervals are over."""
    if evaluation.repeats == 1:
        return "Means with 95 % bootstrap intervals over the pairs."
    return (
        f"The value of a pair is the mean over its {evaluation.repeats} pictures. Means with 95 % bootstrap intervals: "
        "pairs are resampled, and the pictures of a pair stay together. The first picture of each pair is shown."
    )


class PairElements:
    """Makes the elements of the pairs, each with its pictures."""

    def __init__(
        self, evaluation: Evaluation, metric: str, names: Mapping[str, str], subjects: Sequence[str], sizes: Sizes
    ) -> None:
        """
        Args:
            metric: the metric whose values are shown.
            names: column -> its words, for the pictures of a pair in their order.
            subjects: columns of the adapters; the pairs are ranked by their mean.
        """
        self.evaluation, self.names, self.subjects, self.sizes = evaluation, names, subjects, sizes
        self.metric, self.values = METRICS[metric], evaluation.values[metric]
        self.ranks = rank_pairs(evaluation, subjects)
        self._rank = {index: rank for rank, index in enumerate(self.ranks)}

    def typical(self, pairs: Sequence[tuple[int, str]]) -> Iterator[str]:
        return (self._pair(index, place, self.sizes.typical) for index, place in pairs)

    def others_section(self, shown: set[int]) -> str:
        """Returns the section of the pairs that are not among the typical ones, `shown`."""
        total = len(self.ranks)
        rest = [(index, f"rank {rank} of {total}") for rank, index in enumerate(self.ranks, 1) if index not in shown]
        step = max(1, -(-len(rest) // MOST_OTHERS))
        some = rest[::step]
        which = f"One pair in {step}, by rank." if step > 1 else "By rank."
        return f"""<h2 id="all">All other pairs</h2>
<p class="note">{which} From left to right: {", ".join(map(text, self.names.values()))}.
{self.note(self.sizes.others)}</p>
<section class="others">
{"".join(self._pair(index, place, self.sizes.others) for index, place in some)}
</section>"""

    def note(self, side: int) -> str:
        """Says that pictures are scaled down to `side` pixels; "" if they are not."""
        own = max(self.evaluation.pairs[0].target.size)
        return f"The pictures are scaled down from {own} px to {side} px." if side < own else ""

    def _pair(self, index: int, place: str, side: int) -> str:
        pair = self.evaluation.pairs[index]
        value = self._value(self.subjects[0], index) if len(self.subjects) == 1 else ""
        own = {CONDITION: pair.condition, TARGET: pair.target}
        pictures = "".join(
            self._picture(
                own[column] if column in own else self.evaluation.pictures[column][index], index, column, side
            )
            for column in self.names
        )
        heading = f"{place}: {value}" if value else place
        return f"""<article class="pair" data-pair="{index}" data-rank="{self._rank[index]}">
<header><h3>{text(heading)}</h3><p class="prompt" title="{text(pair.key)}">{quoted(pair.prompt)}</p></header>
<div class="pictures">{pictures}</div>
</article>
"""

    def _picture(self, picture: Image.Image, index: int, column: str, side: int) -> str:
        name, value = text(self.names[column]), self._value(column, index)
        image = inline_image(picture, self.names[column], largest=side, lossless=self.sizes.lossless)
        kind = "picture subject" if column in self.subjects else "picture"
        return (
            f'<button type="button" class="{kind}" data-column="{column}">{image}'
            f'<span class="name">{name}{f" <b>{value}</b>" if value else ""}</span></button>'
        )

    def _value(self, column: str, index: int) -> str:
        """The pair's value of the metric as text; "" if there is none."""
        value = self.values[column][index] if column in self.values else None
        return "" if value is None else self.metric.show(value)


def distribution(
    evaluation: Evaluation, key: str, names: Mapping[str, str], sentence: str, subjects: Sequence[str] = ()
) -> str:
    """Returns the section with a metric's distribution.

    Args:
        names: column -> its words, in the order of the rows.
        sentence: what a screen reader reads.
        subjects: columns that are drawn in the adapter's colour.
    """
    metric, estimates = METRICS[key], evaluation.estimates[key]
    rows = [
        Dots(
            name=f"{column} {ADAPTER}" if column in subjects else column,
            label=name,
            shown=metric.show_estimate(estimates[column]),
            values=evaluation.values[key][column],
            mean=estimates[column].mean,
            low=estimates[column].low,
            high=estimates[column].high,
        )
        for column, name in names.items()
    ]
    ceiling = (
        (f"ceiling {metric.show(estimates[TARGET].mean)}", estimates[TARGET].mean) if TARGET in estimates else None
    )
    plot = dot_plot(
        rows,
        title=f"{metric.name}, {metric.direction}",
        description=sentence,
        digits=metric.digits,
        most=metric.most if metric.higher_is_better else None,
        mark=ceiling,
    )
    numbers = table(
        ["", "lowest", "lower quartile", "median", "upper quartile", "highest", "mean"],
        [[text(row.label), *map(metric.show, row.quantiles()), row.shown] for row in rows],
        "numbers",
    )
    name = text(metric.name)
    return f"""<h2>The whole distribution</h2>
<p class="note">{name[0].upper() + name[1:]}, {metric.direction}. One dot is one pair; the band
spans the quartiles, with the median as a line. The large dot below is the mean with its 95 % interval.</p>
<figure class="plot">
{plot}
</figure>
<details><summary>The plot in numbers</summary>
{numbers}
</details>"""


def numbers_table(evaluation: Evaluation, names: Mapping[str, str]) -> str:
    """Returns the table of all metrics. names: column -> its words."""
    rows = [
        [f"<b>{text(key)}</b> <small>{text(METRICS[key].name)}, {METRICS[key].direction}</small>"]
        + [_cell(estimates.get(column)) for column in names]
        for key, estimates in evaluation.estimates.items()
    ]
    return table(["metric", *(text(name) for name in names.values())], rows, "numbers")


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return "no value"
    return f"{estimate.mean:.3f} <small>{estimate.low:.3f} to {estimate.high:.3f}</small>"


def _differences(evaluation: Evaluation) -> str:
    """Returns the folded table of the adapter's paired differences to the controls; "" without controls."""
    found = {metric: row for metric, row in control_differences(evaluation).items() if row}
    if not found:
        return ""
    controls = list(dict.fromkeys(control for row in found.values() for control in row))
    rows = []
    for metric, row in found.items():
        cells = [
            text(f"{(e := row[c].estimate).mean:+.3f} ({e.low:+.3f} to {e.high:+.3f})") if c in row else "no value"
            for c in controls
        ]
        first = next(iter(row.values()))
        rows.append([f"<b>{text(metric)}</b>", *cells, f"{first.needed} for {first.least:g}"])
    headings = ["adapter minus", *(text(COLUMNS[control]) for control in controls), "pairs needed"]
    return f"""<details><summary>Differences to the controls, pair by pair, and how many pairs are needed</summary>
<p class="note">The difference is taken within each pair, so what a pair has in common cancels. In brackets: its 95 %
interval. "Pairs needed" says how many pairs would find a true difference of that size to
{text(COLUMNS[controls[0]])} in 80 % of evaluations.</p>
{table(headings, rows, "numbers")}
</details>"""


def settings_section(settings: Mapping[str, Any], changed: Mapping[str, Any], command: str) -> str:
    """Returns the folded section with the command, the options and the versions. Arguments: as in `make_report`."""
    versions = settings.get("versions", {})
    facts = {"sha256 of the adapter's weights": settings.get("adapter_sha256"), **versions}
    return f"""<details><summary>The command, what differs from the defaults, and versions</summary>
<h3>The command that repeats this evaluation</h3>
<div class="command"><code id="command">{text(command)}</code>
<button type="button" class="button" data-copy="command" hidden>Copy</button></div>
<h3>Options that differ from their defaults</h3>
{_facts(changed)}
<h3>Digest and versions</h3>
{_facts({name: value for name, value in facts.items() if value is not None})}
<details><summary>All settings</summary>
{_facts({name: value for name, value in settings.items() if name not in ("versions", "adapter_sha256")})}
</details>
</details>"""


def _facts(values: Mapping[str, Any]) -> str:
    rows = [[text(name), f"<code>{text(value)}</code>"] for name, value in _flat(values)]
    return table(["name", "value"], rows, "facts")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yields (name, value); the names of nested values are joined by dots."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            many = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            yield prefix + name, "none" if value is None else many
