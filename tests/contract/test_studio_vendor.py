"""The browser's code of the studio: libraries with digests and licences, no other host, every file served."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from t2i_adapter.studio import app

ROOT = Path(__file__).resolve().parents[2]
WEB = app.WEB
VENDOR = WEB / "vendor"
LISTED = json.loads((VENDOR / "vendor.json").read_text(encoding="utf-8"))
WANTED = json.loads((ROOT / "tools" / "vendor" / "package.json").read_text(encoding="utf-8"))
FILES = sorted(path for path in WEB.rglob("*") if path.is_file())
LICENCES = {"MIT": "Permission is hereby granted, free of charge", "Apache-2.0": "Apache License"}
"""Id of a licence -> words of its text."""
NAMESPACE = re.compile(r"http://www\.w3\.org/[\w/]+")
"""Names of SVG, MathML and XHTML: they look like addresses, and nothing is requested from there."""


def different(folder: Path) -> list[str]:
    """Names of files whose digests are not those of vendor.json, or that are not listed."""
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    digests.pop("vendor.json", None)
    return sorted({name for name, _ in digests.items() ^ LISTED["sha256"].items()})


def test_the_libraries_are_the_files_that_were_made():
    assert different(VENDOR) == []


def test_a_changed_library_and_a_new_file_are_found(tmp_path: Path):
    copy = Path(shutil.copytree(VENDOR, tmp_path / "vendor"))
    with (copy / "ui.js").open("a") as file:
        file.write("//")
    (copy / "more.js").write_text("")
    assert different(copy) == ["more.js", "ui.js"]


def test_the_listed_versions_are_those_that_the_tool_installs():
    versions = {package["name"]: package["version"] for package in LISTED["packages"]}
    assert WANTED["dependencies"].items() <= versions.items()


@pytest.mark.parametrize("package", LISTED["packages"], ids=lambda package: package["name"])
def test_the_licence_of_a_library_is_beside_it(package: dict[str, str]):
    name = package["name"]
    heading = f"{name}\n{'=' * len(name)}\n"
    _, found, rest = f"\n{(VENDOR / 'LICENSES').read_text(encoding='utf-8')}".partition(f"\n{heading}")
    text = re.split(r"\n=+\n", rest)[0]
    assert found and LICENCES[package["license"]] in text


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.relative_to(WEB).as_posix())
def test_no_file_names_another_host(file: Path):
    if file.name != "LICENSES":
        text = NAMESPACE.sub("", file.read_text(encoding="utf-8"))
        assert not re.search(r"https?://|wss?://|[\"'(]//\w", text)


@pytest.mark.parametrize("file", [path for path in FILES if path.suffix == ".js"], ids=lambda path: path.name)
def test_no_script_makes_code_from_text(file: Path):
    """The content security policy refuses that, so the page would break. Texts of runs never become HTML either."""
    text = file.read_text(encoding="utf-8")
    assert not re.search(r"\beval\s*\(|new Function\b", text)
    assert file.parent == VENDOR or not re.search(r"(inner|outer)HTML|insertAdjacentHTML|document\.write", text)


@pytest.mark.parametrize("file", [path for path in FILES if path.suffix == ".js"], ids=lambda path: path.name)
def test_what_a_module_imports_exists(file: Path):
    for name in re.findall(r"(?:from|import)\s*\(?\"([^\"]+)\"", file.read_text(encoding="utf-8")):
        assert (file.parent / name).is_file(), name


def test_the_page_names_files_that_are_served():
    for address in re.findall(r"(?:href|src)=\"([^\"]+)\"", (WEB / "index.html").read_text(encoding="utf-8")):
        name = address.removeprefix("/static/")
        assert app._FILE.fullmatch(name) and (WEB / name).is_file(), address


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.relative_to(WEB).as_posix())
def test_every_script_style_and_picture_is_served(file: Path):
    if file.name not in ("index.html", "LICENSES", "vendor.json"):
        assert app._FILE.fullmatch(file.relative_to(WEB).as_posix()) and file.suffix in app._KINDS


def test_every_page_of_the_browser_is_an_address_of_the_server():
    addresses = re.findall(r"\[/\^(\S+?)\$/, \"(\w+)\"", (WEB / "app.js").read_text(encoding="utf-8"))
    assert len(addresses) >= 7
    for pattern, module in addresses:
        assert (WEB / "pages" / f"{module}.js").is_file()
        assert any(re.fullmatch(pattern.replace(r"\/", "/"), page.replace("{id}", "x")) for page in app.PAGES), pattern
