"""The scripts inside the job files for Kubernetes and SkyPilot run, on small data and in folders of this machine."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.processes import finish, until
from support.ranks import count_lines
from support.slurm import free_ports
from support.soak import children

from t2i_adapter.runs.read import read_run

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
RECIPE = """
data: {location: data, resolution: 64, num_workers: 0}
train: {batch_size: 1, seed: 3, max_steps: 25}
tracking: {report_to: none, log_every: 1}
"""


@dataclasses.dataclass
class Script:
    """A script of a job file: its text, with paths of this machine, and its environment."""

    text: str
    env: dict[str, str]
    cwd: Path

    def start(self, log: Path) -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            words = ["bash", "-c", self.text]
            return subprocess.Popen(words, cwd=self.cwd, env=self.env, stdout=file, stderr=file, start_new_session=True)

    def run(self, log: Path) -> int:
        started = self.start(log)
        try:
            return started.wait(240)
        finally:
            if started.poll() is None:
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()


@pytest.fixture
def work(tmp_path: Path) -> Path:
    finish(tmp_path, "make-data", "shapes", "--out", "data", "--num", "8", "--size", "64", "--seed", "0")
    (tmp_path / "millions.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def environment(work: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(DEPLOY.parent / "src"),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }


def kubernetes_script(name: str, work: Path, environment: dict[str, str]) -> Script:
    content = yaml.safe_load((DEPLOY / "kubernetes" / name).read_text())
    (container,) = content["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["bash", "-c"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    env |= {"RUN": str(work / "run"), "T2I_ADAPTER_CACHE": str(work / "cache"), "GPUS": "1", "PARTS": "2"}
    return Script(container["args"][0].replace("/recipe/", f"{work}/"), environment | env, work)


def skypilot_script(work: Path, environment: dict[str, str]) -> Script:
    content: dict[str, Any] = yaml.safe_load((DEPLOY / "skypilot" / "train.yaml").read_text())
    env = {**content["envs"], "RUN": "run", "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"}
    env |= {"SKYPILOT_NUM_GPUS_PER_NODE": "1", "SKYPILOT_NODE_IPS": "127.0.0.1"}
    text = content["run"].replace("/bucket/runs", str(work)).replace("/bucket", str(work))
    return Script(text.replace("29400", str(free_ports(1)[0])), environment | env, work)


@pytest.fixture(params=["kubernetes", "skypilot"])
def script(request: pytest.FixtureRequest, work: Path, environment: dict[str, str]) -> Iterator[Script]:
    kubernetes = request.param == "kubernetes"
    yield kubernetes_script("train.yaml", work, environment) if kubernetes else skypilot_script(work, environment)


def test_a_stopped_run_ends_with_75_and_the_same_script_finishes_it(script: Script, work: Path):
    log = work / "log"
    run = script.start(log)
    until(lambda: count_lines(work / "run" / "metrics.jsonl") > 1 or run.poll() is not None)
    stopped = [run.pid] if "trap" in script.text else children(run.pid)
    for process in stopped:  # Kubernetes signals a container's first process; SkyPilot's script passes no signal on
        os.kill(process, signal.SIGTERM)
    assert run.wait(60) == 75, log.read_text()
    assert read_run(work / "run").state == "stopped"
    broken = dataclasses.replace(script, text=script.text.replace("-m t2i_adapter", "-m no_such_module"))
    assert broken.run(log) == 1, log.read_text()  # this start failed, although the one before was stopped
    assert script.run(log) == 0, log.read_text()
    assert "Resuming from" in log.read_text() and read_run(work / "run").state == "finished"


def test_a_mistake_in_the_recipe_ends_with_2_before_anything_is_launched(script: Script, work: Path):
    (work / "millions.yaml").write_text("data: {location: nowhere}\n")
    assert script.run(work / "log") == 2
    said = (work / "log").read_text()
    assert said.startswith("error: ") and said.count("\n") == 1


def test_the_pods_of_an_indexed_job_prepare_all_parts(work: Path, environment: dict[str, str]):
    script = kubernetes_script("prepare.yaml", work, environment)
    for index in ("0", "1"):
        script.env["JOB_COMPLETION_INDEX"] = index
        assert script.run(work / "log") == 0, (work / "log").read_text()
    said = finish(work, "prepare", "--recipe", "millions.yaml", "--data.prepared_dir", str(work / "cache"))
    assert "8 pairs (0 new)" in said
