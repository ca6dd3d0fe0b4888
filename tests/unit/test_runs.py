"""A run is read from its folder alone: its state, its numbers, damaged files, and the search for runs."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.run_folders import advice, entries_of, gain_entry, log_entry, score_entry, write_pictures, write_run

from t2i_adapter.errors import Stopped, UserError, register_secret
from t2i_adapter.runs import find
from t2i_adapter.runs.find import Listed, find_runs
from t2i_adapter.runs.lock import holder, lock
from t2i_adapter.runs.page import make_report
from t2i_adapter.runs.read import read_run
from t2i_adapter.runs.record import run_record

HOLD = """
import pathlib, sys, time
from t2i_adapter.runs.lock import lock

held = lock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""
TRY = """
import pathlib, sys
from t2i_adapter.runs.lock import lock

lock(pathlib.Path(sys.argv[1]))
"""


@contextmanager
def held_elsewhere(folder: Path) -> Iterator[int]:
    """Another process holds the folder's lock; its number."""
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        yield other.pid
    finally:
        other.kill()
        other.wait(timeout=10)


def write_adapter(folder: Path, steps: int | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "T2IAdapter"}))
    if steps is not None:
        (folder / "t2i_adapter.json").write_text(json.dumps({"schema": 1, "base": {"name": "nano"}, "steps": steps}))


# State --------------------------------------------------------------------------------------------------------------


def test_a_run_is_running_as_long_as_its_process_lives(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", entries_of(100), record={})
    assert read_run(folder).state == "killed"
    with held_elsewhere(folder) as process:
        assert read_run(folder).state == "running" and holder(folder) == process
        with pytest.raises(UserError, match=f"process {process}"):
            lock(folder)
    assert read_run(folder).state == "killed" and holder(folder) is None


def test_reading_a_run_leaves_the_lock_of_this_process(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", record={})
    held = lock(folder)
    assert read_run(folder).state == "running" and holder(folder) == os.getpid()
    tried = subprocess.run([sys.executable, "-c", TRY, str(folder)], capture_output=True, text=True, timeout=60)
    assert tried.returncode == 1 and "in use by another run" in tried.stderr
    held.close()
    assert read_run(folder).state == "killed"


def test_a_link_is_not_read_as_a_lock(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "elsewhere")
    assert holder(tmp_path / "run") is None and holder(tmp_path / "missing") is None


@pytest.mark.parametrize("outcome", ["finished", "stopped", "failed"])
def test_the_record_says_how_a_run_ended(tmp_path: Path, outcome: str) -> None:
    ending = {"outcome": outcome, "ended": 1.7e9 + 60, "reason": "SIGTERM"}
    run = read_run(write_run(tmp_path, entries_of(100), record=ending))
    assert run.state == outcome and run.ended == 1.7e9 + 60 and run.started == 1.7e9
    assert bool(run.resume_command) is (outcome != "finished")


def test_folders_without_a_record_are_shown_for_what_they_have(tmp_path: Path) -> None:
    old = write_run(tmp_path / "old", entries_of(200), steps=400, checkpoints=[100, 200])
    run = read_run(old)
    assert (run.state, run.step, run.steps, run.checkpoints) == ("unfinished", 200, 400, [100, 200])
    write_adapter(old, steps=400)
    run = read_run(old)
    assert (run.state, run.step, run.steps) == ("finished", 400, 400)
    write_adapter(tmp_path / "theirs")  # as the diffusers script leaves it
    (tmp_path / "theirs" / "checkpoint-500").mkdir()
    run = read_run(tmp_path / "theirs")
    assert (run.state, run.step, run.steps, run.loss) == ("adapter", 500, None, None)
    assert "An adapter of 500 updates: control was not measured." in make_report(run)


# Numbers ------------------------------------------------------------------------------------------------------------


def test_the_numbers_of_a_run(tmp_path: Path) -> None:
    losses = [log_entry(step, loss=step / 1000) for step in range(10, 501, 10)]
    looks = [gain_entry(200, 0.1, share=0.2), gain_entry(400, 0.3, share=0.2)]
    notes = [advice(200, "read"), {"step": 300, "warning": "a row"}, {"step": 500, "control": 0.7}]
    folder = write_run(tmp_path, [*losses, *looks, score_entry(400, 0.6), *notes], record={}, checkpoints=[400])
    (folder / "best.json").write_text(json.dumps({"step": 400, "score": 0.6}))
    with held_elsewhere(folder):
        run = read_run(folder)
        assert run.seconds_left == pytest.approx(500 * 16 / 40 / 0.8), "500 updates of 16 samples, 20 % of it looks"
    assert (run.step, run.steps, run.best, run.ended) == (500, 1000, (400, 0.6), None)
    assert run.loss == pytest.approx(0.455), "the mean of steps 410 to 500"
    assert [look.step for look in run.metrics.looks] == [200, 400]
    assert run.metrics.looks[-1].benefit is not None and run.metrics.looks[-1].benefit.mean == 0.3
    assert run.metrics.scores[0].columns["target"].mean == 0.97
    content = json.loads(json.dumps(run.to_json(), allow_nan=False))
    assert content["advice"]["kind"] == "read" and content["warnings"] == 1 and content["bytes"] > 1000
    assert content["options"]["optim.lr"] == 0.01 and "optim.betas" not in content["options"], "a default is omitted"


def test_of_two_entries_of_a_step_the_last_counts(tmp_path: Path) -> None:
    entries = [log_entry(1, 1.0), log_entry(2, 2.0), log_entry(2, 3.0), gain_entry(2, 0.1), gain_entry(2, 0.2)]
    metrics = read_run(write_run(tmp_path, entries)).metrics
    assert metrics.numbers("loss") == [(1, 1.0), (2, 3.0)]
    assert [look.benefit.mean for look in metrics.looks if look.benefit] == [0.2]


def test_options_of_another_version_are_shown(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "options.yaml").write_text("train:\n  lanes: 2\n  new_option: [1, 2]\ndata:\n  location: x\n")
    assert read_run(tmp_path).changed_options == {
        "train.cpu_threads": 2,
        "train.new_option": [1, 2],
        "data.location": "x",
    }


# Damage -------------------------------------------------------------------------------------------------------------

BOMB = "a: &a [x, x]\n" + "".join(f"b{n}: &b{n} [*{'a' if not n else f'b{n - 1}'}, *a]\n" for n in range(40))
GARBAGE: list[Any] = [
    *(b"", b"\0\xff\xfe", b"[]", b"{}", b"null", b"[" * 100_000, b'{"step": 1', b"NaN\n", b"- a\n- b\n"),
    *(b'{"step": 1e400, "loss": 1}\n', b'{"step": -1, "loss": 1}\n', b'{"step": true, "gain": 3}\n', BOMB.encode()),
    b'{"step": 1, "loss": NaN, "gain": {"bands": [1, {"t": "x"}], "use": {"mean": Infinity}}, "advice": "x"}\n',
    b'{"step": 2, "gain": {"benefit": {"mean": 1, "low": null}, "pairs_benefit": [null], "bands": {}}}\n',
    b'{"step": 2, "score": {"adapter": {"mean": 1e308, "low": -1e308, "high": 1e308}, "metric": 3}, "warning": 5}\n',
    b'{"step": ' + b"9" * 5000 + b', "loss": ' + b"9" * 400 + b"}\n",
    b'{"outcome": 5, "started": "x", "ended": 1e300, "steps": "x", "global_batch": 0, "versions": 1}',
    b"? [a]\n: b\n1: {2: 3}\n",
    b'{"_class_name": "T2IAdapter", "steps": -5}',
]
FILES = ("metrics.jsonl", "options.yaml", "run.json", "best.json", "config.json", "t2i_adapter.json", ".lock")


@pytest.mark.parametrize("name", [*FILES, "control/pairs.json", "control/0-condition.png", "control/small/1.webp"])
def test_damaged_files_never_raise(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path, entries_of(400), record={}, checkpoints=[100])
    write_pictures(folder, [0, 200], side=8)
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    whole = file.read_bytes() if file.is_file() else b""
    cuts = [whole[: random.Random(n).randrange(len(whole))] for n in range(5)] if whole else []
    for content in [*GARBAGE, *cuts]:
        file.write_bytes(content)
        run = read_run(folder)
        json.dumps(run.to_json(), allow_nan=False)
        assert "</html>" in make_report(run)
    file.unlink()
    for other in (lambda: file.mkdir(), lambda: os.mkfifo(file), lambda: file.symlink_to("/dev/zero")):
        other()
        assert "</html>" in make_report(read_run(folder)), "a folder, a pipe and a device are not read"
        file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink()


def test_names_that_are_no_checkpoints_are_skipped(tmp_path: Path) -> None:
    for name in ("checkpoint-7", "checkpoint-x", "checkpoint-٣", "checkpoint-"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-9").write_text("")
    assert read_run(tmp_path).checkpoints == [7]


def test_a_missing_folder_is_a_run_of_which_nothing_is_known(tmp_path: Path) -> None:
    run = read_run(tmp_path / "missing")
    assert (run.state, run.step, run.steps, run.loss, run.size) == ("unfinished", 0, None, None, 0)
    assert "Unfinished at step 0: control was not measured." in make_report(run)


# Search -------------------------------------------------------------------------------------------------------------


def test_runs_are_found_some_folders_deep(tmp_path: Path) -> None:
    wanted = [write_run(tmp_path / name, record={}) for name in ("a", "b/c", "b/d/e")]
    write_adapter(tmp_path / "adapter")
    (tmp_path / "saved" / "checkpoint-10").mkdir(parents=True)
    for name in ("x/y/z/deep", ".hidden", "node_modules/m", "a/inside"):
        write_run(tmp_path / name, record={})
    (tmp_path / "linked").symlink_to(tmp_path / "x" / "y" / "z" / "deep")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    found = find_runs(tmp_path)
    assert sorted(found) == sorted([*wanted, tmp_path / "adapter", tmp_path / "saved"])
    assert find_runs(tmp_path / "a") == [tmp_path / "a"] and find_runs(tmp_path / "missing") == []


def test_the_search_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(30):
        (tmp_path / f"f{number:02}").mkdir()
    write_run(tmp_path / "z", record={})
    assert find_runs(tmp_path) == [tmp_path / "z"]
    monkeypatch.setattr(find, "MOST_FOLDERS", 20)
    assert find_runs(tmp_path) == []


def test_a_search_that_is_repeated_lists_changed_folders_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "runs" / "a", record={})
    (tmp_path / "data").mkdir()
    for folder in (tmp_path, tmp_path / "runs", run, tmp_path / "data"):
        os.utime(folder, (1e9, 1e9))  # long ago
    known: dict[Path, Listed] = {}
    assert find_runs(tmp_path, known=known) == [run]
    listed: list[str] = []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda place: listed.append(str(place)) or scan(place))
    assert find_runs(tmp_path, known=known) == [run] and listed == []
    other = write_run(tmp_path / "runs" / "b", record={})
    assert find_runs(tmp_path, known=known) == [run, other]
    assert listed == [str(tmp_path / "runs"), str(other)]
    # What was written just now is listed again: its next change might get the same time.
    listed.clear()
    assert find_runs(tmp_path, known=known) == [run, other] and str(other) in listed
    shutil.rmtree(run)
    assert find_runs(tmp_path, known=known) == [other] and run not in known


# The record ---------------------------------------------------------------------------------------------------------


def recorded(folder: Path, fault: BaseException | None = None, first_step: int = 0) -> dict[str, Any]:
    """run.json after a block that raises `fault`."""
    try:
        with run_record(folder, steps=10, first_step=first_step, global_batch=4, versions={"torch": "2"}, resume="r"):
            assert json.loads((folder / "run.json").read_text())["outcome"] == "running"
            if fault:
                raise fault
    except BaseException as raised:
        assert raised is fault
    return json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize(
    ("fault", "outcome", "reason"),
    [
        (None, "finished", ""),
        (Stopped("Stopped after step 3 of 10: SIGTERM.", 143), "stopped", "Stopped after step 3 of 10: SIGTERM."),
        (UserError("is bad", option="optim.lr"), "failed", "--optim.lr is bad"),
        (ValueError("one\ntwo"), "failed", "ValueError: one"),
        (KeyboardInterrupt(), "stopped", "interrupted"),
    ],
)
def test_how_a_run_ends_is_written(tmp_path: Path, fault: BaseException | None, outcome: str, reason: str) -> None:
    content = recorded(tmp_path, fault)
    assert (content["outcome"], content["reason"]) == (outcome, reason)
    assert content["started"] <= content["ended"] and content["resumed"] is None


def test_a_resumed_run_keeps_its_start(tmp_path: Path) -> None:
    began = recorded(tmp_path, KeyboardInterrupt())["started"]
    time.sleep(0.01)
    again = recorded(tmp_path, first_step=3)
    assert again["started"] == began < again["resumed"] and again["first_step"] == 3
    assert recorded(tmp_path)["started"] > began, "a new run in the same folder"


def test_a_record_that_cannot_be_written_costs_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with run_record(tmp_path / "no", steps=1, first_step=0, global_batch=1, versions={}, resume=""):
        pass
    assert capsys.readouterr().out.count("training goes on") == 2


def test_the_record_holds_no_secret_and_leftovers_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register_secret("hf_plantedsecret")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/t2i-adapter", "train", "--hub.token", "hf_plantedsecret", "a b"])
    (tmp_path / "report.html.0123abcd.tmp").write_text("half")
    (tmp_path / "mine.tmp").write_text("kept")
    assert recorded(tmp_path)["command"] == "t2i-adapter train --hub.token [secret] 'a b'"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.tmp", "run.json"]
