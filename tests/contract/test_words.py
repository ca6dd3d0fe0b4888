"""The wording that docs/style.md replaces does not come back, in the package's text or on its pages."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [
    *sorted((ROOT / "src").rglob("*.py")),
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "style.md"),
    *sorted(ROOT.glob("*.md")),
]
REPLACED = {
    r"no finite number|numbers? that (is|are) none": "NaN, inf, non-finite",
    r"\bpass(ed|es|ing)? over\b(?! the data)": "skip",
    r"\blanes?\b": "CPU threads",
    r"\b(tells?|told)\b(?! apart)": "prints, returns, says which",
    r"\bnarrow (layers|copies|weights)\b": "quantised",
    r"\bforg(ot|otten|et)\b": "recompute",
    r"\b(go|goes|went) on from\b": "resume",
    r"\bof nobody\b|\bnone of (this|these) (program|programs)\b": "unknown, malformed",
    r'^"""The same\b': "a description",
}
"""Pattern -> the words to use instead."""
FORMER_NAMES = {"recipe.py": {"lanes"}}
"""Names that a file must know because recipes written before have them."""


def prose(file: Path) -> list[tuple[int, str]]:
    """(line, text) of the comments and strings of a Python file, or of the lines of a page."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return list(enumerate(text.splitlines(), 1))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    wanted = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)}
    return [(token.start[0], token.string) for token in tokens if token.type in wanted]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_replaced_words_do_not_appear(file: Path) -> None:
    for line, text in prose(file):
        for pattern, instead in REPLACED.items():
            found = re.search(pattern, text, re.IGNORECASE)
            if found and found[0] not in FORMER_NAMES.get(file.name, set()):
                raise AssertionError(f"{file}:{line}: {found[0]!r}; docs/style.md says: {instead}")
