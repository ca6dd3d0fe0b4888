"""Makes self-contained HTML pages: pictures are inline, and a policy in the head forbids scripts and loading."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

from PIL import Image

from t2i_adapter.reports.sheet import thumbnail

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #1c1c1c; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .35rem .7rem; text-align: left; }
th { border-bottom: 2px solid #999; } td { border-bottom: 1px solid #ddd; } td.number { white-space: nowrap; }
small { color: #666; } img { display: block; max-width: 100%; } code { overflow-wrap: anywhere; }
"""


def make_page(title: str, body: str) -> str:
    """Returns a whole document. `title` is text and is escaped; `body` is HTML."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
</body>
</html>
"""


def table(headings: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns an HTML table. Headings and cells are HTML."""
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"


def inline_image(picture: Image.Image) -> str:
    """Returns an <img> element that holds the picture's thumbnail as PNG."""
    buffer = io.BytesIO()
    thumbnail(picture).save(buffer, "PNG", optimize=True)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
