"""Makes a sheet of pictures as one image: a row for each pair, a column for each kind of picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

MAX_CELL = 256  # pixels of a side; larger pictures are scaled down
_GAP = 6  # pixels
_TEXT = 12  # font size in pixels
_INK, _PAPER, _FAINT = (20, 20, 20), (255, 255, 255), (110, 110, 110)


@dataclass(frozen=True)
class SheetRow:
    """The pictures of one pair, and the line of text below them."""

    pictures: Sequence[Image.Image]
    caption: str


def make_sheet(headings: Sequence[str], rows: Sequence[SheetRow], blocks: int = 2) -> Image.Image:
    """Lays the rows out in `blocks` columns of rows, each under its own headings.

    All pictures have the same size, and each row has one picture for each heading.
    """
    blocks = min(blocks, len(rows))
    cell = thumbnail(rows[0].pictures[0]).size
    lines = -(-len(rows) // blocks)
    block_width = len(headings) * (cell[0] + _GAP) + 2 * _GAP
    row_height = cell[1] + _line_height() + _GAP
    sheet = Image.new("RGB", (blocks * block_width + _GAP, _line_height() + 2 * _GAP + lines * row_height), _PAPER)
    for i, row in enumerate(rows):
        left, top = (i // lines) * block_width + 2 * _GAP, _line_height() + 2 * _GAP + (i % lines) * row_height
        _draw_row(sheet, row, left, top, cell)
        if i % lines == 0:
            for n, heading in enumerate(headings):
                _write(sheet, heading, left + n * (cell[0] + _GAP), _GAP, cell[0], _INK)
    return sheet


def thumbnail(picture: Image.Image) -> Image.Image:
    """Returns the picture as RGB, scaled down to at most MAX_CELL pixels a side."""
    smaller = picture.convert("RGB")
    smaller.thumbnail((MAX_CELL, MAX_CELL), Image.Resampling.LANCZOS)
    return smaller


def _draw_row(sheet: Image.Image, row: SheetRow, left: int, top: int, cell: tuple[int, int]) -> None:
    for n, picture in enumerate(row.pictures):
        sheet.paste(thumbnail(picture), (left + n * (cell[0] + _GAP), top))
    width = len(row.pictures) * (cell[0] + _GAP) - _GAP
    _write(sheet, row.caption, left, top + cell[1] + 1, width, _FAINT)


def _write(sheet: Image.Image, text: str, left: int, top: int, width: int, color: tuple[int, int, int]) -> None:
    """Draws one line of text; a line wider than `width` pixels is shortened and ends in "..."."""
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT)
    shown = line = " ".join(text.split())
    while line and draw.textlength(shown, font) > width:
        line = line[:-1]
        shown = line + "..."
    draw.text((left, top), shown, color, font)


def _line_height() -> int:
    return _TEXT + 4
