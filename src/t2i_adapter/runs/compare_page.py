"""Makes compare.html: the curves of several runs over each other, their numbers, options and last pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from t2i_adapter.reports.html import make_page, quoted, table, text
from t2i_adapter.reports.plot import Line, line_plot, smooth
from t2i_adapter.runs.compare import Difference, differences, differing_options, names_of
from t2i_adapter.runs.page import line_of
from t2i_adapter.runs.pictures import Pictures, Small
from t2i_adapter.runs.read import Run
from t2i_adapter.runs.words import last_score, percent, state, value

FILE = "compare.html"
UNPAIRED = (
    "Where no difference over the same pairs is named, the two intervals are compared, which finds fewer differences: "
    "the runs did not log the values of single pairs, or had other pairs."
)
"""A note for differences that are not paired."""
MOST_RUNS = 8
"""Runs on one page; the plots have as many colours."""


def make_comparison(runs: Sequence[Run]) -> str:
    """The page as HTML; the first run is the one that the others are compared with. All text is escaped."""
    names = names_of(runs)
    body = f"""<main class="runs">
<p class="kicker">{len(runs)} runs</p>
<h1>{text(" and ".join(names) if len(names) < 4 else f"{len(names)} runs")}</h1>
{_table(runs, names)}
{_differences(runs, names)}
<h2>Curves</h2>
<div class="plots">{_plots(runs, names)}</div>
{_pictures(runs, names)}
{_options(runs, names)}
</main>"""
    return make_page(f"Compare {', '.join(names)}", body)


def overview(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows, as plain text, of what each run has reached. Each row begins with the run's name."""
    headings = ["run", "state", "loss", "benefit", "use", "score", "samples/s"]
    rows = []
    for name, run in zip(names_of(runs), runs, strict=True):
        look, use, score = run.metrics.last_look, run.metrics.last_use, run.metrics.last_score
        rows.append(
            [
                name,
                state(run),
                "" if run.loss is None else f"{run.loss:.4f}",
                percent(look.benefit) if look else "",
                percent(use[1]) if use else "",
                f"{score.metric if score else ''} {last_score(run)}".strip(),
                "" if run.samples_per_s is None else f"{run.samples_per_s:.3g}",
            ]
        )
    return headings, rows


def sentence(found: Difference, first: str, other: str) -> str:
    """A difference in words."""
    show: Callable[..., str] = percent if found.what == "benefit" else value
    a, b = found.steps
    at = f"At step {a:,}" if a == b else f"At the last steps, {b:,} and {a:,},"
    words = {"better": "is better than", "worse": "is worse than", "open": "is not shown to differ from"}[found.answer]
    text = f"{at} {other} {words} {first} in {found.what}: {show(found.other)} against {show(found.first)}"
    if found.paired:
        difference = show(found.paired)
        return f"{text}; the difference is {difference} over the same {found.pairs} pairs."
    return f"{text}."


def _table(runs: Sequence[Run], names: Sequence[str]) -> str:
    headings, rows = overview(runs)
    return table(map(text, headings), [[text(cell) for cell in row] for row in rows])


def _differences(runs: Sequence[Run], names: Sequence[str]) -> str:
    looks = {"better": "read", "worse": "not_read", "open": "open"}
    found = [(name, one) for name, run in zip(names[1:], runs[1:], strict=True) for one in differences(runs[0], run)]
    if not found:
        return ""
    lines = (f'<li class="{looks[one.answer]}">{text(sentence(one, names[0], name))}</li>' for name, one in found)
    note = "" if all(one.paired for _, one in found) else f'<p class="note">{UNPAIRED}</p>'
    return f'<h2>Differences</h2>{note}<ul class="notes">{"".join(lines)}</ul>'


def _plots(runs: Sequence[Run], names: Sequence[str]) -> str:
    named = [(f"line{place}", name, run) for place, (name, run) in enumerate(zip(names, runs, strict=True))]
    plot = partial(line_plot, description="One line a run, over the steps.")
    benefit = [line_of(c, n, [(look.step, look.benefit) for look in r.metrics.looks]) for c, n, r in named]
    use = [line_of(c, n, [(look.step, look.use) for look in r.metrics.looks]) for c, n, r in named]
    loss = [Line(c, n, smooth(r.metrics.numbers("loss"), 100)) for c, n, r in named]
    scores = ""
    for metric in sorted({score.metric for run in runs for score in run.metrics.scores}):
        lines = [
            line_of(c, n, [(s.step, s.columns["adapter"]) for s in r.metrics.scores if s.metric == metric])
            for c, n, r in named
        ]
        scores += plot(lines, title=f"Score: {metric}", show="{:.3g}".format, zero=True)
    return (
        plot(benefit, title="Benefit", show="{:.0%}".format, within=(None, 1.0), zero=True)
        + scores
        + plot(use, title="Use", show="{:.0%}".format, zero=True)
        + plot(loss, title="Loss, mean of a stretch", show="{:.3g}".format)
    )


def _pictures(runs: Sequence[Run], names: Sequence[str]) -> str:
    """The last pictures of the pairs that all runs with pictures have, by key."""
    shown = [(name, Pictures(run.folder)) for name, run in zip(names, runs, strict=True)]
    shown = [(name, pictures) for name, pictures in shown if pictures.steps() and pictures.pairs()]
    if not shown:
        return ""
    by_key = [{(pair.key, pair.prompt): pair for pair in pictures.pairs()} for _, pictures in shown]
    rows = []
    for key, pair in by_key[0].items():
        if not all(key in pairs for pairs in by_key):
            continue
        first = shown[0][1]
        shots = [_shot(first.fixed(pair, kind), kind) for kind in ("condition", "target")]
        for (name, pictures), pairs in zip(shown, by_key, strict=True):
            step = pictures.steps()[-1]
            shots.append(_shot(pictures.at(pairs[key], step), f"{name}, step {step:,}"))
        rows.append(
            f'<article class="pair"><header><p class="prompt" title="{text(pair.key)}">{quoted(pair.prompt)}</p>'
            "</header>"
            f'<div class="pictures">{"".join(shots)}</div></article>'
        )
    if not rows:
        return '<h2>Pictures</h2><p class="note">The runs generated pictures of different pairs.</p>'
    return f"<h2>Pictures of the last step</h2>{''.join(rows)}"


def _shot(small: Small | None, name: str) -> str:
    if small is None:
        return ""
    return f'<figure class="shot">{small.element(name)}<figcaption>{text(name)}</figcaption></figure>'


def _options(runs: Sequence[Run], names: Sequence[str]) -> str:
    found = differing_options(runs)
    rows = [[text(option), *(f"<code>{text(value)}</code>" for value in row)] for option, row in found.items()]
    if not rows:
        return ""
    return f"<h2>Options that differ</h2>{table(['option', *map(text, names)], rows)}"
