"""Writes a picture's parameters into its PNG file, in the form that A1111's web UI writes and other programs read.

Importing this module loads no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from PIL.PngImagePlugin import PngInfo

KEYWORD = "parameters"
"""Name of the text chunk."""


def parameters(prompt: str, negative: str | None, fields: Mapping[str, Any]) -> str:
    """Returns the text: the prompt, a line "Negative prompt: ..." if there is one, and a line "Name: value, ..."."""
    last = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in fields.items())
    return "\n".join([prompt, *([f"Negative prompt: {negative}"] if negative else []), last])


def png_info(text: str) -> PngInfo:
    """Returns the chunk for `Image.save`: tEXt if Latin-1 can write the text, iTXt in UTF-8 if it cannot."""
    info = PngInfo()
    info.add_text(KEYWORD, text)
    return info


def _quoted(value: str) -> str:
    """A value that holds a comma, colon, quote or line break is written as a JSON string."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',:"\n') else value
