"""Runs as the page gets them: curves that keep their extremes, and files that are damaged, cut or written by others."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.run_folders import advice, entries_of, gain_entry, log_entry, score_entry, write_pictures, write_run

from t2i_adapter.studio import run_views
from t2i_adapter.studio.faults import NotFoundError
from t2i_adapter.studio.places import Places
from t2i_adapter.studio.run_views import MOST_POINTS, Runs, columns, thin


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(Places(tmp_path, "runs"))


def only(runs: Runs) -> str:
    """The id of the one run."""
    runs.places.forget_runs()
    (run,) = runs.places.run_folders()
    return run


@pytest.mark.parametrize("count", [0, 1, 1999, 2000, 2001, 2500, 15_000, 100_001])
def test_a_thinned_curve_keeps_its_ends_and_its_extremes(count: int):
    draw = random.Random(count)
    points = [(step, draw.random()) for step in range(count)]
    if count > 10:
        points[count // 3] = (count // 3, 50.0)
        points[count // 2] = (count // 2, -50.0)
    found = thin(points)
    assert len(found) <= MOST_POINTS
    assert found == sorted(set(found)), "in order, each once"
    assert set(found) <= set(points)
    if count:
        assert found[-1] == points[-1]
        assert max(found, key=lambda point: point[1]) == max(points, key=lambda point: point[1])
        assert min(found, key=lambda point: point[1]) == min(points, key=lambda point: point[1])
    if count <= MOST_POINTS:
        assert found == points


def test_columns_are_what_a_chart_draws():
    assert columns([(1, 0.5), (2, 0.25)]) == [[1, 2], [0.5, 0.25]]
    assert columns([]) == [[], []]


def test_a_run_s_numbers_come_with_the_byte_that_they_end_at(runs: Runs):
    folder = write_run(runs.places.root / "a", [*entries_of(400), gain_entry(400, 0.3), score_entry(400, 0.5)])
    found = runs.metrics(only(runs))
    assert found["at"] == (folder / "metrics.jsonl").stat().st_size
    steps, losses = found["curves"]["loss"]
    assert (len(steps), steps[0], steps[-1]) == (40, 10, 400)
    assert all(math.isfinite(loss) for loss in losses)
    assert found["looks"][-1]["benefit"][0] == pytest.approx(0.3)
    assert [band["t"] for band in found["looks"][-1]["bands"]] == [187, 437, 687, 937]
    assert found["scores"][-1]["columns"]["adapter"][0] == pytest.approx(0.5)


DAMAGED = {
    "metrics.jsonl": ["", "{", "[]\n" * 9,
                      '{"step": NaN, "loss": 1e999}\n', '{"step": -1}\n{"step": "x", "gain": []}\n',
                      '{"step": 5, "gain": {"bands": [1, {}], "use": {"mean": null}}, "score": {"adapter": 3}}\n',
                      "\0" * 99],
    "run.json": ["", "[]", '{"outcome": 5, "started": "x", "steps": -1, "global_batch": {}}', '{"versions": [1]}'],
    "options.yaml": ["", "[", "a: &a [*a]", "data: 5", "train:\n  max_steps: x\n", "? [a]\n: b\n", "validation: [1]"],
    "t2i_adapter.json": ["", "[]", '{"base": 5, "condition": [], "sampling": 1, "steps": "x"}'],
    "best.json": ["", '{"step": "x"}', "[1]"],
    "control/pairs.json": ["", "{}", "[1, {}, null]", '[{"key": 5, "prompt": []}]'],
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_hide_what_they_held_and_no_more(runs: Runs, name: str):
    for content in DAMAGED[name]:
        folder = write_run(runs.places.root / "a", entries_of(200), record={"outcome": "finished"}, checkpoints=[100])
        (folder / "config.json").write_text('{"_class_name": "T2IAdapter"}')
        (folder / "control").mkdir(exist_ok=True)
        (folder / name).write_text(content)
        run = only(runs)
        whole = runs.whole(run)
        assert whole["id"] == run
        assert runs.all()[0]["id"] == run
        json.dumps([whole, runs.metrics(run)], allow_nan=False)
        if name != "metrics.jsonl":
            assert len(runs.metrics(run)["curves"]["loss"][0]) == 20
        shutil.rmtree(folder)


def test_pictures_are_small_and_broken_ones_are_missing(runs: Runs):
    folder = write_run(runs.places.root / "a", entries_of(200))
    write_pictures(folder, [100, 200], side=60)
    run = only(runs)
    found = runs.picture(run, "200", "1")
    assert found is not None
    assert found[:4] == b"RIFF"
    (folder / "control" / "step-000100" / "0.png").write_bytes(b"broken")
    for step, name in (
        ("100", "0"),
        ("300", "0"),
        ("200", "7"),
        ("x", "0"),
        ("-1", "0"),
        ("9" * 20, "0"),
        ("200", "x"),
    ):
        assert runs.picture(run, step, name) is None, (step, name)
    assert runs.picture(run, "condition", "0") is not None


def test_log_lines_from_any_byte(runs: Runs):
    folder = write_run(runs.places.root / "a", [])
    log = folder / "metrics.jsonl"
    lines = [json.dumps(log_entry(step)) + "\n" for step in (1, 2, 3)]
    log.write_text("".join(lines))
    entries, end = runs.log_lines(folder, len(lines[0]))
    assert [entry["step"] for entry in entries] == [2, 3]
    assert end == log.stat().st_size
    assert runs.log_lines(folder, end) == ([], end)
    assert runs.log_lines(folder, end + 1) == ([], 0), "the log was cut"
    log.unlink()
    assert runs.log_lines(folder, end) == ([], 0)
    assert runs.log_lines(folder, 0) == ([], 0)


def test_a_row_is_read_again_only_if_a_file_has_changed(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    folder = write_run(runs.places.root / "a", entries_of(100), record={"outcome": "finished"})
    run, reads = only(runs), []
    read = run_views.read_run
    monkeypatch.setattr(run_views, "read_run", lambda folder: (reads.append(1), read(folder))[1])
    first = runs.row(run, folder)
    assert (runs.row(run, folder), len(reads)) == (first, 1)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(log_entry(110)) + "\n")
    assert (runs.row(run, folder)["step"], len(reads)) == (110, 2)


def test_a_killed_run_is_seen_although_no_file_has_changed(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    from t2i_adapter.runs.lock import lock

    monkeypatch.setattr(run_views, "SOLID_SECONDS", 0.0)
    folder = write_run(runs.places.root / "a", entries_of(100), record={})
    run = only(runs)
    held = lock(folder)
    assert runs.row(run, folder)["state"] == "running"
    held.close()
    assert runs.row(run, folder)["state"] == "killed"


def test_notes_are_in_the_order_of_their_steps(runs: Runs):
    warning = {"step": 20, "warning": {"kind": "x", "text": "b"}}
    write_run(runs.places.root / "a", [advice(30, "read", "c"), advice(10, "plateau", "a"), warning])
    steps = [note["step"] for note in runs.whole(only(runs))["notes"]]
    assert steps == sorted(steps)
    assert 30 in steps


# Places -------------------------------------------------------------------------------------------------------------


def test_ids_of_runs_are_the_same_after_a_restart_and_differ_for_equal_names(tmp_path: Path):
    for name in ("x/Ä b!", "y/Ä b!", "z"):
        write_run(tmp_path / name)
    first, second = (Places(tmp_path, "runs").run_folders() for _ in range(2))
    assert first == second
    assert len(first) == 3
    assert all(run.replace("-", "").isalnum() and run.isascii() and run == run.lower() for run in first)


def test_a_run_that_began_a_moment_ago_is_found_at_once(tmp_path: Path):
    places = Places(tmp_path, "runs")
    assert places.run_folders() == {}
    folder = write_run(tmp_path / "a")
    run = Places(tmp_path, "runs").run_id(folder)
    assert places.run_folder(run) == folder
    (folder / "run.json").unlink(missing_ok=True)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink()
    folder.rmdir()
    with pytest.raises(NotFoundError, match="moved or deleted"):
        places.run_folder(run)


def test_the_picker_lists_folders_and_tables_by_ids(tmp_path: Path):
    for name in ("B", "a", ".hidden", "a/inner"):
        (tmp_path / name).mkdir()
    for name in ("pairs.CSV", "x.txt", "shard.tar"):
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    places = Places(tmp_path, "runs")
    entries: dict[str, Any] = {entry.name: entry for entry in places.children("")}
    assert list(entries) == ["a", "B", "pairs.CSV", "shard.tar"]
    assert [entry.name for entry in places.children(entries["a"].id)] == ["inner"]
    assert places.listed(entries["pairs.CSV"].id) == tmp_path / "pairs.CSV"
    (tmp_path / "B").rmdir()
    (tmp_path / "B").symlink_to(tmp_path.parent)
    for place in ("nothing", "..", entries["B"].id):
        with pytest.raises(NotFoundError):
            list(places.children(place))
    assert Places(tmp_path, "runs").root == tmp_path
    with pytest.raises(NotFoundError):
        list(Places(tmp_path, "runs").children(entries["a"].id))


def test_a_path_is_confined_with_its_links_resolved(tmp_path: Path):
    from t2i_adapter.errors import UserError

    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    (root / "out").symlink_to(tmp_path)
    (root / "loop").symlink_to(root / "loop")
    places = Places(root, "runs")
    for text in ("in", "in/new/deep", "./in/../in", str(root / "in"), ""):
        assert places.confine(text, "out").is_relative_to(root)
    for text in ("..", "out", "out/root/../x", "/", str(tmp_path), ".studio", ".studio/jobs", "~", "\0", "in/../../x"):
        with pytest.raises(UserError) as refused:
            places.confine(text, "data.location")
        assert refused.value.option == "data.location"
    with pytest.raises(UserError):
        Places(root, "../runs")
