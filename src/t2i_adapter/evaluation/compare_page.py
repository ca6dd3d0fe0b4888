"""Makes report.html of several adapters: the ranking, typical pairs side by side, the distribution, all differences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from t2i_adapter.evaluation.adapters import adapter_column
from t2i_adapter.evaluation.compare import Comparison, Difference, Place
from t2i_adapter.evaluation.evaluate import ADAPTER, NO_ADAPTER, TARGET, Evaluation
from t2i_adapter.evaluation.headline import METRICS, Metric, typical_pairs
from t2i_adapter.evaluation.page import (
    COLUMNS,
    CONDITION,
    PICTURE_NAMES,
    PairElements,
    describe_pairs,
    distribution,
    intervals_note,
    numbers_table,
    picture_sizes,
    settings_section,
)
from t2i_adapter.reports.html import make_page, table, text


def make_comparison(
    evaluation: Evaluation,
    comparison: Comparison,
    settings: Mapping[str, Any],
    changed: Mapping[str, Any],
    command: str,
    reports: Mapping[str, str],
) -> str:
    """Returns the page. Arguments: as in `page.make_report`.

    reports: name of an adapter -> the address of its own report, relative to the page.
    """
    key = comparison.metric
    adapters = {adapter_column(ADAPTER, name): name for name in comparison.names}
    pictures = {CONDITION: PICTURE_NAMES[CONDITION], NO_ADAPTER: PICTURE_NAMES[NO_ADAPTER], **adapters}
    pictures[TARGET] = PICTURE_NAMES[TARGET]
    side = max(evaluation.pairs[0].target.size)
    typical = typical_pairs(evaluation, columns=list(adapters))
    sizes = picture_sizes(side, len(evaluation.pairs), len(typical), len(pictures))
    pages = PairElements(evaluation, key, pictures, list(adapters), sizes)
    rows = {**adapters, NO_ADAPTER: COLUMNS[NO_ADAPTER]}
    sentence = describe_ranking(comparison)
    body = f"""<main>
<p class="kicker">Comparison of {len(adapters)} adapters on {describe_pairs(evaluation)}</p>
<section class="answer {"good" if len(comparison.groups[0]) == 1 else "open"}">
<h1>{text(comparison.title)}</h1>
<p class="lead">{text(sentence)}</p>
<p><span class="faint">{text(METRICS[key].meaning)} In brackets: 95 % intervals.</span></p>
</section>
<h2 id="ranking">Ranking</h2>
<p class="note">All adapters get the same pairs, conditions and noise. Adapters that share a rank cannot be told apart
with these pairs. {intervals_note(evaluation)} {text(describe_intervals(comparison))}</p>
{_ranking(comparison, reports)}
<h2>Typical pairs</h2>
<p class="note">The pairs are ranked by the mean of the adapters' values, from the best to the worst, and these are
evenly spaced among them. All generated pictures of a pair begin with the same noise. <span class="screen">Choose a
picture to see it large over its condition. <a href="#all">All pairs</a> are at the end of the page.</span>
{pages.note(sizes.typical)}</p>
<section class="featured">
{"".join(pages.typical(typical))}
</section>
{distribution(evaluation, key, rows, sentence, list(adapters))}
<h2>All metrics</h2>
<p class="note">{intervals_note(evaluation)} The reports of the single adapters also have the values with another pair's
condition.</p>
{numbers_table(evaluation, {**rows, TARGET: COLUMNS[TARGET]})}
{_differences(comparison)}
<h2>Settings</h2>
{settings_section(settings, changed, command)}
{pages.others_section({index for index, _ in typical})}
</main>"""
    return make_page(f"Which adapter controls best? {comparison.title}", body, viewer=True)


def describe_ranking(comparison: Comparison) -> str:
    """Returns the means of the adapters, best first, in one sentence."""
    metric = METRICS[comparison.metric]
    means = [f"{metric.show_estimate(place.estimate)} with {place.name}" for place in comparison.places]
    return f"The {metric.name} is {', '.join(means[:-1])} and {means[-1]}; {metric.direction}."


def describe_intervals(comparison: Comparison) -> str:
    """Says over what the intervals of the differences hold."""
    if comparison.count == 1:
        return "The difference has a 95 % interval."
    return (
        f"The intervals of the differences hold for all {comparison.count} pairs of adapters together with 95 % "
        f"(each has {100 - 5 / comparison.count:.2f} %, by Bonferroni), because the same numbers choose the first."
    )


def show_difference(difference: Difference, metric: Metric) -> str:
    """For example "-0.031 (-0.052 to -0.010)"."""
    e, digits = difference.estimate, max(3, metric.digits)
    return f"{e.mean:+.{digits}f} ({e.low:+.{digits}f} to {e.high:+.{digits}f})"


def verdict(place: Place) -> str:
    """A place against the first of the ranking, in words."""
    if place.to_first is None:
        return "first"
    return "worse than the first" if place.to_first.is_shown else "not distinguishable from the first"


def _ranking(comparison: Comparison, reports: Mapping[str, str]) -> str:
    metric = METRICS[comparison.metric]
    rows = []
    for place in comparison.places:
        name = text(place.name)
        address = reports.get(place.name)
        link = f'<a href="{text(address)}">{name}</a>' if address else name
        needed = place.to_first
        rows.append(
            [
                f"<b>{place.rank}</b> {link}",
                f"{metric.show(place.estimate.mean)} "
                f"<small>{metric.show(place.estimate.low)} to {metric.show(place.estimate.high)}</small>",
                metric.show(place.floor.mean) if place.floor else "",
                text(show_difference(needed, metric)) if needed else "",
                text(verdict(place)),
                f"{needed.needed} for {needed.least:g}" if needed else "",
            ]
        )
    headings = [
        "rank, adapter",
        metric.name,
        "with another pair's condition",
        "difference to the first",
        "",
        "pairs needed",
    ]
    return table([*map(text, headings)], rows, "numbers")


def _differences(comparison: Comparison) -> str:
    first, *others = comparison.names
    rows = []
    for key, row in comparison.differences.items():
        cells = [text(show_difference(row[name], METRICS[key])) if name in row else "no value" for name in others]
        needed = [f"{row[name].needed}" if name in row else "no value" for name in others]
        rows.append(
            [f"<b>{text(key)}</b> <small>{METRICS[key].direction}</small>"]
            + [
                f"{cell} <small>{count} pairs for {METRICS[key].least:g}</small>"
                for cell, count in zip(cells, needed, strict=True)
            ]
        )
    return f"""<details><summary>Differences to {text(first)} in all metrics</summary>
<p class="note">The intervals hold for all pairs of adapters together within one metric, not over several metrics. The
small line says how many pairs would find a true difference of that size in 80 % of evaluations.</p>
{table(["metric", *(f"{text(name)} minus {text(first)}" for name in others)], rows, "numbers")}
</details>"""
