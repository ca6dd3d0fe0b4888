"""Draws the distribution of a metric as one SVG element: a row of dots for each column, with mean and interval.

Places along the axis are percentages of the width, so text and dots keep their size on every screen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

_LABEL, _BAND, _MEAN, _GAP = 20, 46, 14, 16
"""Heights in pixels of a row's label, its dots, its mean, and the space below it."""
_AXIS = 40
"""Height in pixels of the numbers and the mark below the rows."""
_BINS = 120
"""Places along the axis; the dots of one place are stacked."""


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
