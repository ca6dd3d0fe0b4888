"""What the studio reads several times a second is kept until its files change; and a studio with open pages ends."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from support.run_folders import gain_entry, log_entry, write_run

from t2i_adapter.data.shapes import write_dataset
from t2i_adapter.files import write_atomic
from t2i_adapter.studio.datasets import Datasets
from t2i_adapter.studio.jobs import Jobs
from t2i_adapter.studio.places import Places
from t2i_adapter.studio.run_views import MOST_LOOKS, Runs, some


def studio_folder(root: Path) -> Places:
    places = Places(root, "runs")
    places.state.mkdir()
    return places


def write_json(file: Path, content: object) -> None:
    write_atomic(file, [json.dumps(content).encode()])


def test_the_files_of_an_ended_job_are_read_once(tmp_path: Path):
    jobs = Jobs(studio_folder(tmp_path))
    job = jobs.add("plan", ["plan", "--data", "data"])
    write_json(job.folder / "exit.json", {"code": 0})
    assert jobs.all()[0].state == "done"
    (job.folder / "job.json").unlink()
    (job.folder / "job.json").mkdir()  # cannot be read any more
    assert [one.verb for one in jobs.all()] == ["plan"] and jobs.read(job.id) is jobs.all()[0]


def test_a_job_that_has_not_ended_is_read_again(tmp_path: Path):
    jobs = Jobs(studio_folder(tmp_path))
    job = jobs.add("plan", ["plan"])
    assert jobs.all()[0].state == "queued"
    jobs.cancel(job.id)
    assert jobs.all()[0].state == "cancelled"
    write_json(job.folder / "exit.json", {"code": 2, "error": "first"})
    assert jobs.read(job.id).error == "first"
    write_json(job.folder / "exit.json", {"code": 2, "error": "second"})  # another file
    assert jobs.read(job.id).error == "second"


def test_a_job_whose_folder_is_gone_is_forgotten(tmp_path: Path):
    jobs = Jobs(studio_folder(tmp_path))
    job = jobs.add("plan", ["plan"])
    write_json(job.folder / "exit.json", {"code": 0})
    assert len(jobs.all()) == 1
    job.folder.rename(tmp_path / "elsewhere")
    assert jobs.all() == [] and not jobs._ended


def test_the_numbers_of_a_run_are_kept_until_its_log_grows(tmp_path: Path):
    run = write_run(tmp_path / "runs" / "a", [log_entry(step, 0.123456789) for step in (10, 20)])
    runs = Runs(studio_folder(tmp_path))
    (name,) = runs.places.run_folders()
    first = runs.metrics(name)
    assert first["curves"]["loss"] == [[10, 20], [0.123457, 0.123457]]
    assert runs.metrics(name) is first
    with (run / "metrics.jsonl").open("a") as log:
        log.write(json.dumps(log_entry(30, 0.5)) + "\n")
    second = runs.metrics(name)
    assert second["curves"]["loss"][0] == [10, 20, 30] and second["at"] > first["at"]


def test_a_page_gets_some_of_many_looks(tmp_path: Path):
    entries = [gain_entry(step, 0.1) for step in range(10, 10 * MOST_LOOKS * 3 + 1, 10)]
    write_run(tmp_path / "runs" / "a", entries)
    runs = Runs(studio_folder(tmp_path))
    (name,) = runs.places.run_folders()
    steps = [look["step"] for look in runs.metrics(name)["looks"]]
    assert len(steps) <= MOST_LOOKS and steps[0] == 10 and steps[-1] == 10 * MOST_LOOKS * 3
    assert some([1, 2, 3], 3) == [1, 2, 3] and some([1, 2, 3, 4], 3) == [1, 3, 4] and some([], 3) == []


def test_a_studio_with_an_open_page_ends_at_once(tmp_path: Path):
    command = [sys.executable, "-m", "t2i_adapter", "studio", str(tmp_path), "--port", "0", "--no_open_browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        link = next(found[0] for line in process.stdout if (found := re.search(r"http://\S+", line)))
        address, _, token = link.removeprefix("http://").partition("/?token=")
        page = HTTPConnection(address, timeout=20)
        page.request("GET", f"/?token={token}")
        cookie = page.getresponse().headers["set-cookie"].partition(";")[0]
        page = HTTPConnection(address, timeout=20)
        page.request("GET", "/api/events", headers={"cookie": cookie})
        answer = page.getresponse()
        assert b"retry" in answer.readline()
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert time.monotonic() - began < 10
        assert process.stderr.read() == ""


def within(seconds: float, action: Callable[[], Any]) -> Any:
    """What an action returns in a thread of its own. Fails if it takes longer."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(action()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, "it waits"
    return found[0]


def test_rows_are_served_while_another_dataset_is_opened_or_searched(tmp_path: Path):
    write_dataset(tmp_path / "shapes", num=3, split="train")
    datasets = Datasets(studio_folder(tmp_path))
    name = datasets.add({"location": str(tmp_path / "shapes")})
    with datasets._opening, datasets._searching:  # as they are held for seconds of a large dataset
        assert within(20, lambda: datasets.rows(name, 0, 10, "", ""))["total"] == 3
        assert within(20, lambda: datasets.picture(name, 0, "image", 160))[:4] == b"RIFF"


def test_a_search_finds_a_caption_that_was_edited(tmp_path: Path):
    write_dataset(tmp_path / "shapes", num=3, split="train")
    datasets = Datasets(studio_folder(tmp_path))
    name = datasets.add({"location": str(tmp_path / "shapes")})
    assert datasets.rows(name, 0, 10, "a green boat", "")["total"] == 0
    was = datasets.rows(name, 1, 1, "", "")["rows"][0]["captions"]
    datasets.write_captions(name, 1, ["A green boat"], was)
    assert [row["n"] for row in datasets.rows(name, 0, 10, "a green boat", "")["rows"]] == [1]
