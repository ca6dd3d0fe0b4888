"""The notebook of the documentation runs from its first cell to its last, in a process of its own."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
NOTEBOOK = DOCS / "notebook.ipynb"


def cells(kind: str) -> list[str]:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]


def shown(cell: str) -> str:
    """The cell as a program that prints what a notebook shows of it: its last expression."""
    *before, last = ast.parse(cell).body
    if not isinstance(last, ast.Expr) or (isinstance(last.value, ast.Call) and ast.unparse(last.value.func) == "print"):
        return cell
    return "\n".join([*map(ast.unparse, before), f"print('shows', {ast.unparse(last.value)})"])


def test_every_cell_runs(tmp_path: Path) -> None:
    program = tmp_path / "notebook.py"
    program.write_text("\n".join(map(shown, cells("code"))), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, program], cwd=tmp_path, capture_output=True, text=True, timeout=400, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^True \(60, 0\.0\d+\)$", done.stdout, re.MULTILINE), done.stdout
    assert done.stdout.count("shows <PIL.Image.Image image mode=RGB size=128x128") == 2
    assert "The adapter reads the condition" in done.stdout


def test_it_holds_no_outputs_and_no_counts() -> None:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in content["cells"])


def test_the_page_names_what_the_package_has() -> None:
    import t2i_adapter

    page = (DOCS / "python.md").read_text(encoding="utf-8")
    for program in re.findall(r"(?:^    .*\n|^\n(?=    |\n    ))+", page, re.MULTILINE):
        for node in ast.walk(ast.parse("\n".join(line[4:] for line in program.splitlines()))):
            if isinstance(node, ast.ImportFrom) and node.module == "t2i_adapter":
                assert {alias.name for alias in node.names} <= set(t2i_adapter.__all__)
    assert set(t2i_adapter.__all__) - {"Config", "Run"} <= set(re.findall(r"\w+", page))
