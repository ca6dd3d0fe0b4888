"""The job files of deploy/slurm on a Slurm cluster of two nodes on this machine, submitted as a user does."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.kills import differences
from support.processes import finish, until
from support.ranks import count_lines
from support.slurm import MISSING, NODES, Cluster

from t2i_adapter.runs.read import read_run

pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"needs Slurm; missing: {' '.join(MISSING)} (Debian: slurmctld slurmd slurm-client munge)"
)
ROOT = Path(__file__).resolve().parents[2]
TRAIN, PREPARE = (str(ROOT / "deploy" / "slurm" / name) for name in ("train.sbatch", "prepare.sbatch"))
SMALL = ("--cpus-per-task=2", "--gpus-per-node=1")
"""What a user overrides for this cluster's nodes."""
DATA = ("--data", "data", "--data.resolution", "64", "--data.num_workers", "0")
RUN = (*DATA, "--train.batch_size", "1", "--train.seed", "3", "--optim.lr", "1e-3", "--tracking.log_every", "1")
STEPS = 60
"""Updates of a run that must still train when it is preempted, a few seconds after its first update."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(more="SlurmctldParameters=preempt_send_user_signal") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def user_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT / 'src'}",
        "T2I_ADAPTER_CACHE": str(tmp_path_factory.mktemp("cache")),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def work(tmp_path: Path) -> Path:
    finish(tmp_path, "make-data", "shapes", "--out", "data", "--num", "8", "--size", "64", "--seed", "0")
    (tmp_path / "other.sh").write_text("#!/bin/bash\nsleep 1\n")
    return tmp_path


def log(work: Path, job: str) -> str:
    return "".join(file.read_text() for file in sorted(work.glob(f"*-{job}*.log")))


def await_steps(work: Path, job: str, run: str, lines: int) -> None:
    """Waits until the run has logged more than `lines` lines, each of which is an update."""
    try:
        until(lambda: count_lines(work / run / "metrics.jsonl") > lines)
    except AssertionError:
        raise AssertionError(log(work, job)) from None


def test_a_run_on_two_nodes_that_is_preempted_is_requeued_and_ends_as_one_left_alone(
    cluster: Cluster, work: Path, user_env: dict[str, str]
):
    words = ("--nodes=2", *SMALL, TRAIN)
    flags = (*RUN, "--train.max_steps", str(STEPS))
    alone = cluster.submit(*words, "alone", *flags, cwd=work, env=user_env)
    cluster.wait(alone, "COMPLETED")
    job = cluster.submit(*words, "run", *flags, cwd=work, env=user_env)
    await_steps(work, job, "run", 1)
    other = cluster.submit("--partition=high", f"--nodelist={NODES[1]}", "--exclusive", "other.sh", cwd=work)
    cluster.wait(other, "COMPLETED")
    cluster.wait(job, "COMPLETED")
    said = log(work, job)
    assert cluster.job(job)["Restarts"] == "1", said
    assert "SIGUSR1" in said and "Resuming from run/checkpoint-" in said and "2 processes" in said
    assert "the run is stopped" in said and "the run is finished" in said
    assert differences(work / "alone", work / "run") == []


@pytest.mark.soak
def test_a_run_whose_steps_get_sigterm_is_requeued_too(cluster: Cluster, work: Path, user_env: dict[str, str]):
    """So Slurm announces a preemption without preempt_send_user_signal: to the steps, not to the job's script."""
    job = cluster.submit(
        "--nodes=1", *SMALL, TRAIN, "run", *RUN, "--train.max_steps", str(STEPS), cwd=work, env=user_env
    )
    await_steps(work, job, "run", 1)
    cluster.run("scancel", "--signal=TERM", job)
    cluster.wait(job, "COMPLETED")
    assert cluster.job(job)["Restarts"] == "1"
    assert "Stopped after step" in log(work, job) and read_run(work / "run").state == "finished"


@pytest.mark.soak
def test_a_run_that_is_warned_before_its_first_update_is_requeued(
    cluster: Cluster, work: Path, user_env: dict[str, str]
):
    job = cluster.submit("--nodes=1", *SMALL, TRAIN, "run", *RUN, "--train.max_steps", "2", cwd=work, env=user_env)
    cluster.wait(job, "RUNNING")
    until(lambda: "No checkpoint in run yet" in log(work, job))
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait(job, "COMPLETED")
    assert cluster.job(job)["Restarts"] == "1", log(work, job)
    assert "Stopped after step" not in log(work, job) and read_run(work / "run").state == "finished"


def test_a_cancelled_run_saves_and_stays_cancelled(cluster: Cluster, work: Path, user_env: dict[str, str]):
    job = cluster.submit("--nodes=1", *SMALL, TRAIN, "run", *RUN, "--train.max_steps", "9999", cwd=work, env=user_env)
    await_steps(work, job, "run", 1)
    cluster.run("scancel", job)
    cluster.wait(job, "CANCELLED", 60)
    assert cluster.job(job)["Restarts"] == "0"
    run = read_run(work / "run")
    assert run.state == "stopped" and run.checkpoints


def test_a_mistake_of_the_user_fails_the_job_with_its_line(cluster: Cluster, work: Path, user_env: dict[str, str]):
    wrong = cluster.submit("--nodes=1", *SMALL, TRAIN, "run", "--data", "nowhere", cwd=work, env=user_env)
    without = cluster.submit("--nodes=1", *SMALL, TRAIN, cwd=work, env=user_env)
    gaps = cluster.submit("--array=2-3", *SMALL, PREPARE, cwd=work, env=user_env)
    for job, line in ((wrong, "nowhere"), (without, "FOLDER"), (gaps, "PARTS=N")):
        cluster.wait(job, "FAILED", 100)
        assert line in log(work, job)
        assert cluster.job(job)["Restarts"] == "0"


def test_a_cache_prepared_by_an_array_job_is_complete_for_training(
    cluster: Cluster, work: Path, user_env: dict[str, str]
):
    env = {**user_env, "T2I_ADAPTER_CACHE": str(work / "cache")}
    array = cluster.submit("--array=1-2", *SMALL, PREPARE, *RUN, cwd=work, env=env)
    after = f"--dependency=afterok:{array}"
    flags = (*RUN, "--train.max_steps", "2")
    job = cluster.submit(after, "--nodes=1", *SMALL, TRAIN, "run", *flags, cwd=work, env=env)
    cluster.wait(array, "COMPLETED")
    cluster.wait(job, "COMPLETED")
    assert "8 pairs (0 new)" in log(work, job), log(work, array) + log(work, job)
