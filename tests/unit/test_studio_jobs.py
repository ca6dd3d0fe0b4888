"""Jobs: what is known of one is in its folder, whatever was killed and when."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from t2i_adapter.errors import UserError
from t2i_adapter.studio import jobs as module
from t2i_adapter.studio.child import EXIT, JOB, PROCESS
from t2i_adapter.studio.faults import NotFoundError
from t2i_adapter.studio.jobs import Job, Jobs
from t2i_adapter.studio.places import Places
from t2i_adapter.studio.process import is_alive, send, start_of


class Server:
    """The jobs of one server; another object on the same root is the server after a restart."""

    def __init__(self, root: Path, **more: Any) -> None:
        self.root = root
        self.jobs = Jobs(Places(root, "runs"), **more)

    def shapes(self, out: str = "made", num: int = 2, *more: str) -> Job:
        """A job that writes a dataset: quick, without torch."""
        words = ["make-data", "shapes", "--out", out, "--num", str(num), "--num_test", "0", "--size", "32", *more]
        return self.jobs.add("make-data shapes", words)

    def help(self, run: str = "") -> Job:
        """A job of the device's queue that ends at once, without torch."""
        return self.jobs.add("train", ["train", "--help"], run=run)

    def until(self, job: Job, *states: str, seconds: float = 60) -> Job:
        deadline = time.monotonic() + seconds
        while (found := self.jobs.read(job.id)).state not in states:
            assert time.monotonic() < deadline, (found, self.jobs.log(job.id, 0)[0])
            time.sleep(0.02)
        return found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "root").mkdir()
    found = Server(tmp_path / "root")
    yield found
    for job in found.jobs.all():
        if job.state == "running":
            found.jobs.kill(job.id)
            found.until(job, "died", "done", "failed", "stopped")


def test_a_job_runs_its_verb_and_leaves_all_that_is_known_of_it(server: Server):
    job = server.shapes("made 1")
    assert (job.state, job.queue, job.pid) == ("queued", "desk", None)
    server.jobs.advance()
    done = server.until(job, "done")
    assert (done.code, done.error, done.asked) == (0, "", "")
    assert done.ended is not None
    assert done.ended >= done.created
    assert (server.root / "made 1" / "train" / "metadata.jsonl").exists()
    assert done.to_json()["command"].startswith("t2i-adapter make-data shapes --out 'made 1'")
    text, end = server.jobs.log(job.id, 0)
    assert "made 1" in text
    assert server.jobs.log(job.id, end) == ("", end)
    assert Server(server.root).jobs.read(job.id) == done, "another server reads the same"


def test_an_error_that_the_user_can_fix_names_its_option(server: Server):
    job = server.shapes("made", 0)
    server.jobs.advance()
    failed = server.until(job, "failed")
    assert (failed.code, failed.option) == (2, "num")
    assert failed.error.startswith("--num 0")


def test_the_doctor_s_code_for_bad_data_is_no_failure(server: Server):
    for error, state in (("", "done"), ("--data x: no such folder", "failed")):
        job = server.jobs.add("doctor", ["doctor", "x"])
        (job.folder / PROCESS).write_text(json.dumps({"pid": 1, "started": "0"}))
        (job.folder / EXIT).write_text(json.dumps({"code": 1, "error": error}))
        assert server.jobs.read(job.id).state == state


def test_a_job_waits_while_no_server_runs(server: Server):
    """The server is killed before it has started the job."""
    job = server.shapes()
    after = Server(server.root)
    assert after.jobs.read(job.id).state == "queued"
    after.jobs.advance()
    after.until(job, "done")


def test_a_job_outlives_its_server_and_is_found_again(server: Server):
    """The server is killed while the job runs: a real one, which started it in a session of its own."""
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom t2i_adapter.studio.jobs import Jobs\n"
        "from t2i_adapter.studio.places import Places\n"
        "jobs = Jobs(Places(Path(sys.argv[1]), 'runs'))\njobs.advance()\n"
        "print('started', flush=True)\ntime.sleep(600)\n"
    )
    job = server.shapes(num=100_000)
    process = subprocess.Popen([sys.executable, "-c", script, str(server.root)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"started\n"
    process.kill()
    process.wait()
    process.stdout.close()
    running = server.until(job, "running")
    server.jobs.advance()
    assert server.jobs.read(job.id).pid == running.pid, "it is not started a second time"
    server.jobs.cancel(job.id)
    stopped = server.until(job, "stopped")
    assert stopped.code in (130, 143)


def test_a_killed_job_has_died(server: Server):
    job = server.shapes(num=100_000)
    server.jobs.advance()
    running = server.until(job, "running")
    server.jobs.kill(job.id)
    died = server.until(job, "died")
    assert (died.code, died.ended) == (None, None)
    assert running.pid is not None
    assert not (server.root / "made").exists(), "a dataset is written whole or not at all"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
@pytest.mark.parametrize("delay", [0, 0.03, 0.1])
def test_a_signal_while_python_loads_stops_the_job(server: Server, number: signal.Signals, code: int, delay: float):
    """Without care it kills the process, and the job has died instead of stopped."""
    job = server.shapes(num=100_000)
    server.jobs.advance()
    time.sleep(delay)
    process = json.loads((job.folder / PROCESS).read_text())
    assert send(process["pid"], process["started"], number)
    assert server.until(job, "stopped", "died", seconds=20).code == code


def test_a_signal_that_is_swallowed_is_not_lost_and_cleaning_up_is_not_disturbed():
    """Python ignores an exception in a callback, and extensions may while they load."""
    script = (
        "import signal, sys, time, weakref\nfrom t2i_adapter.studio import child\nclass Thing: pass\nthing = Thing()\n"
        "kept = weakref.ref(thing, lambda _: child._stop(signal.SIGUSR1, None))\n"
        "try:\n    del thing\n    time.sleep(60)\nfinally:\n    time.sleep(0.7)\n    print('cleaned')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=50, check=False)
    assert (done.returncode, done.stdout) == (75, b"cleaned\n")


def test_a_waiting_job_is_cancelled_and_never_starts(server: Server):
    job = server.shapes()
    server.jobs.cancel(job.id)
    assert server.jobs.read(job.id).state == "cancelled"
    server.jobs.advance()
    assert server.jobs.read(job.id).state == "cancelled"
    assert server.jobs.read(job.id).pid is None


def test_what_is_not_running_is_not_paused_or_killed(server: Server):
    waiting = server.help()
    for action in (server.jobs.pause, server.jobs.kill):
        with pytest.raises(UserError, match="it is queued"):
            action(waiting.id)
    running = server.shapes(num=100_000)
    server.jobs.advance(busy=True)
    server.until(running, "running")
    with pytest.raises(UserError, match="cannot be paused"):
        server.jobs.pause(running.id)
    with pytest.raises(UserError, match="only a job that waits"):
        server.jobs.move(running.id, 1)
    server.jobs.cancel(running.id)
    if server.jobs.read(running.id).state == "running":
        with pytest.raises(UserError, match="asked to cancel already"):
            server.jobs.cancel(running.id)
    with pytest.raises(NotFoundError):
        server.jobs.cancel("20261129-205117-381624")


def test_a_process_of_the_same_number_is_left_alone(server: Server):
    """The machine was restarted, and another program has the job's number now."""
    job = server.shapes()
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        (job.folder / PROCESS).write_text(json.dumps({"pid": other.pid, "started": "12345"}))
        assert server.jobs.read(job.id).state == "died"
        with pytest.raises(UserError, match="it is died"):
            server.jobs.kill(job.id)
        assert not send(other.pid, "12345", signal.SIGKILL, to_group=True)
        assert other.poll() is None
        started = start_of(other.pid)
        assert started
        assert is_alive(other.pid, started)
    finally:
        other.kill()
        other.wait()
    assert not is_alive(other.pid, started)


def test_a_process_that_ended_and_is_not_reaped_is_not_alive():
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert start_of(process.pid) is None
    process.wait()


def test_of_two_servers_one_starts_a_job(server: Server):
    """A server that was killed may have started the job in its last moment."""
    for number in range(3):
        job = server.shapes(f"made{number}", 20)
        servers, gate = [Server(server.root) for _ in range(2)], threading.Barrier(2)

        def start(one: Server, gate: threading.Barrier = gate) -> None:
            gate.wait()
            one.jobs.advance()

        threads = [threading.Thread(target=start, args=(one,)) for one in servers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        done = server.until(job, "done", "failed", "stopped")
        assert (done.state, done.code) == ("done", 0), server.jobs.log(job.id, 0)
        assert server.jobs.log(job.id, 0)[0].count("pairs") <= 2


def test_a_late_second_start_does_not_replace_the_first(server: Server):
    """The first process holds the job; a second one ends at once, and the job is still the first one's."""
    job = server.shapes(num=100_000)
    server.jobs.advance()
    first = server.until(job, "running").pid
    while not (job.folder / ".lock").exists():
        time.sleep(0.01)
    Server(server.root).jobs._start(server.jobs.read(job.id))
    time.sleep(0.5)
    again = server.jobs.read(job.id)
    assert (again.state, again.pid) == ("running", first)


def test_the_queue_of_the_device_runs_one_at_a_time(server: Server, tmp_path: Path):
    freed: list[str] = []
    one = Server(server.root, before_device=lambda: freed.append("freed"))
    first, second = one.help(), one.help()
    desk = one.shapes()
    one.jobs.advance(busy=True)
    assert [one.jobs.read(job.id).state for job in (first, second)] == ["queued", "queued"], "another program has it"
    assert one.jobs.read(desk.id).state != "queued"
    assert freed == []
    one.jobs.advance()
    assert one.jobs.read(first.id).state != "queued"
    assert one.jobs.read(second.id).state == "queued"
    assert freed == ["freed"]
    one.until(first, "done")
    one.jobs.advance()
    one.until(second, "done")
    one.until(desk, "done")


def test_waiting_jobs_change_places_in_their_own_queue(server: Server):
    desk = server.shapes("d")
    a, b, c = (server.help() for _ in range(3))

    def order() -> list[str]:
        names = {a.id: "a", b.id: "b", c.id: "c", desk.id: "d"}
        return [names[job.id] for job in server.jobs.all() if job.queue == "device"]

    server.jobs.move(c.id, -1)
    assert order() == ["a", "c", "b"]
    server.jobs.move(c.id, -9)
    assert order() == ["c", "a", "b"]
    server.jobs.move(c.id, 1)
    assert order() == ["a", "c", "b"]
    server.jobs.move(a.id, 100)
    assert order() == ["c", "b", "a"]
    late = server.help()
    assert server.jobs.all()[-1].id == late.id, "a new one is the last"
    assert [job.id for job in Server(server.root).jobs.all()] == [job.id for job in server.jobs.all()]


def test_one_folder_has_one_job_at_a_time(server: Server):
    first = server.help("runs/a")
    with pytest.raises(UserError, match="runs/a: a job that waits or runs") as refused:
        server.help("runs/a")
    assert (refused.value.kind, refused.value.option) == ("conflict", "output_dir")
    server.jobs.cancel(first.id)
    server.help("runs/a")


def test_other_verbs_are_no_jobs(server: Server):
    with pytest.raises(UserError, match="cannot be started here"):
        server.jobs.add("cache rm", ["cache", "rm", "--all"])


def test_damaged_folders_of_jobs_disturb_no_other(server: Server):
    good = server.shapes()
    for name, content in (("20200101-000000-00000a", "{"), ("20200101-000000-00000b", None), ("nonsense", "{}")):
        (server.jobs.folder / name).mkdir()
        if content is not None:
            (server.jobs.folder / name / JOB).write_text(content)
    (server.jobs.folder / "20200101-000000-00000c").write_text("a file")
    odd = server.jobs.folder / "20200101-000000-00000d"
    odd.mkdir()
    (odd / JOB).write_text(json.dumps({"verb": 5, "argv": [1, None], "created": "x"}))
    (odd / PROCESS).write_text(json.dumps({"pid": -1, "started": 5}))
    (odd / "progress").write_text('{"done": 1}\n[1]\n{"done":')
    names = {job.id for job in server.jobs.all()}
    assert {good.id, odd.name} == names
    assert server.jobs.read(odd.name).progress == {}


def test_progress_is_the_last_whole_line(server: Server):
    job = server.shapes()
    (job.folder / "progress").write_text('{"phase": "a", "done": 1}\n{"phase": "a", "done": 2}\n{"phase": "a", "do')
    assert server.jobs.read(job.id).progress == {"phase": "a", "done": 2}


def test_a_long_log_is_read_in_parts(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MOST_LOG", 10)
    job = server.shapes()
    assert server.jobs.log(job.id, 0) == ("", 0)
    (job.folder / "log").write_bytes(b"0123456789abcdefghij")
    assert server.jobs.log(job.id, 0) == ("abcdefghij", 20)
    assert server.jobs.log(job.id, 15) == ("fghij", 20)
    assert server.jobs.log(job.id, 10**12) == ("", 20)


def test_the_oldest_ended_jobs_are_removed(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MOST_KEPT", 2)
    ended = [server.help() for _ in range(4)]
    for job in ended:
        server.jobs.cancel(job.id)
    waiting = server.help()
    server.jobs.advance(busy=True)
    assert [job.id for job in server.jobs.all()] == [*(job.id for job in ended[2:]), waiting.id]
