"""Imports point one way, no two files import each other, and what answers `--help` loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from t2i_adapter.cli import VERBS

SRC = Path(__file__).parents[2] / "src"
DESIGN = Path(__file__).parents[2] / "docs" / "design.md"
LAYERS = (
    *("errors", "files", "tensors", "types", "statistics", "abilities", "cards", "devices", "config"),
    *("imports", "environment", "progress", "flags", "exits"),
    *("diffusion", "models", "annotators", "data", "cache", "batches", "generation", "reports", "evaluation"),
    *("doctor", "export", "runs", "training", "verbs", "api", "script_flags", "script", "cli", "studio", "__main__"),
)
"""Folders and files of the package: each may import those before it, and none of those after it."""
HEAVY = ("torch", "diffusers", "transformers", "datasets", "accelerate", "cv2", "numpy", "PIL")
LIGHT = sorted(
    {f"t2i_adapter{name}" for name in ("", ".cli", ".flags", ".script", ".config.recipe", ".types", ".errors")}
    | {verb.options.partition(":")[0] for verb in VERBS.values()}
)
RANK = {name: rank for rank, name in enumerate(LAYERS)}
MODULES = sorted((SRC / "t2i_adapter").rglob("*.py"))


def name_of(file: Path) -> str:
    """Dotted module of a file; a package for its `__init__.py`."""
    return ".".join(file.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")


NAMES = {name_of(file): file for file in MODULES}


def part_of(module: str) -> str:
    """The folder or top module of the package that a dotted module belongs to; "" is the package itself."""
    return [*module.split("."), ""][1]


def imports(file: Path, *, at_run_time: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of everything of ours that `file` imports. at_run_time: without `if TYPE_CHECKING`."""
    inside = file.relative_to(SRC).with_suffix("").parts
    package = inside[:-1]
    tree = ast.parse(file.read_text(), str(file))
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if at_run_time and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped.update(below for statement in node.body for below in ast.walk(statement))
        if node in skipped:
            continue
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
    part = part_of(name_of(file))
    assert not part or part in RANK, f"{part} has no place in the order of imports: give it one, or move it"
    wrong = [
        f"{file}:{line}: {part or 't2i_adapter'} imports {name}"
        for line, name in imports(file)
        if (used := part_of(name)) in RANK and RANK[used] > RANK.get(part, RANK["api"])  # the package shows the API
    ]
    unknown = [name for _, name in imports(file) if part_of(name) not in {*RANK, "", "__version__"}]
    assert not wrong and not unknown, "\n".join([*wrong, *unknown])


def test_no_files_import_each_other() -> None:
    graph = {
        name: {
            used
            for _, target in imports(file, at_run_time=True)
            for used in (target, target.rpartition(".")[0])
            if used in NAMES and used != name
        }
        for name, file in NAMES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as fault:
        raise AssertionError(f"a cycle of imports: {' -> '.join(fault.args[1])}") from None


def test_the_design_lists_every_folder_in_this_order() -> None:
    rows = [line for line in DESIGN.read_text().splitlines() if line.startswith("| `")]
    listed = [name.removesuffix("/").removesuffix(".py") for row in rows for name in row.split("|")[1].split("`")[1::2]]
    assert listed == list(LAYERS)


@pytest.mark.parametrize("module", LIGHT)
def test_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
