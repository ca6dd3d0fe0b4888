"""Imports point one way, and what answers `--help` loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from t2i_adapter.cli import VERBS

SRC = Path(__file__).parents[2] / "src"
LAYERS = (
    "errors files types config load",
    "diffusion",
    "models",
    "sources",
    "conditions",
    "cache",
    "batches",
    "generation",
    "evaluation",
    "annotation",
    "doctor",
    "export",  # before training, which saves and publishes through it
    "training",
    "nano_maker",
)
TOP = {"cli", "compat", "flags", "demo", "demo_options", "__main__"}
"""May use everything; nothing below uses them."""
HEAVY = ("torch", "diffusers", "transformers", "datasets", "accelerate", "cv2", "numpy", "PIL")
LIGHT = sorted(
    {f"t2i_adapter{name}" for name in ("", ".cli", ".flags", ".compat", ".load", ".config", ".types", ".errors")}
    | {verb.options.partition(":")[0] for verb in VERBS.values()}
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}
MODULES = sorted((SRC / "t2i_adapter").rglob("*.py"))


def part_of(module: str) -> str:
    """The folder or top module of the package that a dotted module belongs to; "" is the package itself."""
    return [*module.split("."), ""][1]


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of everything of ours that `file` imports, at its top or in a function."""
    inside = file.relative_to(SRC).with_suffix("").parts
    package = inside[:-1]
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [start, node.module or ""]))
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "t2i_adapter")


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(SRC)))
def test_imports_point_down(file: Path) -> None:
    part = part_of(".".join(file.relative_to(SRC).with_suffix("").parts)).removesuffix("__init__")
    if part in TOP:
        return
    assert not part or part in RANK, f"{part} has no place in the order of imports: give it one, or move it"
    wrong = [
        f"{file}:{line}: {part or 't2i_adapter'} imports {name}"
        for line, name in imports(file)
        if (used := part_of(name)) in TOP or RANK.get(used, -1) > RANK.get(part, -1)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", LIGHT)
def test_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
