"""Makes sweep.html: the recommended point, its pictures, heat maps of control, the front, all points, noise levels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from t2i_adapter.evaluation.bands import STRENGTHS
from t2i_adapter.evaluation.halving import Comparison, Goal, Search, compare
from t2i_adapter.evaluation.headline import METRICS
from t2i_adapter.evaluation.sweep import Schedule, Sweep
from t2i_adapter.evaluation.sweep_options import describe_point
from t2i_adapter.generation.options import SamplingOptions
from t2i_adapter.reports.html import inline_image, make_page, quoted, table, text
from t2i_adapter.statistics import Interval

_CELL = 92, 46
"""Width and height in pixels of a cell of a heat map."""
_HEAD = 128, 40
"""Pixels to the left of a heat map's cells and above them."""
_WIDE, _HIGH, _LEFT, _BOTTOM = 720, 320, 64, 44
"""Sizes in pixels of the plot of the front, and of the space for the numbers on its left and below it."""


def make_sweep_page(found: Sweep, settings: Mapping[str, Any], command: str) -> str:
    """Returns the page. All text is escaped; the page loads nothing.

    settings: everything that the numbers depend on. command: the command line that repeats the sweep.
    """
    metric = METRICS[found.goal.metric]
    first, last = (found.search.rungs[place][0] for place in (0, -1))
    title = "The default options stay." if found.is_default else "Better sampling options were confirmed."
    margins = ", ".join(f"{METRICS[name].name} {limit.margin:g}" for name, limit in found.goal.limits.items())
    body = f"""<main>
<p class="kicker">Sweep of {text(settings.get("adapter", "the adapter"))}: {len(found.points)} points,
{found.count:,} pictures</p>
<section class="answer {"open" if found.is_default else "good"}">
<h1>{text(title)}</h1>
<p class="lead">{text(found.answer())}</p>
<p class="faint">Raised: {text(metric.name)} ({metric.direction}). Quality may be worse than the default's by at most:
{text(margins or "nothing is measured")}. The probability that a gain is confirmed which does not exist is 5 % at most,
for the candidates and the schedule together.</p>
</section>
<h2>Confirmation on fresh pairs</h2>
<p class="note">These pairs took no part in the choice. The best of many noisy means is too high, so only these numbers
say what a point gains. Bounds are one-sided; harms are in margins, and 1 is the most that is allowed.</p>
{_confirmation(found)}
<h2>Default and recommended point</h2>
<section class="featured">
{"".join(_pairs(found))}
</section>
<h2>Control over the grid</h2>
<p class="note">Difference to the default in {text(metric.name)}, on the same pairs and noise, positive where a point is
better. Points were measured on {first} to {last} pairs: the better ones on more. The frame marks the recommended
point.</p>
{"".join(_heat_maps(found))}
<h2>The front</h2>
<p class="note">Each dot is a point: its gain in control against its largest harm to prompt or quality, in margins. No
other point beats those on the front in both. Left of the dashed line the harm is within the margin.</p>
{_front(found)}
<h2>Strength by noise level</h2>
{_schedule(found.schedule)}
<h2>All points</h2>
<p class="note">Means, and differences to the default with 95 % intervals, on the pairs that chose the points.</p>
{_points(found)}
<h2>Settings</h2>
<details><summary>The command, and all settings</summary>
<div class="command"><code id="command">{text(command)}</code>
<button type="button" class="button" data-copy="command" hidden>Copy</button></div>
{_facts(settings)}
</details>
</main>"""
    return make_page(f"Sweep: {title}", body, viewer=True)


def _confirmation(found: Sweep) -> str:
    metric = METRICS[found.goal.metric]
    rows = [
        [text(describe_point(found.points[number])), *_compared(comparison, metric.digits)]
        for number, comparison in zip(found.candidates, found.comparisons, strict=True)
    ]
    if found.schedule and found.schedule.comparison:
        rows.append(["the schedule of strengths, against none", *_compared(found.schedule.comparison, metric.digits)])
    if not rows:
        return "<p>No point was better than the default on the choosing pairs.</p>"
    return table(["point", "gain in control", "harms", "pairs", "confirmed"], rows, "numbers")


def _compared(comparison: Comparison, digits: int) -> list[str]:
    gain = comparison.gain
    shown = f"{gain.mean:+.{digits + 1}f} <small>above {gain.low:+.{digits + 1}f}</small>"
    harms = "".join(
        f"<small>{text(METRICS[name].name)}: {harm.mean:+.2f}, below {harm.high:.2f}</small>"
        for name, harm in comparison.harms.items()
    )
    return [shown, harms or "not measured", str(comparison.pairs), "yes" if comparison.is_confirmed else "no"]


def _pairs(found: Sweep) -> Iterator[str]:
    columns = {"condition": "condition", "default": "default", "adapter": "recommended", "target": "target"}
    if found.is_default:
        columns = {"condition": "condition", "adapter": "default (recommended)", "target": "target"}
    for index, pair in enumerate(found.pairs):
        images = {
            "condition": pair.condition,
            "default": found.pictures[index],
            "adapter": found.better[index],
            "target": pair.target,
        }
        pictures = "".join(
            f'<button type="button" class="picture{" subject" if column == "adapter" else ""}" data-column="{column}">'
            f'{inline_image(images[column], name)}<span class="name">{name}</span></button>'
            for column, name in columns.items()
        )
        yield f"""<article class="pair" data-pair="{index}" data-rank="{index}">
<header><h3>fresh pair {index + 1}</h3><p class="prompt" title="{text(pair.key)}">{quoted(pair.prompt)}</p></header>
<div class="pictures">{pictures}</div>
</article>
"""


def _gain(search: Search, number: int) -> Interval:
    """The paired difference of a point to the default, on the point's choosing pairs."""
    return _against_default(search, number).gain


def _against_default(search: Search, number: int) -> Comparison:
    return compare(search.goal, search.values[number], search.first(search.default, search.pairs(number)), 0.025)


def _heat_maps(found: Sweep) -> Iterator[str]:
    """One map of scale x control guidance for each text guidance and share of the steps."""
    largest = max((abs(_gain(found.search, number).mean) for number in found.search.values), default=0.0) or 1.0
    groups = sorted({(point.guidance, point.condition_factor) for point in found.points})
    for guidance, share in groups:
        own = {n: p for n, p in enumerate(found.points) if (p.guidance, p.condition_factor) == (guidance, share)}
        heading = f"guidance {guidance:g}, the adapter in the first {share:.0%} of the steps"
        svg = _heat_map(found, own, largest)
        yield f'<figure class="plot heat"><figcaption>{heading}</figcaption>\n{svg}\n</figure>\n'


def _heat_map(found: Sweep, points: Mapping[int, SamplingOptions], largest: float) -> str:
    scales = sorted({point.scale for point in points.values()})
    controls = sorted({point.control_guidance for point in points.values()}, reverse=True)
    digits = METRICS[found.goal.metric].digits + 1
    width, height = _HEAD[0] + _CELL[0] * len(scales), _HEAD[1] + _CELL[1] * len(controls)
    parts = [
        f'<text class="tick" x="{_HEAD[0] + _CELL[0] * (n + 0.5)}" y="{_HEAD[1] - 10}" text-anchor="middle">'
        f"scale {v:g}</text>"
        for n, v in enumerate(scales)
    ]
    parts += [
        f'<text class="tick" x="{_HEAD[0] - 8}" y="{_HEAD[1] + _CELL[1] * (n + 0.5) + 4}" text-anchor="end">'
        f"control {v:g}</text>"
        for n, v in enumerate(controls)
    ]
    for number, point in points.items():
        gain, pairs = _gain(found.search, number), found.search.pairs(number)
        x = _HEAD[0] + _CELL[0] * scales.index(point.scale)
        y = _HEAD[1] + _CELL[1] * controls.index(point.control_guidance)
        box = f'x="{x + 2}" y="{y + 2}" width="{_CELL[0] - 4}" height="{_CELL[1] - 4}"'
        side = "better" if gain.mean >= 0 else "worse"
        name = "default" if number == 0 else f"{gain.mean:+.{digits}f}"
        parts.append(
            f'<g><rect class="{side}" {box} fill-opacity="{0.75 * abs(gain.mean) / largest:.3f}"/>'
            f'<text x="{x + _CELL[0] / 2}" y="{y + 21}" text-anchor="middle">{name}</text>'
            f'<text x="{x + _CELL[0] / 2}" y="{y + 36}" font-size="11" text-anchor="middle">{pairs} pairs</text>'
            f"<title>{escape(describe_point(point))}: {gain.mean:+.{digits}f} "
            f"({gain.low:+.{digits}f} to {gain.high:+.{digits}f})</title>"
        )
        if number == found.recommended:
            parts.append(f'<rect class="ring" {box}/>')
        parts.append("</g>")
    return (
        f'<svg role="img" viewBox="0 0 {width} {height}" width="{width}" height="{height}">\n'
        + "\n".join(parts)
        + "\n</svg>"
    )


def _front(found: Sweep) -> str:
    """A scatter plot of the gain in control against the largest harm."""
    search, digits = found.search, METRICS[found.goal.metric].digits + 1
    spots = {number: (search.harm(number), _gain(search, number).mean) for number in search.values}
    front = set(search.front())
    harms, gains = [harm for harm, _ in spots.values()], [gain for _, gain in spots.values()]
    right, left = min(max(*harms, 1.5), 6.0), min(*harms, 0.0)
    top, bottom = max(gains), min(gains)
    span = (top - bottom) or 1.0
    top, bottom = top + 0.08 * span, bottom - 0.08 * span

    def place(harm: float, gain: float) -> tuple[float, float]:
        x = _LEFT + (_WIDE - _LEFT - 16) * (min(harm, right) - left) / (right - left)
        return x, 12 + (_HIGH - _BOTTOM - 12) * (top - gain) / (top - bottom)

    floor = _HIGH - _BOTTOM
    parts = []
    for harm in range(math.ceil(left), math.floor(right) + 1):
        x, _ = place(harm, 0)
        kind = "mark" if harm == 1 else "grid"
        parts.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="8" y2="{floor}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{harm}</text>')
    for gain in (bottom, 0.0, top):
        _, y = place(0, gain)
        if gain == 0.0 and not bottom <= 0 <= top:
            continue
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDE}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{gain:+.{digits}f}</text>')
    for kind, numbers in (("", set(spots) - front), ("adapter", front)):
        circles = []
        for number in sorted(numbers):
            x, y = place(*spots[number])
            radius = 6 if number in (0, found.recommended) else 4.5
            circles.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
                f"<title>{escape(describe_point(found.points[number]))}: "
                f"gain {spots[number][1]:+.{digits}f}, harm {spots[number][0]:+.2f} margins</title></circle>"
            )
        parts.append(f'<g class="dots {kind}">{"".join(circles)}</g>')
    x, y = place(*spots[0])
    parts.append(f'<text x="{x + 9:.1f}" y="{y + 4:.1f}">default</text>')
    if found.recommended:
        x, y = place(*spots[found.recommended])
        parts.append(f'<text x="{x + 9:.1f}" y="{y + 4:.1f}">recommended</text>')
    parts.append(
        f'<text class="tick" x="{_WIDE}" y="{_HIGH - 8}" text-anchor="end">largest harm in margins; points beyond '
        f"{right:g} stand at the right end</text>"
    )
    return (
        f'<figure class="plot front"><svg role="img" viewBox="0 0 {_WIDE} {_HIGH}" width="100%">\n'
        + "\n".join(parts)
        + "\n</svg></figure>"
    )


def _schedule(schedule: Schedule | None) -> str:
    if schedule is None:
        return '<p class="note">Not measured.</p>'
    rows = [
        [
            str(band.timestep),
            f"{band.strength.mean:.2f} <small>{_range(band.strength)}</small>",
            f"{band.factor:g}",
            f"{band.benefit.mean:.1%} <small>{_range(band.benefit, 100, 1)}</small>",
            f"{band.best_benefit.mean:.1%} <small>{_range(band.best_benefit, 100, 1)}</small>",
            " ".join(f"{loss:.4f}" for loss in band.losses),
        ]
        for band in schedule.bands
    ]
    headings = [
        "timestep",
        "strength of least loss",
        "factor offered",
        "loss taken away at 1",
        "at the fitted strength",
        f"loss at strength {', '.join(f'{value:g}' for value in STRENGTHS)}",
    ]
    verdict = {
        (False, False): "The interval of every fitted strength holds 1, so there is no schedule to test.",
        (True, True): "Pictures confirm the schedule of these factors.",
        (True, False): "Pictures do not confirm the schedule of these factors, so it is not recommended.",
    }[schedule.text is not None, schedule.is_kept]
    return f"""<p class="note">The diffusion loss of the pairs at fixed noise, without guidance, with the adapter's
features multiplied by each strength. A high timestep is a noisy picture. Intervals are 95 % bootstrap intervals over
the pairs. A factor other than 1 is offered only if its interval excludes 1. A lower loss is no proof of better
pictures.</p>
{table(headings, rows, "numbers")}
<p>{text(verdict)}{f" <code>{text(schedule.text)}</code>" if schedule.text else ""}</p>"""


def _range(interval: Interval, factor: float = 1.0, digits: int = 2) -> str:
    return f"{factor * interval.low:.{digits}f} to {factor * interval.high:.{digits}f}"


def _points(found: Sweep) -> str:
    search, goal = found.search, found.goal
    metrics = [goal.metric, *goal.limits]
    front = search.front()
    order = sorted(search.values, key=lambda number: (-search.pairs(number), -_gain(search, number).mean))
    rows = []
    for number in order:
        point, compared = found.points[number], _against_default(search, number)
        marks = ["default"] * (number == 0) + ["recommended"] * (number == found.recommended)
        marks += ["on the front"] * (number in front)
        cells = []
        for metric in metrics:
            shown = METRICS[metric]
            row = [value for value in search.values[number][metric] if value is not None]
            mean = f"{sum(row) / len(row):.{shown.digits + 1}f}" if row else "none"
            cells.append(
                f"{mean} <small>{_difference(goal, compared, metric, shown.digits)}</small>" if number else mean
            )
        note = f" <small>{', '.join(marks)}</small>" if marks else ""
        rows.append([f"{text(describe_point(point))}{note}", str(search.pairs(number)), *cells])
    targets = [found.targets.get(metric) for metric in metrics]
    shown = ["none" if v is None else f"{v:.{METRICS[m].digits + 1}f}" for m, v in zip(metrics, targets, strict=True)]
    rows.append(["true pictures (ceiling)", "all", *shown])
    return table(["point", "pairs", *(text(METRICS[metric].name) for metric in metrics)], rows, "numbers")


def _difference(goal: Goal, compared: Comparison, metric: str, digits: int) -> str:
    """The interval of the difference to the default, in the metric's own unit and direction."""
    if metric == goal.metric:
        interval, factor = compared.gain, goal.sign
    elif metric in compared.harms:
        interval, factor = compared.harms[metric], -goal.limits[metric].sign * goal.limits[metric].margin
    else:
        return "not measured"
    low, high = sorted((factor * interval.low, factor * interval.high))
    return f"{low:+.{digits + 1}f} to {high:+.{digits + 1}f}"


def _facts(settings: Mapping[str, Any]) -> str:
    rows: list[Sequence[str]] = [[text(name), f"<code>{text(value)}</code>"] for name, value in settings.items()]
    return table(["name", "value"], rows, "facts")
