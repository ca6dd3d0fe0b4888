"""Makes a sheet of pictures as one image: a row for each pair, a column for each kind of picture.

A sheet has a fixed width of twice the width at which a page usually shows it, so its text stays sharp there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

WIDTH = 1600  # pixels
_MARGIN, _GAP = 24, 12  # pixels
_TITLE, _TEXT = 30, 24  # font sizes in pixels
_INK, _PAPER, _FAINT, _LINE = (21, 24, 29), (255, 255, 255), (89, 97, 109), (221, 225, 231)


@dataclass(frozen=True)
class SheetRow:
    """The pictures of one pair, and the line of text above them."""

    pictures: Sequence[Image.Image]
    caption: str


def make_sheet(headings: Sequence[str], rows: Sequence[SheetRow], blocks: int = 2, title: str = "") -> Image.Image:
    """Lays the rows out in `blocks` columns of rows, each under its own headings, below one line of text, `title`.

    All cells have the size that fits the width. Their aspect ratio is the first picture's; a picture of another one is
    centred. Each row has one picture for each heading. A line that is too long is shortened and ends in "...".
    """
    blocks = min(blocks, len(rows))
    columns = blocks * len(headings)
    first = rows[0].pictures[0]
    width = (WIDTH - 2 * _MARGIN - (columns - 1) * _GAP) // columns
    cell = width, max(1, round(width * first.height / first.width))
    lines = -(-len(rows) // blocks)
    head = _MARGIN + (_line(_TITLE) + _GAP) * bool(title) + (_line(_TEXT) + _GAP) * any(headings)
    row_height = _line(_TEXT) + cell[1] + 2 * _GAP
    sheet = Image.new("RGB", (WIDTH, head + lines * row_height + _MARGIN - _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        _write(draw, title, (_MARGIN, _MARGIN), WIDTH - 2 * _MARGIN, _INK, _TITLE)
    for number, row in enumerate(rows):
        block, line = divmod(number, lines)
        left = _MARGIN + block * len(headings) * (cell[0] + _GAP)
        top = head + line * row_height
        if line == 0:
            for n, heading in enumerate(headings):
                place = left + n * (cell[0] + _GAP), head - _line(_TEXT) - _GAP // 2
                _write(draw, heading, place, cell[0], _INK, _TEXT)
        _write(draw, row.caption, (left, top), len(headings) * (cell[0] + _GAP) - _GAP, _FAINT, _TEXT)
        for n, picture in enumerate(row.pictures):
            _paste(sheet, picture, (left + n * (cell[0] + _GAP), top + _line(_TEXT)), cell)
    return sheet


def _paste(sheet: Image.Image, picture: Image.Image, place: tuple[int, int], cell: tuple[int, int]) -> None:
    """Draws the picture in its cell, with a thin frame that separates white pictures from the paper."""
    share = min(cell[0] / picture.width, cell[1] / picture.height)
    size = max(1, round(picture.width * share)), max(1, round(picture.height * share))
    left, top = place[0] + (cell[0] - size[0]) // 2, place[1] + (cell[1] - size[1]) // 2
    sheet.paste(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS), (left, top))
    ImageDraw.Draw(sheet).rectangle((left - 1, top - 1, left + size[0], top + size[1]), outline=_LINE)


def _write(
    draw: ImageDraw.ImageDraw, text: str, place: tuple[int, int], width: int, color: tuple[int, int, int], size: int
) -> None:
    """Draws one line. A title is drawn smaller, down to the size of the text, before it is shortened."""
    shown = line = " ".join(text.split())
    font = ImageFont.load_default(size)
    while size > _TEXT and draw.textlength(line, font) > width:
        size -= 1
        font = ImageFont.load_default(size)
    while line and draw.textlength(shown, font) > width:
        line = line[:-1]
        shown = line + "..."
    draw.text(place, shown, color, font)


def _line(size: int) -> int:
    """Height of a line of text in pixels."""
    return round(1.4 * size)
