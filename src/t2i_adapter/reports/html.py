"""Makes self-contained HTML pages: style, script and pictures are inline, and a policy in the head forbids all else.

The policy names the style and the script by their digests. So no other script or style runs, even if a text of a
dataset were not escaped.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from t2i_adapter.errors import redact

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST = 384
"""Pixels of a side of an inline picture, unless the caller asks for another size."""
QUALITY, SCALED_QUALITY = 90, 80
"""WebP quality of a lossy picture at its own size, and of one that was scaled down."""
_FEW_COLORS = 16
"""Pictures with so few colours (maps of lines, masks) are lossless; they are smaller that way."""


def make_page(title: str, body: str, *, viewer: bool = False, script: str = "") -> str:
    """Returns a whole document.

    Args:
        title: text, which is escaped.
        body: HTML.
        viewer: adds the script that opens pictures large. It expects the elements of `evaluation/page.py`.
        script: name of the one script to add instead, such as "steps.js", a file beside this one; "" adds none.
    """
    style = _resource("page.css")
    policy = f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; base-uri 'none'; form-action 'none'"
    if viewer:
        body += f"\n{_resource('viewer.html')}"
        script = "viewer.js"
    if script:
        code = _resource(script)
        policy += f"; script-src '{_digest(code)}'"
        body += f"<script>{code}</script>"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{text(title)}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def text(value: object) -> str:
    """Returns any text as HTML: escaped, without secrets, and with unprintable characters as escapes."""
    return escape(redact(str(value)))


def quoted(value: object) -> str:
    """Returns a text from a dataset as HTML; its writing direction does not change that of the text around it."""
    return f'<bdi dir="auto">{text(value)}</bdi>' if str(value).strip() else '<i class="faint">(empty)</i>'


def table(headings: Iterable[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Returns an HTML table. Headings and cells are HTML; the first cell of a row is its heading. `kind`: CSS class.

    On small screens the cells of a row stand below each other, each with its heading.
    """
    names = list(headings)
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    lines = []
    for first, *cells in rows:
        data = (
            f'<td><span class="label">{name}</span><span>{cell}</span></td>'
            for name, cell in zip(names[1:], cells, strict=True)
        )
        lines.append(f'<tr><th scope="row">{first}</th>{"".join(data)}</tr>')
    return f'<table class="{kind}">\n<thead><tr>{head}</tr></thead>\n<tbody>{"".join(lines)}</tbody>\n</table>'


def inline_image(picture: Image, alt: str = "", *, largest: int = LARGEST, lossless: bool = False) -> str:
    """Returns an <img> element that holds the picture as WebP, scaled down to at most `largest` pixels a side."""
    return webp_image(*to_webp(picture, largest=largest, lossless=lossless), alt)


def to_webp(picture: Image, *, largest: int, lossless: bool = False) -> tuple[bytes, tuple[int, int]]:
    """Returns the picture as a WebP file, scaled down to at most `largest` pixels a side, and its (width, height)."""
    from PIL.Image import Resampling

    smaller = picture.convert("RGB")
    smaller.thumbnail((largest, largest), Resampling.LANCZOS)
    quality = QUALITY if smaller.size == picture.size else SCALED_QUALITY
    return _encode(smaller, lossless, quality), smaller.size


def webp_image(file: bytes, size: tuple[int, int], alt: str = "", more: str = "") -> str:
    """Returns an <img> element that holds a WebP file. size: (width, height) in pixels; more: further attributes."""
    data = base64.b64encode(file).decode()
    shown = f'width="{size[0]}" height="{size[1]}"{more and " "}{more}'
    return f'<img alt="{text(alt)}" {shown} decoding="async" src="data:image/webp;base64,{data}">'


def _encode(picture: Image, lossless: bool, quality: int) -> bytes:
    buffer = io.BytesIO()
    if lossless or picture.getcolors(_FEW_COLORS):
        picture.save(buffer, "WEBP", lossless=True, method=0, quality=0)
    else:
        picture.save(buffer, "WEBP", method=2, quality=quality)
    return buffer.getvalue()


@cache
def _resource(name: str) -> str:
    return files("t2i_adapter.reports").joinpath(name).read_text(encoding="utf-8")


def _digest(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
