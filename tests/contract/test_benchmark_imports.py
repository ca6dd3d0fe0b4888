"""The programs of benchmarks/ import from each other what is there. Most run for minutes, so no test runs them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
PROGRAMS = {file.stem: ast.parse(file.read_text(), str(file)) for file in sorted(FOLDER.glob("*.py"))}


def defined(tree: ast.Module) -> set[str]:
    """Names that a module has: defined, assigned or imported, at any depth."""
    names = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return names


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_a_program_imports_from_another_is_there(program: str):
    missing = [
        f"line {node.lineno}: {node.module} has no {alias.name}"
        for node in ast.walk(PROGRAMS[program])
        if isinstance(node, ast.ImportFrom) and node.module in PROGRAMS
        for alias in node.names
        if alias.name not in defined(PROGRAMS[node.module])
    ]
    assert missing == []
