"""deploy/torchrun/run.sh: one run on two hosts by a real ssh server; both hosts are this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.kills import differences
from support.processes import finish, until
from support.ranks import count_lines
from support.slurm import free_ports
from support.sshd import MISSING, Server

from t2i_adapter.runs.read import read_run

pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"needs an ssh server; missing: {' '.join(MISSING)} (Debian: openssh-server)"
)
ROOT = Path(__file__).resolve().parents[2]
RUN_SH = ROOT / "deploy" / "torchrun" / "run.sh"
HOSTS = ("127.0.0.1", "127.0.0.2")
FLAGS = (
    *("--data", "data", "--data.resolution", "64", "--data.num_workers", "0", "--train.batch_size", "1"),
    *("--train.seed", "3", "--optim.lr", "1e-3", "--tracking.log_every", "1"),
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with data and the file that makes the command available. Its name has what shells take apart."""
    folder = tmp_path / "user's work"
    folder.mkdir()
    finish(folder, "make-data", "shapes", "--out", "data", "--num", "8", "--size", "64", "--seed", "0")
    lines = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "T2I_ADAPTER_CACHE": str(tmp_path / "cache"),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    (folder / "environment").write_text("".join(f"export {name}='{value}'\n" for name, value in lines.items()))
    return folder


def start(server: Server, work: Path, *words: str) -> subprocess.Popen[bytes]:
    more = {"SSH": server.command, "GPUS": "1", "PORT": str(free_ports(1)[0]), "ACTIVATE": ". ./environment"}
    with (work / "log").open("ab") as log:
        return subprocess.Popen(
            [str(RUN_SH), *words], cwd=work, env={**os.environ, **more}, stdout=log, stderr=log, start_new_session=True
        )


def end(run: subprocess.Popen[bytes], work: Path, seconds: float = 240) -> int:
    try:
        return run.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        raise AssertionError((work / "log").read_text()) from None


def remote_processes(work: Path) -> list[str]:
    """The command lines of processes on the hosts, which this test has started: they work in its folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == work and b"t2i_adapter" in (process / "cmdline").read_bytes():
                found.append((process / "cmdline").read_text())
        except OSError:
            continue
    return found


def test_a_run_on_two_hosts_that_is_stopped_resumes_by_the_same_command(server: Server, work: Path):
    flags = (*FLAGS, "--train.max_steps", "40")
    assert end(start(server, work, *HOSTS, "--", "alone", *flags), work) == 0, (work / "log").read_text()
    run = start(server, work, *HOSTS, "--", "run", *flags)
    until(lambda: count_lines(work / "run" / "metrics.jsonl") > 1 or run.poll() is not None)
    os.killpg(run.pid, signal.SIGINT)  # as Ctrl-C: to run.sh and to each ssh
    assert end(run, work, 60) == 75, (work / "log").read_text()
    assert read_run(work / "run").state == "stopped"
    assert end(start(server, work, *HOSTS, "--", "run", *flags), work) == 0, (work / "log").read_text()
    assert "2 processes" in (work / "log").read_text()
    assert differences(work / "alone", work / "run") == []


def test_a_lost_connection_stops_the_run_on_all_hosts(server: Server, work: Path):
    run = start(server, work, *HOSTS, "--", "run", *FLAGS, "--train.max_steps", "9999")
    until(lambda: count_lines(work / "run" / "metrics.jsonl") > 1 or run.poll() is not None)
    assert len(remote_processes(work)) >= 4, (work / "log").read_text()  # a launcher and a process of each host
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    until(lambda: not remote_processes(work), 60)
    state = read_run(work / "run")
    assert state.state == "stopped" and state.checkpoints


def test_a_host_that_fails_stops_the_others(server: Server, work: Path):
    began = time.monotonic()
    run = start(server, work, HOSTS[0], "nobody@127.0.0.2", "--", "run", *FLAGS, "--train.max_steps", "9999")
    code = end(run, work, 60)
    said = (work / "log").read_text()
    assert code not in (0, 75), said
    assert "nobody@127.0.0.2 ended with" in said and "127.0.0.1 ended with" in said
    assert time.monotonic() - began < 60 and not remote_processes(work)


@pytest.mark.parametrize("words", [(), HOSTS, ("--", "run"), (*HOSTS, "--"), (*HOSTS, "--", "--data", "data")])
def test_missing_words_are_one_line(words: tuple[str, ...]):
    done = subprocess.run([str(RUN_SH), *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: use: run.sh") and done.stderr.count("\n") == 1
