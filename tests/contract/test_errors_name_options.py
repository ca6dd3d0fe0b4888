"""Errors name options of the tree: every `option=` and `flag()` exists, and no core file names the script's flags."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from t2i_adapter.cli import VERBS
from t2i_adapter.config.read import option_types
from t2i_adapter.config.tree import Config
from t2i_adapter.imports import resolve
from t2i_adapter.script_flags import ROWS

SRC = Path(__file__).parents[2] / "src" / "t2i_adapter"
FRONT = {"script.py", "script_flags.py", "flags.py", "cli.py"}
"""The front doors, which translate between dialects."""
FILES = [file for file in sorted(SRC.rglob("*.py")) if file.name not in FRONT]
OF_VERBS = {path for verb in VERBS.values() for path in option_types(resolve(verb.options))}
KNOWN = {*option_types(Config), *OF_VERBS, "recipe"}
THEIRS = {row.flag for row in ROWS if row.flag not in KNOWN}


def literals(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of every string in the code, docstrings too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SRC)))
def test_options_exist_and_flags_of_the_script_do_not_appear(file: Path) -> None:
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        named = [k.value for k in node.keywords if k.arg == "option"] if node.func.id == "UserError" else []
        named += node.args[:1] if node.func.id == "flag" else []
        for value in named:
            if isinstance(value, ast.Constant) and value.value is not None:
                assert value.value in KNOWN, f"{file}:{node.lineno}: there is no option {value.value}"
    for line, text in literals(tree):
        wrong = [name for name in re.findall(r"--([a-z_0-9]+)(?![\w.])", text) if name in THEIRS]
        assert not wrong, f"{file}:{line}: names --{wrong[0]}, a flag of the diffusers script"
