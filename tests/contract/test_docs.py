"""This version accepts every command that the documentation shows, and every file that a page names exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import docs_site
import pytest
import yaml
from nano_maker.__main__ import parser as nano_maker_parser
from support.doc_pages import PAGES, code, commands

from t2i_adapter import script
from t2i_adapter.cli import PROG, VERBS
from t2i_adapter.config.recipe import load
from t2i_adapter.config.tree import Config
from t2i_adapter.flags import parse_flags, parse_train
from t2i_adapter.imports import resolve

ROOT = Path(__file__).resolve().parents[2]
SHOWN = [(page, command) for page in PAGES for command in commands(page)]


def test_there_are_commands_to_check():
    assert len(SHOWN) > 20


@pytest.mark.parametrize(("page", "command"), SHOWN, ids=[f"{page.name}: {command[:60]}" for page, command in SHOWN])
def test_a_shown_command_parses(page: Path, command: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        _check_make(words)
    elif "train_t2i_adapter_sdxl.py" in words:
        script.parse(words[words.index("train_t2i_adapter_sdxl.py") + 1 :])
    elif "t2i_adapter" in words and words[words.index("t2i_adapter") - 1] == "-m":
        _check_verb(words[words.index("t2i_adapter") + 1 :])
    elif words[0] == PROG:
        _check_verb(words[1:])
    elif words[:3] == ["python", "-m", "nano_maker"]:
        assert "PYTHONPATH=tools" in page.read_text(encoding="utf-8")
        nano_maker_parser().parse_args(words[3:])
    else:
        _check_file(words)


def _check_make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert words[1] in targets
    for name in (word.removeprefix("NAME=") for word in words[2:] if word.startswith("NAME=")):
        assert (ROOT / "benchmarks" / f"{name}.py").is_file()


def _check_verb(words: list[str]) -> None:
    if words[0] in ("VERB", "--help", "--version") or "--help" in words:
        return
    name = " ".join(words[:2]) if " ".join(words[:2]) in VERBS else words[0]
    rest = words[len(name.split()) :]
    if VERBS[name].options == VERBS["train"].options:
        parse_train(_with_recipe_of_ours(rest), PROG)
        return
    parse_flags(resolve(VERBS[name].options), rest, PROG)


def test_every_verb_has_a_row_in_the_table_of_verbs():
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    named = {
        name for row in re.findall(r"^\| (`.+?) \|", page, flags=re.MULTILINE) for name in re.findall("`(.+?)`", row)
    }
    assert set(VERBS) <= named


def _with_recipe_of_ours(words: list[str]) -> list[str]:
    """The words with a recipe of the repository in place of one that a reader writes or a run has written."""
    return [
        "recipes/nano-shapes.yaml" if before == "--recipe" and not (ROOT / word).is_file() else word
        for before, word in zip(["", *words], words, strict=False)
    ]


def test_the_recipe_of_a_page_is_read(tmp_path: Path):
    recipe = tmp_path / "millions.yaml"
    recipe.write_text(code(ROOT / "docs" / "millions.md", "# millions.yaml"))
    config = load(recipe, Config())
    assert config.data.location == "shards/{0000..0999}.tar" and config.checkpoint.resume == "auto"


def _check_file(words: list[str]) -> None:
    """`python FILE ...`, or `python -m t2i_adapter.MODULE ...`."""
    if words[1] == "-m":
        parts = words[2].split(".")
        place = ROOT.joinpath("src", *parts)
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()
    else:
        assert (ROOT / words[1]).is_file()


PATHS = list(docs_site.pages())
"""Pages of the site, as paths in the repository."""


@pytest.mark.parametrize("path", PATHS)
def test_the_targets_of_links_exist(path: str):
    for target, heading in docs_site.targets((ROOT / path).read_text(encoding="utf-8"), path):
        assert (ROOT / target).exists(), target
        if heading:
            assert heading in _headings(ROOT / target), f"{target}#{heading}"


def _headings(page: Path) -> set[str]:
    """The names by which links reach the headings of a page: words in small letters with hyphens."""
    lines = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", [page for page in PAGES if page.suffix == ".md"], ids=lambda page: page.name)
def test_named_files_of_benchmarks_exist(page: Path):
    for name in re.findall(r"benchmarks/[\w./-]+\.(?:json|md|py)", page.read_text(encoding="utf-8")):
        assert (ROOT / name).is_file(), name


def test_every_page_is_in_the_navigation_of_the_site_once():
    assert docs_site.differences() == []


def test_a_page_that_the_navigation_does_not_name_is_found(monkeypatch: pytest.MonkeyPatch):
    shown = docs_site.navigation()
    monkeypatch.setattr(docs_site, "navigation", lambda: [*shown[1:], shown[1], "nowhere.md"])
    assert docs_site.differences() == sorted([shown[0], shown[1], "nowhere.md"])


def test_the_site_is_complete_and_its_links_stay_in_it(tmp_path: Path):
    out = tmp_path / "docs"
    docs_site.write_pages(out)
    for page in docs_site.navigation():
        for target, _ in docs_site.links((out / page).read_text(encoding="utf-8")):
            assert "://" in target or (out / page).parent.joinpath(target).is_file(), f"{page}: {target}"


def test_the_site_requests_nothing_from_another_host():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert config["theme"]["font"] is False
    assert all((ROOT / "docs" / file).is_file() for file in (*config["extra"]["polyfills"], *config["extra_css"]))
    assert not set(config) & {"extra_javascript", "repo_url"}
