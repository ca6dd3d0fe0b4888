"""A run is never lost: stopped, killed, full, spoilt, spread otherwise; each fault as it comes, through the command.

Runs are processes forked from this one, which has the libraries loaded: they are signalled and killed like any other.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.processes import Run, Terminal, ranks, until
from support.runs import losses

WEIGHTS = "diffusion_pytorch_model.safetensors"
STEPS = 12


pytestmark = pytest.mark.usefixtures("nothing_is_left_running")


def steps_logged(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_data: Path) -> Path:
    """A folder with run.yaml and straight/, the run that nothing happened to."""
    folder = tmp_path_factory.mktemp("reliability")
    recipe = f"""
base: {{name: {tiny_base}}}
data: {{location: {tiny_data}, resolution: 64, num_workers: 0, proportion_empty_prompts: 0.3}}
train: {{batch_size: 2, max_steps: {STEPS}, seed: 5, ema_decay: 0.9}}
optim: {{lr: 1.0e-3, schedule: cosine, warmup_steps: 2}}
checkpoint: {{every: 4}}
tracking: {{report_to: none, log_every: 1}}
"""
    (folder / "run.yaml").write_text(recipe)
    assert Run(folder, *words("straight")).wait() == 0
    return folder


def words(name: str, *more: str) -> tuple[str, ...]:
    return ("train", "--recipe", "run.yaml", "--output_dir", name, *more)


def assert_same_run(one: Path, other: Path) -> None:
    for name in (WEIGHTS, f"checkpoint-{STEPS}/training.safetensors"):
        a, b = load_file(one / name), load_file(other / name)
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == []
    assert losses(one) == losses(other)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 75), (signal.SIGUSR2, 75)],
    ids=lambda value: str(value),
)
def test_a_signal_saves_and_the_printed_command_goes_on_to_the_same_bits(work: Path, number: signal.Signals, code: int):
    name = f"stopped-by-{number}"
    run = Run(work, *words(name, "--checkpoint.every", "100"))
    until(lambda: steps_logged(work / name) >= 2)
    run.send(number)
    assert run.wait() == code
    (saved,) = (work / name).glob("checkpoint-*")
    step = int(saved.name.partition("-")[2])
    assert 2 <= step < STEPS
    assert f"Stopped after step {step} of {STEPS}: {number.name}." in run.said()
    command = shlex.split(run.said().rstrip().splitlines()[-1])
    assert command[0] == "t2i-adapter" and command[-1] == "auto"
    again = Run(work, *command[1:])
    assert again.wait() == 0, again.said()
    assert f"Resuming from {name}/{saved.name}" in again.said()
    assert_same_run(work / name, work / "straight")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_closed_terminal_saves_the_run(work: Path, workers: int):
    name, terminal = f"hung-up-{workers}", Terminal()
    more = ("--checkpoint.every", "100", "--train.max_steps", "2000", "--data.num_workers", str(workers))
    run = Run(work, *words(name, *more), before=terminal.enter)
    terminal.leave_to_run()
    until(lambda: terminal.shown() and steps_logged(work / name) >= 2)
    terminal.close()
    assert run.wait() == 129
    (saved,) = (work / name).glob("checkpoint-*")
    assert int(saved.name.partition("-")[2]) >= 2


def test_wandb_without_a_key_waits_at_no_prompt_and_a_resume_is_the_same_wandb_run(work: Path):
    pytest.importorskip("wandb")

    def without_login(terminal: Terminal) -> None:
        for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
            os.environ.pop(name, None)
        terminal.enter()

    name = "to wandb"
    for steps in (1, 2):
        terminal = Terminal()
        more = ("--tracking.report_to", "wandb", "--train.max_steps", str(steps), "--checkpoint.resume", "auto")
        run = Run(work, *words(name, *more), before=lambda terminal=terminal: without_login(terminal))
        terminal.leave_to_run()
        until(lambda terminal=terminal: "Done" in terminal.shown(), 100)
        assert run.wait(60) == 0
        assert "no API key was found" in terminal.shown() and "Enter your choice" not in terminal.shown()
        terminal.close()
    runs = [folder.name.rpartition("-")[2] for folder in (work / name / "logs" / "wandb").glob("offline-run-*")]
    assert len(runs) == 2 and len(set(runs)) == 1


def test_auto_starts_goes_on_after_a_kill_and_finds_the_run_finished(work: Path):
    command = words("killed", "--checkpoint.resume", "auto")
    run = Run(work, *command)
    until(lambda: (work / "killed" / "checkpoint-4").is_dir())
    run.send(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert "a new run begins" in run.said()
    again = Run(work, *command)
    assert again.wait() == 0, again.said()
    assert "Resuming from killed/checkpoint-" in again.said()
    assert_same_run(work / "killed", work / "straight")
    before = {file: file.stat().st_mtime_ns for file in (work / "killed").rglob("*") if file.is_file()}
    third = Run(work, *command)
    assert third.wait() == 0
    assert "Finished already, with killed/checkpoint-12" in third.said()
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_a_second_interrupt_leaves_at_once(work: Path):
    run = Run(work, *words("impatient", "--train.gradient_accumulation_steps", "5000"))
    until(lambda: "training:" in run.said())
    time.sleep(1.0)
    run.send(signal.SIGINT)
    run.send(signal.SIGINT)  # the same keystroke, passed on by a launcher: not a second one
    time.sleep(1.5)
    assert os.waitpid(run.pid, os.WNOHANG) == (0, 0), run.said()
    run.send(signal.SIGINT)
    assert run.wait(10) == 130
    assert "exits at once" in run.said()


@pytest.mark.parametrize(("more", "code"), [((), 75), (("--train.stop_code", "3"), 3)], ids=["default", "by option"])
def test_max_time_stops_a_run_with_a_code_that_is_not_that_of_a_finished_one(
    work: Path, more: tuple[str, ...], code: int
):
    run = Run(
        work, *words("timed", "--max_time", "1s", "--train.max_steps", "4000", "--checkpoint.resume", "auto", *more)
    )
    assert run.wait() == code
    assert "--train.max_time is reached" in run.said()
    assert list((work / "timed").glob("checkpoint-*"))


def test_a_signal_while_pictures_are_prepared_leaves_what_is_whole(work: Path):
    more = ("--data", "shapes:100000", "--data.kind", "shapes", "--data.prepared_dir", "cache")
    run = Run(work, *words("preparing", *more))
    until(lambda: "Plan" in run.said())
    time.sleep(1.0)
    run.send(signal.SIGTERM)
    assert run.wait(60) == 143
    assert "nothing was trained yet" in run.said() and "Traceback" not in run.said()
    assert not list((work / "preparing").glob("checkpoint-*"))


def test_rows_of_a_group_signal_do_not_end_the_loaders_under_a_run(work: Path):
    """A scheduler signals every process of a job, the loader's too, which must still build the step that is made."""
    run = Run(work, *words("group", "--data.num_workers", "1", "--checkpoint.every", "100"))
    until(lambda: steps_logged(work / "group") >= 2)
    os.killpg(run.pid, signal.SIGTERM)
    assert run.wait() == 143, run.said()
    assert "Traceback" not in run.said()
    assert list((work / "group").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        (("--train.batch_size", "1", "--train.gradient_accumulation_steps", "2"), True),
        (("--checkpoint.keep", "1", "--tracking.log_every", "2"), True),
        (("--train.batch_size", "1"), False),
        (("--train.seed", "6"), False),
        (("--optim.lr", "2e-3"), False),
        (("--data.proportion_empty_prompts", "0.5"), False),
    ],
    ids=lambda value: str(value),
)
def test_what_makes_another_run_needs_to_be_allowed(work: Path, change: tuple[str, ...], allowed: bool):
    command = words("straight", "--checkpoint.resume", "checkpoint-4", "--dry-run", *change)
    plain = Run(work, *command)
    assert plain.wait() == (0 if allowed else 2), plain.said()
    if not allowed:
        assert re.search(r"error: --checkpoint.resume would mix two runs: .* -> .* since checkpoint-4", plain.said())
        assert Run(work, *command, "--allow-changed").wait() == 0


LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "t2i_adapter"]


def launched(work: Path, *more: str) -> subprocess.Popen[str]:
    """Two processes under torchrun."""
    env = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        [*LAUNCH, *more], cwd=work, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def launched_ranks(launcher: int) -> dict[int, int]:
    """Rank -> process of what torchrun has started."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        env = dict(part.split("=", 1) for part in Path(f"/proc/{child}/environ").read_text().split("\0") if "=" in part)
        if "RANK" in env:
            found[int(env["RANK"])] = int(child)
    return found


def test_a_signal_to_one_process_stops_all_at_one_step_and_one_process_goes_on(work: Path):
    name = "two"
    command = words(name, "--train.batch_size", "1", "--checkpoint.every", "100")
    both = [Run(work, *command, env=env) for env in ranks(2)]
    until(lambda: steps_logged(work / name) >= 2)
    both[1].send(signal.SIGTERM)
    assert [run.wait() for run in both] == [143, 143], [run.said() for run in both]
    (saved,) = (work / name).glob("checkpoint-*")
    assert f"Stopped after step {saved.name.partition('-')[2]} of {STEPS}: SIGTERM" in both[0].said()
    alone = Run(work, *words(name, "--checkpoint.resume", "auto"))
    assert alone.wait() == 0, alone.said()
    assert "train.batch_size 1 -> 2" in alone.said()
    # Halves of a batch averaged over processes: another order of float32 sums, grown by a dozen updates
    assert losses(work / name) == pytest.approx(losses(work / "straight"), rel=1e-4)


def test_processes_that_see_different_checkpoints_do_not_train_together(work: Path):
    """Two machines without a common disk: one holds the run, the other one does not."""
    more = ("--train.batch_size", "1", "--checkpoint.resume", "auto")
    steps = losses(work / "straight")
    shutil.copytree(work / "straight", work / "here")
    both = [Run(work, *words(name, *more), env=env) for name, env in zip(("here", "there"), ranks(2), strict=True)]
    assert [run.wait() for run in both] == [2, 2], [run.said() for run in both]
    for run in both:
        assert f"process 0 on {platform.node()} checkpoint-{STEPS} in here" in run.said()
        assert f"process 1 on {platform.node()} none in there" in run.said()
    assert losses(work / "here") == steps and not list((work / "there").glob("checkpoint-*"))


def test_a_process_that_may_not_begin_stops_the_others(work: Path):
    """The folder of one of them holds a run that is not to be resumed."""
    shutil.copytree(work / "straight", work / "old")
    command = ("--train.batch_size", "1")
    both = [Run(work, *words(name, *command), env=env) for name, env in zip(("new", "old"), ranks(2), strict=True)]
    assert [run.wait() for run in both] == [2, 2], [run.said() for run in both]
    assert f"process 1 on {platform.node()} fails: --output_dir old has checkpoint-" in both[0].said()
    assert "resume it with --checkpoint.resume auto" in both[1].said()


def test_one_killed_process_ends_all_within_a_minute_and_is_named_and_two_go_on(work: Path):
    command = words("one-killed", "--train.batch_size", "1", "--checkpoint.every", "1")
    running = launched(work, *command, "--train.max_steps", "4000")
    until(lambda: steps_logged(work / "one-killed") >= 2)
    processes = launched_ranks(running.pid)
    os.kill(processes[1], signal.SIGKILL)
    began = time.monotonic()
    said = running.communicate(timeout=120)[0]
    assert time.monotonic() - began < 60
    assert running.returncode != 0
    assert all(not Path(f"/proc/{pid}").exists() for pid in processes.values())
    assert re.search(r"rank\s*: 1", said)
    more = steps_logged(work / "one-killed") + 2
    resumed = (*command, "--train.max_steps", str(more), "--checkpoint.resume", "auto")
    both = [Run(work, *resumed, env=env) for env in ranks(2)]
    assert [run.wait() for run in both] == [0, 0], [run.said() for run in both]
    assert "Resuming from" in both[0].said()
    assert steps_logged(work / "one-killed") == more


def test_one_process_that_fails_ends_all_within_a_minute_and_is_named(work: Path, tiny_data: Path):
    """A picture goes away: the process that comes upon it first fails, while the other waits for its gradients."""
    shutil.copytree(tiny_data, work / "spoilt")
    more = ("--data", "spoilt", "--data.cache", "none", "--train.max_steps", "4000")
    command = words("one-fails", "--train.batch_size", "1", *more)
    both = [Run(work, *command, env=env) for env in ranks(2)]
    until(lambda: steps_logged(work / "one-fails") >= 2)
    (work / "spoilt" / "train" / "00003.png").unlink()
    began = time.monotonic()
    assert all(run.wait(120) != 0 for run in both)
    assert time.monotonic() - began < 60
    said = "".join(run.said() for run in both)
    assert re.search(r"process [01] of 2 fails: UserError: .*00003", said), said
