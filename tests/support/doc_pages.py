"""The pages of the documentation, and the commands and code that they show."""

from __future__ import annotations

import re
from pathlib import Path

from t2i_adapter.cli import PROG

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "recipes").glob("*.yaml"))]
"""Markdown pages, and the recipes: their comments show commands too."""
LAUNCHERS = ("accelerate launch", "torchrun", "python")
SHOWS_A_MISTAKE = "error:"
"""The line after a command begins so if the page shows what a wrong command prints."""


def commands(page: Path) -> list[str]:
    """Returns the command lines of a page: indented, fenced, or after `# ` or `$ `. Joins continued lines."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    lines = [re.sub(r"^(\s|#|\$ )+", "", line) for line in text.splitlines()]
    found = []
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        starts = (f"{PROG} ", *LAUNCHERS, "make ")
        if line.startswith(starts) and not after.startswith(SHOWS_A_MISTAKE) and not line.endswith(":"):
            found.append(line)
    return found


def code(page: Path, first: str) -> str:
    """Returns a page's indented block of code whose first line is `first`."""
    lines = page.read_text(encoding="utf-8").splitlines()
    inside = lines[lines.index(f"    {first}") :]
    end = next(i for i, line in enumerate(inside) if line.strip() and not line.startswith("    "))
    return "\n".join(line.removeprefix("    ") for line in inside[:end]).rstrip() + "\n"
