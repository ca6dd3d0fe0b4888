"""Every text file of the package is read and written as UTF-8, whatever the locale."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src" / "t2i_adapter"
FILES = sorted(SRC.rglob("*.py"))
MODE = re.compile("[rwaxt+]*")  # without b


def text_calls_without_encoding(code: str) -> Iterator[int]:
    """Lines of calls that open a text file in the locale's encoding."""
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        modes = [*node.args, *(word.value for word in node.keywords if word.arg == "mode")]
        if isinstance(node.func, ast.Name):
            modes = modes[1:]  # open(FILE, MODE)
        plain = [mode.value for mode in modes if isinstance(mode, ast.Constant)]
        opens_text = name == "open" and ((plain and MODE.fullmatch(str(plain[0]))) or not modes)
        is_text = any(word.arg in ("text", "universal_newlines") for word in node.keywords)
        if name in ("read_text", "write_text") or opens_text or (name in ("run", "Popen", "check_output") and is_text):
            yield node.lineno


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SRC)))
def test_text_files_name_their_encoding(file: Path):
    assert list(text_calls_without_encoding(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("code", "is_found"),
    [
        ("p.read_text()", True),
        ("p.write_text(x)", True),
        ("p.open()", True),
        ("p.open('a')", True),
        ("open(p)", True),
        ("open(p, 'w')", True),
        ("run(x, text=True)", True),
        ("p.write_text(x, encoding='utf-8')", False),
        ("p.open('rb')", False),
        ("open(p, 'wb')", False),
        ("Image.open(p)", False),
        ("os.open(p, flags)", False),
    ],
)
def test_the_search_finds_what_depends_on_the_locale(code: str, is_found: bool):
    assert bool(list(text_calls_without_encoding(code))) is is_found
