"""What the studio allows in which state: resume, extend, pause, trash, drafts of two tabs, recipes, plans."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.run_folders import entries_of, write_run
from support.studio import Answer, Running, running, started

from t2i_adapter.cli import main
from t2i_adapter.studio import jobs as jobs_module
from t2i_adapter.studio.hub import MOST_PAGES


@pytest.fixture
def studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A studio whose queue is closed, so that nothing trains."""
    monkeypatch.setattr(jobs_module, "AT_ONCE", {"device": 0, "desk": 0})
    (tmp_path / "root").mkdir()
    with running(tmp_path / "root") as found:
        yield found


def add_run(studio: Running, name: str = "a", **record: object) -> str:
    """A run of 100 updates in runs/NAME; returns its id."""
    folder = write_run(studio.root / "runs" / name, entries_of(100), record=record or {"outcome": "stopped"}, steps=200)
    studio.studio.places.forget_runs()
    return studio.studio.places.run_id(folder)


def post(studio: Running, run: str, what: str, /, **content: object) -> Answer:
    return studio.owner.post(f"/api/runs/{run}/{what}", content)


# Resume, extend, pause, trash ---------------------------------------------------------------------------------------


def test_resume_continues_with_the_run_s_own_options(studio: Running):
    job = post(studio, add_run(studio), "resume").json()
    assert job["command"] == (
        "t2i-adapter train --recipe runs/a/options.yaml --output_dir runs/a --checkpoint.resume auto"
    )
    assert (job["state"], job["run"]) == ("queued", "runs/a")


def test_a_run_is_resumed_once_at_a_time(studio: Running):
    run = add_run(studio)
    job = post(studio, run, "resume").json()
    assert post(studio, run, "resume").status == 409
    assert post(studio, run, "trash", name="a").status == 409, "nor moved while it waits"
    answer = studio.owner.post(f"/api/jobs/{job['id']}/cancel")
    assert (answer.status, answer.json()["state"]) == (200, "cancelled")
    assert post(studio, run, "resume").status == 200


def test_extend_raises_the_last_step(studio: Running):
    run = add_run(studio)
    for steps in (100, 99, 0, -5, 10**10, "500", 500.0, True, [], {}):
        answer = post(studio, run, "resume", max_steps=steps)
        assert (answer.status, answer.json()["option"]) == (400, "train.max_steps"), steps
    job = post(studio, run, "resume", max_steps=500, allow_changed=True).json()
    assert job["command"].endswith("--train.max_steps 500 --checkpoint.allow_changed")


def test_a_run_with_a_strange_name_is_resumed(studio: Running):
    for name in ("-x", "--help", "a b", "é'\"", "$(ls)"):
        run = add_run(studio, name)
        job = post(studio, run, "resume").json()
        (found,) = (one for one in studio.studio.jobs.all() if one.id == job["id"])
        assert found.run == f"runs/{name}"
        assert found.argv[found.argv.index("--output_dir") + 1] == f"runs/{name}"


def test_a_run_without_options_is_not_resumed(studio: Running):
    run = add_run(studio)
    (studio.root / "runs" / "a" / "options.yaml").unlink()
    assert post(studio, run, "resume").status == 409
    (studio.root / "runs" / "a" / "options.yaml").write_text("train:\n  of_the_future: 1\n")
    answer = post(studio, run, "resume")
    assert (answer.status, "of_the_future" in answer.error) == (409, True)


HOLD = """
import signal, sys
from pathlib import Path
from t2i_adapter.runs.lock import lock
held = lock(Path(sys.argv[1]))
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
print("held", flush=True)
signal.pause()
"""


def test_a_run_of_a_terminal_is_paused_and_nothing_else_is_done_to_it(studio: Running):
    run = add_run(studio, outcome="running")
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(studio.root / "runs" / "a")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"held\n"
        deadline = time.monotonic() + 30
        while studio.owner.get(f"/api/runs/{run}").json()["state"] != "running":
            assert time.monotonic() < deadline
        assert post(studio, run, "resume").status == 409
        assert post(studio, run, "trash", name="a").status == 409
        assert post(studio, run, "pause").json() == {"asked": "pause"}
        assert process.wait(20) == 75
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert post(studio, run, "pause").status == 409
    while studio.owner.get(f"/api/runs/{run}").json()["state"] != "killed":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_trash_asks_for_the_name_and_deletes_nothing(studio: Running):
    run = add_run(studio)
    name = studio.owner.get(f"/api/runs/{run}").json()["name"]
    for wrong in ("", "b", name + " ", name.upper()):
        assert post(studio, run, "trash", name=wrong).status == 400
    assert post(studio, run, "trash").status == 400
    assert post(studio, run, "trash", name=name).json() == {"trash": ".studio/trash/a"}
    assert (studio.root / ".studio" / "trash" / "a" / "options.yaml").exists()
    assert studio.owner.get(f"/api/runs/{run}").status == 404
    again = add_run(studio)
    assert post(studio, again, "trash", name=name).json() == {"trash": ".studio/trash/a-2"}
    assert studio.owner.get("/api/runs").json() == []


def test_a_root_that_is_a_run_is_not_moved_into_itself(tmp_path: Path):
    write_run(tmp_path / "root", entries_of(100), record={"outcome": "finished"})
    with running(tmp_path / "root") as studio:
        (row,) = studio.owner.get("/api/runs").json()
        assert post(studio, row["id"], "trash", name=row["name"]).status == 409


def test_an_unknown_run_is_404_everywhere(studio: Running):
    for path in ("", "/metrics", "/report", "/pictures/1/0"):
        assert studio.owner.get(f"/api/runs/none-12345678{path}").status == 404
    for what in ("pause", "resume", "trash"):
        assert post(studio, "none-12345678", what).status == 404
    for what in ("measure", "export", "push"):
        assert studio.owner.post(f"/api/release/none-12345678/{what}").status == 404


def test_a_run_without_a_finished_adapter_is_not_released(studio: Running):
    run = add_run(studio)
    for what in ("measure", "export", "push"):
        answer = studio.owner.post(f"/api/release/{run}/{what}", {"to": "comfyui"})
        assert (answer.status, "no finished adapter" in answer.error) == (409, True), what


def test_seven_runs_are_not_compared(studio: Running):
    runs = [add_run(studio, f"r{number}") for number in range(7)]
    assert studio.owner.get(f"/api/compare?runs={','.join(runs)}").status == 400
    found = studio.owner.get(f"/api/compare?runs={','.join(runs[:6])}").json()
    assert len(found["runs"]) == 6
    assert studio.owner.get("/api/compare").json()["runs"] == []


# Forms --------------------------------------------------------------------------------------------------------------


def test_two_tabs_do_not_overwrite_each_other_s_draft(studio: Running):
    path = "/api/drafts/new"
    assert studio.owner.get(path).json() == {"content": None, "was": None}
    one = studio.owner.put(path, {"content": {"a": [1]}, "was": None}).json()["was"]
    assert studio.owner.get(path).json() == {"content": {"a": [1]}, "was": one}
    two = studio.owner.put(path, {"content": {"a": 2}, "was": one}).json()["was"]
    assert studio.owner.put(path, {"content": {"a": 3}, "was": one}).status == 412
    assert studio.owner.put(path, {"content": {"a": 3}, "was": None}).status == 412
    assert studio.owner.get(path).json() == {"content": {"a": 2}, "was": two}
    assert studio.owner.put(path, {"content": "x" * (1 << 20), "was": two}).status == 400


def test_a_recipe_is_saved_listed_and_not_overwritten(studio: Running):
    text = "# For a test.\ntrain:\n  batch_size: 3\n"
    assert studio.owner.put("/api/recipes/mine", {"yaml": text, "was": ""}).status == 200
    (found,) = (one for one in studio.owner.get("/api/recipes").json() if one["is_own"])
    assert (found["id"], found["about"], found["values"]) == ("mine", "For a test.", {"train.batch_size": 3})
    assert studio.owner.put("/api/recipes/mine", {"yaml": text, "was": "other"}).status == 412
    assert studio.owner.put("/api/recipes/mine", {"yaml": "", "was": text}).status == 200
    for yaml in ("train:\n  batch_size: 0\n", "data:\n  location: ../x\n", "- a\n", "a: 1\n"):
        assert studio.owner.put("/api/recipes/other", {"yaml": yaml, "was": ""}).status == 400, yaml
    for name in ("A", "a.b", "-a", "a" * 80):
        assert studio.owner.put(f"/api/recipes/{name}", {"yaml": text, "was": ""}).status == 400


def test_a_form_is_checked_as_the_command_line_checks_it(studio: Running):
    def check(**content: object) -> dict[str, object]:
        return studio.owner.post("/api/check", {"verb": "train", **content}).json()

    good = check(values={"data.location": "data", "train.seed": 5})
    assert good["errors"] == []
    assert good["command"] == "t2i-adapter train --data data --train.seed 5"
    assert check(yaml=good["yaml"])["command"] == good["command"]
    (error,) = check(values={"train.batch_size": 0})["errors"]  # type: ignore[misc]
    assert error["option"] == "train.batch_size"
    (error,) = check(yaml="train:\n  batch_size: 0\n")["errors"]  # type: ignore[misc]
    assert error["option"] == "train.batch_size"
    (error,) = check(values={"data.location": "../x"})["errors"]  # type: ignore[misc]
    assert error["option"] == "data.location"


def test_a_folder_with_a_run_is_not_trained_into(studio: Running):
    add_run(studio)
    body = {"verb": "train", "values": {"data.location": "data", "output_dir": "runs/a"}}
    answer = studio.owner.post("/api/jobs", body)
    assert (answer.status, answer.json()["option"]) == (409, "output_dir")
    body["values"] = {"data.location": "data", "output_dir": "runs/b"}
    assert studio.owner.post("/api/jobs", body).status == 201
    answer = studio.owner.post("/api/jobs", body)
    assert (answer.status, answer.json()["option"]) == (409, "output_dir"), "nor by a second job"
    body["values"] = {"data.location": "data", "output_dir": "./x/../runs/b"}
    assert studio.owner.post("/api/jobs", body).status == 409, "by whatever name"


@pytest.mark.parametrize("processes", [0, -1, 65, "2", 1.5, True, None, []])
def test_a_bad_number_of_processes_is_refused(studio: Running, processes: object):
    body = {"verb": "train", "values": {"data.location": "data"}, "processes": processes}
    assert studio.owner.post("/api/jobs", body).status == 400
    assert studio.owner.post("/api/jobs", {"verb": "doctor", "values": {}, "processes": 2}).status == 400


def test_a_new_plan_replaces_the_one_that_waits(studio: Running):
    for seed in (1, 2, 3):
        answer = studio.owner.post("/api/plan", {"values": {"data.location": "data", "train.seed": seed}})
        assert answer.status == 201, answer
    plans = [job for job in studio.studio.jobs.all() if job.verb == "plan"]
    assert [job.state for job in plans] == ["cancelled", "cancelled", "queued"]
    assert "--no_probe" in plans[-1].argv


def test_actions_of_a_job_answer_for_its_state(studio: Running):
    job = studio.owner.post("/api/jobs", {"verb": "conditions", "values": {}}).json()["id"]
    for action, status in (("pause", 409), ("kill", 409), ("up", 200), ("down", 200), ("explode", 404)):
        assert studio.owner.post(f"/api/jobs/{job}/{action}").status == status, action
    assert studio.owner.post(f"/api/jobs/{job}/cancel").json()["state"] == "cancelled"
    assert studio.owner.post(f"/api/jobs/{job}/cancel").status == 409
    assert studio.owner.get(f"/api/jobs/{job}/log").json() == {"text": "", "at": 0}


# The command --------------------------------------------------------------------------------------------------------


def test_the_server_never_imports_torch_and_is_light(tmp_path: Path):
    """Every address that only reads is asked for; then the server's own memory map is searched."""
    from t2i_adapter.studio.app import PAGES
    from t2i_adapter.studio.jobs import QUEUES

    root = tmp_path / "root"
    write_run(root / "runs" / "a", entries_of(100), record={"outcome": "finished"}, checkpoints=[100])
    (root / "runs" / "a" / "config.json").write_text('{"_class_name": "T2IAdapter"}')
    with started(root, tmp_path / "log") as command:
        owner = command.enter()
        status = Path(f"/proc/{command.process.pid}/status").read_text()
        at_rest = int(status.partition("VmRSS:")[2].split()[0]) / 1024
        maps = Path(f"/proc/{command.process.pid}/maps").read_text()
        assert [name for name in ("numpy", "PIL", "cv2", "pyarrow") if f"/{name}/" in maps] == [], "at rest"
        assert at_rest < 45, f"{at_rest:.0f} MiB"
        (run,) = (row["id"] for row in owner.get("/api/runs").json())
        addresses = [page.replace("{id}", run) for page in PAGES]
        addresses += [f"/api/{name}" for name in ("state", "folders", "jobs", "data", "recipes", "adapters", "paint")]
        addresses += [f"/api/form/{verb.replace(' ', '_')}" for verb in QUEUES]
        addresses += [f"/api/runs/{run}{more}" for more in ("", "/metrics")] + [f"/api/compare?runs={run}"]
        addresses += [f"/api/adapters/{run}", f"/api/release/{run}", "/api/drafts/new", "/static/app.js"]
        for address in addresses:
            assert owner.get(address).status == 200, address
        assert owner.post("/api/check", {"verb": "train", "values": {}}).status == 200
        maps = Path(f"/proc/{command.process.pid}/maps").read_text()
        assert "libtorch" not in maps
        assert "/torch/" not in maps
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_new_link_is_printed_for_the_studio_that_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["studio", str(tmp_path), "--link"]) == 2
    assert "no studio runs in this folder" in capsys.readouterr().err
    with started(tmp_path, tmp_path.with_name("log3")) as command:
        assert main(["studio", str(tmp_path), "--link", "--read_only"]) == 0
        link = capsys.readouterr().out.strip()
        assert f":{command.port}/?token=" in link
        assert command.enter().get("/api/state").json()["role"] == "owner"
    assert json.loads((tmp_path / ".studio" / "address.json").read_text())["port"] == command.port
    assert main(["studio", str(tmp_path), "--link"]) == 2, "the server has ended"


@pytest.mark.parametrize(
    "words", [["missing"], ["--port", "70000"], ["--runs", "../x"], ["--host", "nonsense.invalid"]]
)
def test_a_bad_option_of_the_command_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
):
    monkeypatch.chdir(tmp_path)
    assert main(["studio", *words]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_pages_of_several_tabs_get_the_same_events(studio: Running):
    with studio.owner.events() as one, studio.reader.events() as two:
        one.until("hello")
        two.until("hello")
        job = studio.owner.post("/api/jobs", {"verb": "conditions", "values": {}}).json()["id"]
        assert job in one.until(job)
        assert job in two.until(job)
    assert MOST_PAGES >= 2
