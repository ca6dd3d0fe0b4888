"""Writes the source of the documentation site to build/docs, from the pages as they stand in the repository.

The pages are written for a reader of the repository: their links are paths to files, such as `../recipes/a.yaml`. On
the site each linked file has a place of its own, so that the folder `site` is complete without the repository.
`make docs` runs this file and then the site's generator, which reads mkdocs.yml.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "src/t2i_adapter/models/nano/README.md": "nano-card.md",
    "benchmarks/results/conditions_2cpu_2026-11-24.md": "conditions-time.md",
    "recipes": "recipes.md",
    "benchmarks/results": "results.md",
}
"""Path in the repository -> path on the site, of pages outside docs/. The last two are folders; `folders` makes their
pages."""
FILES = "files/"
"""Folder on the site of linked files that are no pages, under their paths in the repository."""
_LINK = re.compile(r"(?<=\]\()(?P<target>[^()\s#]+)(?:#(?P<heading>[^()\s]*))?(?=\))")


def place(path: str) -> str:
    """Returns the site's path of a file of the repository. Both are relative, with slashes."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else FILES + path


def links(text: str) -> Iterator[tuple[str, str]]:
    """Yields what a page's links name: an address or a relative path, and the heading after # or ""."""
    for found in _LINK.finditer(text):
        yield found["target"], found["heading"] or ""


def targets(text: str, page: str) -> Iterator[tuple[str, str]]:
    """Yields (path in the repository, heading or "") of a page's links, except those to addresses.

    page: its own path in the repository.
    """
    for target, heading in links(text):
        if "://" not in target:
            yield _path(target, page), heading


def for_site(text: str, page: str) -> str:
    """Returns the page's text with its links changed from paths in the repository to paths on the site."""
    here = posixpath.dirname(place(page)) or "."

    def change(found: re.Match[str]) -> str:
        if "://" in found["target"]:
            return found[0]
        heading = f"#{found['heading']}" if found["heading"] else ""
        return posixpath.relpath(place(_path(found["target"], page)), here) + heading

    return _LINK.sub(change, text)


def _path(target: str, page: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def without_front_matter(text: str) -> str:
    """Returns a page without the block of metadata that the hub reads."""
    return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)


def folders() -> dict[str, str]:
    """Returns path in the repository -> text of the pages that show a folder: recipes whole, results as links.

    Their links are those of a page in docs/.
    """
    files = sorted((ROOT / "recipes").glob("*.yaml"))
    recipes = [f"\n## {file.name}\n\n```yaml\n{file.read_text(encoding='utf-8').rstrip()}\n```\n" for file in files]
    names = sorted(file.name for file in (ROOT / "benchmarks" / "results").iterdir())
    results = [f"- [{name}](../benchmarks/results/{name})\n" for name in names]
    return {
        "recipes": "# Recipes\n\nA recipe is a file of options to start from.\n" + "".join(recipes),
        "benchmarks/results": "# Results\n\nThe files that programs of `benchmarks/` wrote.\n\n" + "".join(results),
    }


def pages() -> dict[str, str]:
    """Returns path in the repository -> text of all pages of the site, except those of `folders`."""
    inside = [f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md"))]
    outside = [path for path in OUTSIDE if path.endswith(".md")]
    return {path: (ROOT / path).read_text(encoding="utf-8") for path in inside + outside}


def navigation() -> list[str]:
    """Returns the pages that the navigation of mkdocs.yml names, as paths on the site."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    return [
        page for group in config["nav"] for entries in group.values() for entry in entries for page in entry.values()
    ]


def write_pages(out: Path) -> None:
    """Writes the site's source to the folder `out`: pages, recipes, pictures, and the files to which pages link."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(ROOT / "docs", out, ignore=shutil.ignore_patterns("*.md"))
    linked = set()
    for path, text in {**pages(), **folders()}.items():
        page = path if path.endswith(".md") else f"docs/{place(path)}"
        linked |= {target for target, _ in targets(text, page)}
        _write(out / place(path), for_site(without_front_matter(text), page))
    for path in linked:
        if place(path).startswith(FILES):
            (out / place(path)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, out / place(path))


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def differences() -> list[str]:
    """Returns the pages that the navigation does not name, and what it names that is no page, or names twice."""
    shown, there = navigation(), [place(path) for path in (*pages(), *folders())]
    return sorted({*(set(shown) ^ set(there)), *(page for page in shown if shown.count(page) > 1)})


if __name__ == "__main__":
    if differences():
        sys.exit(f"mkdocs.yml: the navigation names each page once; it differs in {', '.join(differences())}")
    write_pages(ROOT / "build" / "docs")
