"""Lines of JSON say how far work is, whether or not a bar is drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from t2i_adapter.evaluation.progress import Progress
from t2i_adapter.progress import VARIABLE, progress_bar


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "progress"))
    return tmp_path / "progress"


def test_a_bar_reports_its_first_and_its_last_count(file: Path):
    assert list(progress_bar("reading", 3, "row", items="abc")) == ["a", "b", "c"]
    found = lines(file)
    assert {"phase": "reading", "unit": "row", "total": 3, "done": 0}.items() <= found[0].items()
    assert found[-1]["done"] == 3


def test_a_bar_that_is_not_drawn_reports_too(file: Path):
    with progress_bar("sweep", 10, "picture", done=4, disable=True) as bar:
        bar.update(2)
    assert [line["done"] for line in lines(file)] == [4, 6]


def test_the_bar_of_another_process_reports_nothing(file: Path):
    assert list(progress_bar("reading", 2, items="ab", is_reported=False)) == ["a", "b"]
    assert not file.exists()


def test_quick_work_writes_few_lines(file: Path):
    with progress_bar("steps", 10_000) as bar:
        for _ in range(10_000):
            bar.update()
    assert len(lines(file)) < 100


def test_a_log_s_progress_is_reported(file: Path):
    with Progress(8, "evaluating") as progress:
        progress.advance(5)
    assert [line["done"] for line in lines(file)] == [0, 5]


def test_a_file_that_cannot_be_written_costs_no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none" / "progress"))
    assert list(progress_bar("reading", 2, items="ab")) == ["a", "b"]


def test_without_the_variable_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    assert list(progress_bar("reading", 2, items="ab")) == ["a", "b"]
    assert not list(tmp_path.iterdir())
