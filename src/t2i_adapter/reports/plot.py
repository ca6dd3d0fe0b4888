"""Makes plots as SVG elements: the distribution of a metric as rows of dots, and lines over steps with their intervals.

Places along the axis are percentages of the width, so text and dots keep their size on every screen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

_LABEL, _BAND, _MEAN, _GAP = 20, 46, 14, 16
"""Heights in pixels of a row's label, its dots, its mean, and the space below it."""
_AXIS = 40
"""Height in pixels of the numbers and the mark below the rows."""
_BINS = 120
"""Places along the axis; the dots of one place are stacked."""
_ABOVE, _LINES, _BELOW = 18, 190, 26
"""Heights in pixels above the lines of a line plot, of the lines, and of the numbers below them."""
_ACROSS = 1000
"""Units of a line's own coordinates across the width, whatever the width in pixels is."""
_MOST_DOTS = 40
"""Points of a line that are shown as dots too."""


@dataclass(frozen=True)
class Dots:
    """A row of the plot.

    Attributes:
        name: CSS class of the row; letters, digits and "_".
        label: text at the row's left end.
        shown: text at its right end: the mean and its interval.
        values: one value a dot; None draws no dot.
        mean, low, high: the mean and the bounds of its interval.
    """

    name: str
    label: str
    shown: str
    values: Sequence[float | None]
    mean: float
    low: float
    high: float

    def quantiles(self) -> list[float]:
        """Returns minimum, lower quartile, median, upper quartile and maximum."""
        import numpy as np

        return np.quantile([value for value in self.values if value is not None], [0, 0.25, 0.5, 0.75, 1]).tolist()


def dot_plot(
    rows: Sequence[Dots],
    *,
    title: str,
    description: str,
    digits: int,
    most: float | None = None,
    mark: tuple[str, float] | None = None,
) -> str:
    """Returns the SVG element.

    Args:
        title, description: what a screen reader reads.
        digits: decimals of a dot's value.
        most: right end of the axis; None takes a round number above all values. The left end is 0.
        mark: text and place of a dashed line through all rows.
    """
    values = [value for row in rows for value in row.values if value is not None]
    ticks = _ticks(max([*values, mark[1] if mark else 0.0]) if most is None else most)
    end, height = ticks[-1], len(rows) * (_LABEL + _BAND + _MEAN + _GAP)
    parts = [f'<title id="plot-title">{escape(title)}</title><desc id="plot-text">{escape(description)}</desc>']
    for tick in ticks:
        anchor = "start" if tick == 0 else "end" if tick == end else "middle"
        x = _percent(tick / end)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="0" y2="{height}"/>')
        parts.append(f'<text class="tick" x="{x}" y="{height + 16}" text-anchor="{anchor}">{tick:g}</text>')
    if mark:
        x, anchor = _percent(mark[1] / end), "end" if mark[1] > end / 2 else "start"
        parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{_LABEL}" y2="{height + 22}"/>')
        parts.append(f'<text class="tick" x="{x}" y="{height + 34}" text-anchor="{anchor}">{escape(mark[0])}</text>')
    for number, row in enumerate(rows):
        parts += _row(row, number * (_LABEL + _BAND + _MEAN + _GAP), end, digits)
    return (
        f'<svg role="img" aria-labelledby="plot-title plot-text" width="100%" height="{height + _AXIS}">\n'
        + "\n".join(parts)
        + "\n</svg>"
    )


def _row(row: Dots, top: int, end: float, digits: int) -> Iterable[str]:
    dots = [(value, index) for index, value in enumerate(row.values) if value is not None]
    middle = top + _LABEL + _BAND / 2
    yield f'<g class="dots {row.name}">'
    yield f'<text class="name" x="0" y="{top + 14}">{escape(row.label)}</text>'
    yield f'<text class="value" x="100%" y="{top + 14}" text-anchor="end">{escape(row.shown)}</text>'
    if dots:
        _, lower, median, upper, _ = row.quantiles()
        yield (
            f'<rect class="quartiles" x="{_percent(lower / end)}" width="{_percent((upper - lower) / end)}"'
            f' y="{top + _LABEL}" height="{_BAND}"/>'
        )
        radius = 3.5 if len(dots) <= 64 else 2.5 if len(dots) <= 256 else 2
        for (value, index), offset in zip(dots, _offsets([value / end for value, _ in dots], radius), strict=True):
            yield (
                f'<circle cx="{_percent(value / end)}" cy="{middle + offset:.1f}" r="{radius}" data-pair="{index}">'
                f"<title>{value:.{digits}f}</title></circle>"
            )
        x = _percent(median / end)
        yield f'<line class="median" x1="{x}" x2="{x}" y1="{top + _LABEL}" y2="{top + _LABEL + _BAND}"/>'
    y = top + _LABEL + _BAND + _MEAN / 2
    low, mean, high = (_percent(value / end) for value in (row.low, row.mean, row.high))
    yield f'<line class="interval" x1="{low}" x2="{high}" y1="{y}" y2="{y}"/>'
    yield f'<circle class="mean" cx="{mean}" cy="{y}" r="4.5"/></g>'


def _offsets(shares: Sequence[float], radius: float) -> list[float]:
    """Returns each dot's distance in pixels from the middle of its row. Dots of one place are stacked around it."""
    places = [math.floor(share * _BINS) for share in shares]
    tallest = max(places.count(place) for place in set(places))
    step = min(2 * radius, (_BAND - 2 * radius) / max(1, tallest - 1))
    stacked = dict.fromkeys(places, 0)
    offsets = []
    for place in places:
        n = stacked[place]
        stacked[place] = n + 1
        offsets.append((n + 1) // 2 * step * (1 if n % 2 else -1))
    return offsets


def _ticks(most: float) -> list[float]:
    """Returns three to six round numbers from 0 to `most` or a little above it."""
    if most <= 0:
        return [0.0, 1.0]
    scale = 10.0 ** math.floor(math.log10(most))
    step = next(step * scale for step in (0.2, 0.25, 0.5, 1, 2) if math.ceil(most / (step * scale) - 1e-9) <= 5)
    return [round(n * step, 12) for n in range(math.ceil(most / step - 1e-9) + 1)]


def _percent(share: float) -> str:
    """A share of the width with 0.01 % precision; the bounds keep a rounded value inside."""
    return f"{100 * min(1.0, max(0.0, share)):.2f}%"


@dataclass(frozen=True)
class Line:
    """A line of a line plot.

    Attributes:
        name: CSS class, which chooses colour and dashes: "line0" to "line7"; "raw" is thin and pale.
        label: its name in the legend; "" shows none.
        points: (x, y), in the order of x.
        band: (x, low, high) of the interval around it; bounds may be infinite.
    """

    name: str
    label: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()


def line_plot(
    lines: Sequence[Line],
    *,
    title: str,
    description: str,
    show: Callable[[float], str] = "{:g}".format,
    within: tuple[float | None, float | None] = (None, None),
    zero: bool = False,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Returns a <figure> with the SVG element and its legend; "" if no line has a point.

    Args:
        title, description: what a screen reader reads; the title is printed above the plot too.
        show: a value as text, for the axis and the dots.
        within: values that no bound of the axis passes, such as (0, 1) of a share.
        zero: the axis holds 0.
        marks: (x, text) of dashed lines from top to bottom.
    """
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    ticks = _ticks_between(*_range(lines, within, zero))
    low, high = ticks[0], ticks[-1]
    width = (right - left) or 1.0

    def x_of(x: float) -> float:
        return min(1.0, max(0.0, (x - left) / width)) if right > left else 0.5

    def y_of(y: float) -> float:
        return _LINES * (1 - min(1.0, max(0.0, (y - low) / (high - low))))

    head = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    parts = [*_y_axis(ticks, y_of, show), *_x_axis(left, right, x_of), *_marks(marks, x_of)]
    shapes = "".join(shape for line in lines for shape in _shapes(line, x_of, y_of))
    parts.append(
        f'<svg y="{_ABOVE}" width="100%" height="{_LINES}" viewBox="0 0 {_ACROSS} {_LINES}" preserveAspectRatio="none">'
        f"{shapes}</svg>"
    )
    parts += [dot for line in lines for dot in _points(line, x_of, y_of, show)]
    height = _ABOVE + _LINES + _BELOW
    return (
        f'<figure class="plot lines"><figcaption>{escape(title)}</figcaption>\n{_legend(lines)}'
        f'<svg class="canvas" role="img" height="{height}">{head}\n' + "\n".join(parts) + "\n</svg></figure>"
    )


def _range(lines: Sequence[Line], within: tuple[float | None, float | None], zero: bool) -> tuple[float, float]:
    """The lowest and highest value to show: all points, and of the intervals as much again as the points span."""
    values = [y for line in lines for _, y in line.points] + [0.0] * zero
    least, most = min(values), max(values)
    room = (most - least) or abs(most) or 1.0
    ends = [end for line in lines for _, *bounds in line.band for end in bounds if math.isfinite(end)]
    low = max(min([least, *ends]), least - room)
    high = min(max([most, *ends]), most + room)
    if within[0] is not None:
        low = max(low, min(within[0], least))
    if within[1] is not None:
        high = min(high, max(within[1], most))
    return low, high


def _ticks_between(low: float, high: float) -> list[float]:
    """Three to seven round numbers, the first at `low` or below it, the last at `high` or above it."""
    span = high - low if high > low else abs(high) or 1.0
    scale = 10.0 ** math.floor(math.log10(span))
    steps = [step * scale for step in (0.1, 0.2, 0.25, 0.5, 1, 2)]
    step = next(step for step in steps if span / step <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, max(last, first + 1) + 1)]


def _y_axis(ticks: Sequence[float], y_of: Callable[[float], float], show: Callable[[float], str]) -> Iterable[str]:
    for tick in ticks:
        y = _ABOVE + y_of(tick)
        kind = "grid zero" if tick == 0 else "grid"
        yield f'<line class="{kind}" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="tick" x="-8" y="{y + 4:.1f}" text-anchor="end">{escape(show(tick))}</text>'


def _x_axis(left: float, right: float, x_of: Callable[[float], float]) -> Iterable[str]:
    ticks = [tick for tick in _ticks_between(left, right) if left <= tick <= right]
    for tick in ticks or [left]:
        place = x_of(tick)
        anchor = "start" if place < 0.02 else "end" if place > 0.98 else "middle"
        y = _ABOVE + _LINES + 16
        yield f'<text class="tick" x="{_percent(place)}" y="{y}" text-anchor="{anchor}">{tick:,.10g}</text>'


def _marks(marks: Sequence[tuple[float, str]], x_of: Callable[[float], float]) -> Iterable[str]:
    for x, name in marks:
        place = x_of(x)
        at = _percent(place)
        side = 'dx="-4" text-anchor="end"' if place > 0.5 else 'dx="4"'
        yield f'<line class="mark" x1="{at}" x2="{at}" y1="4" y2="{_ABOVE + _LINES}"/>'
        yield f'<text class="tick" x="{at}" y="12" {side}>{escape(name)}</text>'


def _shapes(line: Line, x_of: Callable[[float], float], y_of: Callable[[float], float]) -> Iterable[str]:
    """The line and its band in units of `_ACROSS` and pixels."""
    if len(line.band) > 1:
        upper = [f"{_ACROSS * x_of(x):.1f},{y_of(high):.1f}" for x, _, high in line.band]
        lower = [f"{_ACROSS * x_of(x):.1f},{y_of(low):.1f}" for x, low, _ in reversed(line.band)]
        yield f'<polygon class="band {line.name}" points="{" ".join(upper + lower)}"/>'
    if len(line.points) > 1:
        places = " ".join(f"{_ACROSS * x_of(x):.1f},{y_of(y):.1f}" for x, y in line.points)
        yield f'<polyline class="curve {line.name}" points="{places}"/>'


def _points(
    line: Line, x_of: Callable[[float], float], y_of: Callable[[float], float], show: Callable[[float], str]
) -> Iterable[str]:
    """Dots of a line of few points, each with its value, and the interval of a line of one point."""
    if len(line.points) > _MOST_DOTS or line.name == "raw":
        return
    if len(line.band) == 1:
        (x, low, high), at = line.band[0], _percent(x_of(line.band[0][0]))
        ends = f'y1="{_ABOVE + y_of(low):.1f}" y2="{_ABOVE + y_of(high):.1f}"'
        yield f'<line class="interval {line.name}" x1="{at}" x2="{at}" {ends}/>'
    for x, y in line.points:
        place = f'cx="{_percent(x_of(x))}" cy="{_ABOVE + y_of(y):.1f}"'
        shown = escape(f"{line.label}: {show(y)} at {x:,.10g}".removeprefix(": "))
        yield f'<circle class="{line.name}" {place} r="3"><title>{shown}</title></circle>'


def _legend(lines: Sequence[Line]) -> str:
    named = [line for line in lines if line.label and line.points]
    if len(named) < 2:
        return ""
    entries = "".join(
        f'<li><svg width="28" height="10" aria-hidden="true"><line class="curve {line.name}" x1="0" x2="28" y1="5" '
        f'y2="5"/></svg>{escape(line.label)}</li>'
        for line in named
    )
    return f'<ul class="legend">{entries}</ul>\n'


def thin(points: Sequence[tuple[float, float]], most: int = 300) -> list[tuple[float, float]]:
    """At most `most` points that keep the outline of a longer line: the lowest and the highest of each stretch."""
    if len(points) <= most:
        return list(points)
    length = math.ceil(len(points) / (most // 2))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), length):
        stretch = points[start : start + length]
        kept += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return kept


def smooth(points: Sequence[tuple[float, float]], most: int = 150) -> list[tuple[float, float]]:
    """The mean of each of at most `most` stretches of a line, at the stretch's end."""
    length = max(1, math.ceil(len(points) / most), min(10, len(points) // 8))
    stretches = [points[start : start + length] for start in range(0, len(points), length)]
    return [(stretch[-1][0], sum(y for _, y in stretch) / len(stretch)) for stretch in stretches]
