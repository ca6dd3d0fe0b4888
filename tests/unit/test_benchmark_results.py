"""benchmarks/common.py and the result files: names, dates and hardware."""

from __future__ import annotations

import json
import re
from pathlib import Path

import common
import pytest
from support.doc_pages import PAGES

FILES = sorted(common.RESULTS.glob("*.json"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_result_file_is_named_by_its_hardware_and_date(file: Path) -> None:
    measured = json.loads(file.read_text(encoding="utf-8"))["measured"]
    assert file.stem.endswith(f"_{measured['hardware']}_{measured['date']}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_the_newest_results(page: Path) -> None:
    named = re.findall(r"benchmarks/results/((\w+)_([^_\s]+)_[\d-]{10})\.\w+", page.read_text(encoding="utf-8"))
    for stem, name, hardware in named:
        newest = common.newest(name, hardware)
        assert newest is not None and newest.stem == stem


def test_a_result_is_written_with_its_machine_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    for name in ("speed_2cpu_2026-01-31", "speed_2cpu_2026-02-01", "speed_h200_2026-03-01", "speed_x_2cpu_2027-01-01"):
        (tmp_path / f"{name}.json").write_text("{}")
    assert common.newest("speed") == tmp_path / "speed_h200_2026-03-01.json"
    assert common.newest("speed", "2cpu") == tmp_path / "speed_2cpu_2026-02-01.json"
    assert common.newest("nothing") is None
    written = common.write_result("other", {"figure": 3, "measured": "replaced"}, threads=1)
    assert capsys.readouterr().out == f"{written}\n"
    assert written.parent == tmp_path and common.newest("other") == written
    content = common.read_earlier("other", None)
    assert content["figure"] == 3 and content["measured"]["machine"]["threads"] == 1
    assert content["measured"]["versions"]["torch"]
