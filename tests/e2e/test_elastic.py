"""Runs on several hosts: one is killed and the rest goes on, one is cut off and the others notice, one is not there.

The hosts are network namespaces with names and addresses of their own (`support/hosts.py`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.hosts import Host, Hosts, why_no_hosts
from support.processes import Run, ranks, until
from support.runs import losses

REASON = why_no_hosts()
needs_hosts = pytest.mark.skipif(bool(REASON), reason=f"no hosts to run on: {REASON}")
STEPS = 60
CONF = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3,join_timeout=60"
"""torchrun's rendezvous, quicker than by default (30 s, 5 s, 3 times): a host counts as lost after 3 s."""


pytestmark = pytest.mark.usefixtures("nothing_is_left_running")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_data: Path) -> Path:
    """A folder with run.yaml, whose global batch does not depend on the number of processes, and straight/, its run in
    one process."""
    folder = tmp_path_factory.mktemp("elastic")
    (folder / "run.yaml").write_text(f"""
base: {{name: {tiny_base}}}
data: {{location: {tiny_data}, resolution: 64, num_workers: 0, prepared_dir: cache}}
train: {{global_batch: 2, batch_size: 2, max_steps: {STEPS}, seed: 5}}
optim: {{lr: 1.0e-4, warmup_steps: 2}}
checkpoint: {{every: 2, resume: auto}}
tracking: {{report_to: none, log_every: 1}}
validation: {{budget: 0}}
""")
    run = Run(folder, *words("straight"))
    assert run.wait() == 0, run.said()
    return folder


def words(name: str, *more: str) -> tuple[str, ...]:
    return ("train", "--recipe", "run.yaml", "--output_dir", name, *more)


def steps_logged(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def launch(host: Host, first: Host, work: Path, nodes: str, restarts: int, *command: str) -> subprocess.Popen[bytes]:
    """One process on this host by torchrun, which meets at the first host."""
    flags = ["--nnodes", nodes, "--nproc_per_node", "1", "--max-restarts", str(restarts), "--rdzv-backend", "c10d"]
    flags += ["--rdzv-endpoint", f"{first.address}:29411", "--rdzv-id", "test", "--rdzv-conf", CONF]
    flags += ["--local-addr", host.address, "-m", "t2i_adapter"]
    env = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return host.start([sys.executable, "-m", "torch.distributed.run", *flags, *command], work, env)


@needs_hosts
def test_a_host_that_is_killed_leaves_a_run_that_ends_alone(work: Path, tmp_path: Path):
    with Hosts(tmp_path, 2) as (first, second):
        command = words("killed", "--train.patience", "20s")
        runs = [launch(host, first, work, "1:2", 3, *command) for host in (first, second)]
        until(lambda: steps_logged(work / "killed") >= 3 or runs[0].poll() is not None, 100)
        assert "2 = 1 x 1 accumulated x 2 processes" in first.said() + second.said(), first.said()
        second.kill()
        assert runs[0].wait(150) == 0, first.said()
        assert "2 = 2 x 1 accumulated x 1 processes" in first.said(), first.said()
        assert re.search(r"Resuming from killed/checkpoint-\d+", first.said())
    # Halves of a batch averaged over processes: another order of float32 sums, grown by some updates
    assert losses(work / "killed") == pytest.approx(losses(work / "straight"), rel=1e-3)


@needs_hosts
def test_a_host_that_is_cut_off_is_noticed_in_bounded_time_and_named(work: Path, tmp_path: Path):
    with Hosts(tmp_path, 2) as (first, second):
        command = words("cut", "--train.patience", "4s", "--train.max_steps", "100000")
        runs = [launch(host, first, work, "2", 0, *command) for host in (first, second)]
        until(lambda: steps_logged(work / "cut") >= 3 or runs[0].poll() is not None, 100)
        second.cut_off()
        began = time.monotonic()
        until(lambda: "lost its connection" in first.said() and "lost its connection" in second.said(), 40)
        assert time.monotonic() - began < 30
        by_host = {host.name: host.said() for host in (first, second)}
    for name, other in (("host-1", "host-2"), ("host-2", "host-1")):
        line = re.search(
            r"error: process \d of 2 on (host-\d) lost its connection to process \d on (host-\d)", by_host[name]
        )
        assert line and line.groups() == (name, other), by_host[name]


def test_a_main_process_that_is_not_there_is_one_line(work: Path):
    env = {**ranks(2)[1], "MASTER_PORT": "1"}
    alone = Run(work, *words("alone", "--train.patience", "2s"), env=env)
    assert alone.wait(60) == 2, alone.said()
    (line,) = re.findall("^error: .*", alone.said(), re.MULTILINE)
    assert "process 1 of 2" in line and "could not join the others at 127.0.0.1:1 within 0:00:02" in line


def test_a_number_of_processes_that_does_not_divide_the_batch_is_one_line(work: Path):
    three = [Run(work, *words("three"), env=env) for env in ranks(3)]
    assert [run.wait() for run in three] == [2, 2, 2], [run.said() for run in three]
    for run in three:
        assert (
            "--train.global_batch 2: it cannot be split equally between 3 processes; it can between 1, 2." in run.said()
        )
    assert not (work / "three").exists()


def test_a_run_that_was_stopped_is_not_trained_again_by_torchrun(work: Path):
    """torchrun restarts what exits with another code than 0, and with it the limit of time would begin anew."""
    more = ("--max_time", "1s", "--train.max_steps", "100000")
    assert Run(work, *words("again", *more)).wait() == 75
    steps = steps_logged(work / "again")
    restarted = Run(work, *words("again", *more), env={"TORCHELASTIC_RESTART_COUNT": "1"})
    assert restarted.wait() == 75
    assert "so it stays stopped" in restarted.said() and steps_logged(work / "again") == steps
    fresh = Run(work, *words("again", *more))
    assert fresh.wait() == 75 and steps_logged(work / "again") > steps
