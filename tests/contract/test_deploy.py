"""The job files in deploy/: their syntax, the fields that they may have, and the commands in them.

The shapes below hold the fields that these files use, as the programs' own schemas have them: Kubernetes 1.31,
Kubeflow Trainer 2.3, SkyPilot 0.14. A name that is not in them is a typing mistake, or belongs into a shape.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from t2i_adapter.cli import PROG
from t2i_adapter.flags import parse_train

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
SHELL = sorted([*DEPLOY.rglob("*.sh"), *DEPLOY.rglob("*.sbatch")])
JOBS = sorted([*(DEPLOY / "kubernetes").glob("*.yaml"), *(DEPLOY / "skypilot").glob("*.yaml")])
SBATCH = {
    *("job-name", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "output", "array"),
    *("signal", "requeue", "open-mode"),
}
"""Options of sbatch."""

NAMED = {"name!": str, "value!": str}
RESOURCES = {"limits": {"cpu": str, "memory": str, "nvidia.com/gpu": str}}
CONTAINER = {
    "name!": str,
    "image!": str,
    "command": [str],
    "args": [str],
    "env": [NAMED],
    "resources": RESOURCES,
    "volumeMounts": [{"name!": str, "mountPath!": str}],
}
VOLUME = {
    "name!": str,
    "configMap": {"name!": str},
    "persistentVolumeClaim": {"claimName!": str},
    "emptyDir": {"medium!": {"Memory"}, "sizeLimit": str},
}
POD = {
    "spec!": {
        "restartPolicy!": {"Never", "OnFailure"},
        "terminationGracePeriodSeconds": int,
        "containers!": [CONTAINER],
        "volumes": [VOLUME],
    }
}
RULE = {
    "action!": {"Ignore", "FailJob", "FailIndex", "Count"},
    "onPodConditions": [{"type!": str, "status!": {"True"}}],
    "onExitCodes": {"containerName!": str, "operator!": {"In", "NotIn"}, "values!": [int]},
}
JOB_SPEC = {
    "completionMode": {"Indexed"},
    "completions": int,
    "parallelism": int,
    "backoffLimit": int,
    "backoffLimitPerIndex": int,
    "maxFailedIndexes": int,
    "podFailurePolicy": {"rules!": [RULE]},
    "template!": POD,
}
METADATA = {"name": str, "generateName": str, "labels": {"trainer.kubeflow.org/framework": str}}
REPLICATED = {
    "name!": {"node"},  # the name that Kubeflow's torch plugin looks for, as the label and the container's name below
    "template!": {
        "metadata!": {"labels!": {"trainer.kubeflow.org/trainjob-ancestor-step!": {"trainer"}}},
        "spec!": JOB_SPEC,
    },
}
TRAINER = {
    "numNodes": int,
    "numProcPerNode": int,
    "command": [str],
    "args": [str],
    "resourcesPerNode": RESOURCES,
}
SHAPES: dict[str, dict[str, Any]] = {
    "v1 PersistentVolumeClaim": {
        "accessModes!": [{"ReadWriteMany"}],
        "storageClassName": str,
        "resources!": {"requests!": {"storage!": str}},
    },
    "batch/v1 Job": JOB_SPEC,
    "trainer.kubeflow.org/v1alpha1 TrainingRuntime": {
        "mlPolicy!": {"numNodes": int, "torch!": {}},
        "template!": {"spec!": {"failurePolicy": {"maxRestarts!": int}, "replicatedJobs!": [REPLICATED]}},
    },
    "trainer.kubeflow.org/v1alpha1 TrainJob": {
        "runtimeRef!": {"apiGroup": {"trainer.kubeflow.org"}, "kind": {"TrainingRuntime"}, "name!": str},
        "trainer": TRAINER,
    },
}
"""apiVersion and kind -> shape of `spec`. In a shape a dict holds the allowed fields, of which those with ! are
required; a set holds the allowed values."""
SKYPILOT = {
    "name": str,
    "resources!": {
        "accelerators": str,
        "use_spot": bool,
        "disk_size": int,
        "job_recovery": {"max_restarts_on_errors": int, "recover_on_exit_codes": [int]},
    },
    "num_nodes": int,
    "envs": {"RUN": str, "RECIPE": str},
    "workdir": str,
    "file_mounts": {"/bucket": {"source!": str, "mode!": {"MOUNT", "COPY", "MOUNT_CACHED"}}},
    "setup": str,
    "run!": str,
}


def faults(content: Any, shape: Any, place: str) -> list[str]:
    """What of `content` does not fit the shape."""
    if isinstance(shape, set):
        return [] if content in shape else [f"{place}: {content!r} is not one of {sorted(shape)}"]
    if isinstance(shape, type):
        return [] if type(content) is shape else [f"{place}: {content!r} is not of type {shape.__name__}"]
    if isinstance(shape, list):
        if not isinstance(content, list):
            return [f"{place}: {content!r} is no list"]
        return [fault for i, item in enumerate(content) for fault in faults(item, shape[0], f"{place}[{i}]")]
    if not isinstance(content, dict):
        return [f"{place}: {content!r} is no mapping"]
    known = {name.removesuffix("!"): inner for name, inner in shape.items()}
    found = [f"{place}.{name}: no such field" for name in content if name not in known]
    found += [f"{place}.{name[:-1]}: missing" for name in shape if name.endswith("!") and name[:-1] not in content]
    return found + [
        fault
        for name, item in content.items()
        if name in known
        for fault in faults(item, known[name], f"{place}.{name}")
    ]


def objects(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize("file", sorted((DEPLOY / "kubernetes").glob("*.yaml")), ids=lambda file: file.name)
def test_a_kubernetes_file_has_the_fields_of_its_kinds(file: Path):
    for content in objects(file):
        kind = f"{content['apiVersion']} {content['kind']}"
        assert faults(content["spec"], SHAPES[kind], "spec") == []
        assert faults(content["metadata"], METADATA, "metadata") == []
        assert set(content) == {"apiVersion", "kind", "metadata", "spec"}


def test_the_skypilot_file_has_the_fields_of_a_task():
    (task,) = objects(DEPLOY / "skypilot" / "train.yaml")
    assert faults(task, SKYPILOT, "task") == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"backofLimit": 3}, "spec.backofLimit: no such field"),
        ({"template": None}, "spec.template: None is no mapping"),
        ({"backoffLimit": "3"}, "spec.backoffLimit: '3' is not of type int"),
        ({"podFailurePolicy": {"rules": [{"action": "Retry"}]}}, "spec.podFailurePolicy.rules[0].action: 'Retry'"),
        ({"podFailurePolicy": {}}, "spec.podFailurePolicy.rules: missing"),
    ],
)
def test_a_typing_mistake_is_found(change: dict[str, Any], fault: str):
    (job,) = objects(DEPLOY / "kubernetes" / "train.yaml")
    (found,) = faults(job["spec"] | change, JOB_SPEC, "spec")
    assert found.startswith(fault)


def test_numbers_that_stand_in_two_places_are_equal():
    (train,) = objects(DEPLOY / "kubernetes" / "train.yaml")
    (container,) = train["spec"]["template"]["spec"]["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert env["GPUS"] == container["resources"]["limits"]["nvidia.com/gpu"]
    (prepare,) = objects(DEPLOY / "kubernetes" / "prepare.yaml")
    (container,) = prepare["spec"]["template"]["spec"]["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert int(env["PARTS"]) == prepare["spec"]["completions"]
    _, job = objects(DEPLOY / "kubernetes" / "trainjob.yaml")
    trainer = job["spec"]["trainer"]
    assert str(trainer["numProcPerNode"]) == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]


@pytest.mark.parametrize("name", ["train.yaml", "trainjob.yaml"])
def test_torchrun_ends_its_processes_before_kubernetes_does(name: str):
    text = (DEPLOY / "kubernetes" / name).read_text(encoding="utf-8")
    (grace,) = re.findall(r"terminationGracePeriodSeconds: (\d+)", text)
    (patience,) = re.findall(r'TORCH_ELASTIC_SHUTDOWN_TIMEOUT\n +value: "(\d+)"', text)
    assert 30 < int(patience) < int(grace)


@pytest.mark.parametrize("file", JOBS, ids=lambda file: file.name)
def test_volumes_that_are_mounted_exist(file: Path):
    text = file.read_text(encoding="utf-8")
    mounted = set(re.findall(r"\{name: (\w+), mountPath", text))
    assert mounted <= set(re.findall(r"- name: (\w+)", text))
    claims = set(re.findall(r"claimName: (\S+)", text))
    assert claims <= {claim["metadata"]["name"] for claim in objects(DEPLOY / "kubernetes" / "volumes.yaml")}


@pytest.mark.parametrize("file", SHELL, ids=lambda file: file.name)
def test_a_shell_script_has_no_fault(file: Path):
    check_shell(file.read_text(encoding="utf-8"))
    assert file.stat().st_mode & 0o111


@pytest.mark.parametrize("file", JOBS, ids=lambda file: file.name)
def test_a_script_inside_a_job_file_has_no_fault(file: Path):
    for content in objects(file):
        spec = content.get("spec", {}).get("template", {}).get("spec", {})
        scripts = [container["args"][0] for container in spec.get("containers", [])]
        for script in [*scripts, *(content[name] for name in ("setup", "run") if name in content)]:
            check_shell(f"#!/usr/bin/env bash\n{script}")


def check_shell(script: str) -> None:
    """Bash reads the script, and shellcheck finds nothing in it where it is installed."""
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    if shutil.which("shellcheck"):
        words = ["shellcheck", "--shell=bash", "-"]
        done = subprocess.run(words, input=script, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", sorted((DEPLOY / "slurm").iterdir()), ids=lambda file: file.name)
def test_the_options_of_a_slurm_file_are_those_of_sbatch(file: Path):
    text = file.read_text(encoding="utf-8")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", text, flags=re.MULTILINE))
    assert len(options) == text.count("\n#SBATCH") and set(options) <= SBATCH
    assert {"requeue", "open-mode"} <= set(options)
    first = next(i for i, line in enumerate(text.splitlines()) if line and not line.startswith("#"))
    assert "\n#SBATCH" not in "\n".join(text.splitlines()[first:])  # sbatch reads no option after the first command
    if "signal" in options:
        (patience,) = re.findall(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", text)
        assert int(patience) < int(options["signal"].removeprefix("B:USR1@"))


def launches() -> list[tuple[str, str]]:
    """(file, command) of every command of this program in scripts."""
    found = []
    for file in (*SHELL, *JOBS):
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not re.match(r" *(#|echo )", line)]
        text = re.sub(r"\\\n\s*|\n +(?=--rdzv)", " ", "\n".join(lines))
        array = re.search(r"words=\((train .*)\)", text)
        text = text.replace('"${words[@]}"', array[1] if array else "")
        pattern = rf"\b(?:torchrun .*-m t2i_adapter|{PROG}) (?:train|prepare) .*$"
        found += [(str(file.relative_to(DEPLOY)), command) for command in re.findall(pattern, text, re.MULTILINE)]
    return found


LAUNCHES = launches()


def test_every_job_file_launches_something():
    assert {file for file, _ in LAUNCHES} == {
        *("slurm/train.sbatch", "slurm/prepare.sbatch", "torchrun/run.sh"),
        *("kubernetes/train.yaml", "kubernetes/prepare.yaml", "skypilot/train.yaml"),
    }


@pytest.mark.parametrize(("file", "command"), LAUNCHES, ids=[file for file, _ in LAUNCHES])
def test_a_command_in_a_job_file_parses(file: str, command: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    check_command(command)


def test_the_command_of_the_trainjob_parses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    _, job = objects(DEPLOY / "kubernetes" / "trainjob.yaml")
    check_command(shlex.join(job["spec"]["trainer"]["command"] + job["spec"]["trainer"]["args"]))


def check_command(command: str) -> None:
    words = re.sub(r"\s*(&|\)|>\s*/dev/null.*)\s*$", "", command).replace('"$@"', "--recipe FILE.yaml")
    words = re.sub(r"\$\(\(.*?\)\)/\$PARTS|\$SLURM_ARRAY_TASK_ID/\$parts", "3/64", words)
    words = re.sub(r"\$\(head [^)]*\)|\$\{#hosts\[@\]\}|\$\{?[A-Za-z_]+(:-\d+)?\}?", "1", words)
    words = re.sub(r"(--recipe[= ])\S+", r"\1recipes/nano-shapes.yaml", words)
    rest = shlex.split(words)
    if rest[0] == "torchrun":
        launch = get_args_parser().parse_args(rest[1:])
        assert launch.module and launch.training_script == "t2i_adapter"
        rest = ["", *launch.training_script_args]
    parse_train(rest[2:], PROG)
