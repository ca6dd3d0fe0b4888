"""The small parts of a run: plan, learning rate, EMA, lock, trackers' options."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.optimization import get_scheduler

from t2i_adapter.config.tree import Config, HubOptions, OptimOptions, TrainOptions, to_dict
from t2i_adapter.errors import UserError
from t2i_adapter.runs.lock import lock
from t2i_adapter.training import optim, tracking
from t2i_adapter.training.ema import Ema
from t2i_adapter.training.plan import Plan, make_plan


def plan_of(config: Config, samples: int = 1000, processes: int = 1) -> Plan:
    return make_plan(
        config,
        samples=samples,
        processes=processes,
        precision="fp32",
        seed=0,
        trainable_parameters=1,
        device="cpu",
    )


@pytest.mark.parametrize(("processes", "steps", "global_batch"), [(1, 63, 16), (2, 32, 32), (4, 16, 64)])
def test_steps_follow_from_epochs_whatever_the_number_of_processes(processes: int, steps: int, global_batch: int):
    config = Config(train=TrainOptions(batch_size=4, gradient_accumulation_steps=4))
    plan = plan_of(config, processes=processes)
    assert (plan.steps, plan.global_batch) == (steps, global_batch)
    assert 1 <= plan.epochs < 1.1


def test_max_steps_wins_over_epochs_and_lr_scales_with_the_global_batch():
    config = Config(
        train=TrainOptions(batch_size=2, gradient_accumulation_steps=3, max_steps=7, epochs=100),
        optim=OptimOptions(lr=1e-4, scale_lr=True),
    )
    plan = plan_of(config, processes=2)
    assert plan.steps == 7
    assert plan.lr == pytest.approx(1e-4 * 12)


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup"])
def test_the_learning_rate_is_diffusers_schedule_counted_in_updates(name: str):
    """Against the scheduler stepped once an update, as one process would; the number of processes plays no part."""
    options = OptimOptions(lr=1e-3, schedule=name, warmup_steps=5, num_cycles=2, power=2.0)  # pyright: ignore[reportArgumentType]
    weight = torch.nn.Parameter(torch.zeros(1))
    theirs_optimizer = torch.optim.AdamW([weight], lr=1e-3)
    theirs = get_scheduler(name, theirs_optimizer, num_warmup_steps=5, num_training_steps=20, num_cycles=2, power=2.0)
    for processes in (1, 4):
        config = Config(optim=options, train=TrainOptions(max_steps=20))
        ours = optim.lr_schedule(options, plan_of(config, processes=processes))
        got = [ours(step) for step in range(20)]
        if processes == 1:
            expected = []
            for _ in range(20):
                expected.append(theirs.get_last_lr()[0])
                theirs_optimizer.step()
                theirs.step()
        assert got == pytest.approx(expected)


def test_eight_bit_adam_without_its_package_is_one_line():
    if _installed("bitsandbytes"):
        pytest.skip("bitsandbytes is installed here")
    with pytest.raises(UserError, match="--optim.name adamw8bit needs bitsandbytes: pip install"):
        optim.check_available(OptimOptions(name="adamw8bit"))


def _installed(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def test_the_average_follows_its_formula():
    network = torch.nn.Linear(1, 1, bias=False)
    ema, expected = Ema(network, 0.5), network.weight.item()
    for step in range(12):
        with torch.no_grad():
            network.weight += 1
        ema.update(network, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * network.weight.item()
    assert ema.network.weight.item() == pytest.approx(expected, rel=1e-6)
    assert not ema.network.weight.requires_grad


HOLD = """
import pathlib, sys, time
from t2i_adapter.runs.lock import lock

held = lock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_one_writer_a_folder_and_a_dead_process_holds_nothing(tmp_path: Path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"in use by another run \(process {other.pid}\)"):
            lock(tmp_path)
    finally:
        other.kill()
        other.wait(timeout=10)
    lock(tmp_path).close()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output_dir .*file/run: cannot be written"):
        lock(tmp_path / "file" / "run")


def test_a_lock_and_a_curve_are_not_written_through_links(tmp_path: Path):
    precious = tmp_path / "precious"
    precious.write_text("whole")
    for name in (".lock", "metrics.jsonl"):
        (tmp_path / name).symlink_to(precious)
    with pytest.raises(UserError, match="cannot be written"):
        lock(tmp_path)
    tracking.append_metrics(tmp_path / "metrics.jsonl", {"loss": 1.0}, 1)
    tracking.truncate_metrics(tmp_path / "metrics.jsonl", 1)
    assert precious.read_text() == "whole"


@pytest.mark.parametrize("nothing", ["none", "", " "])
def test_no_tracker(nothing: str):
    assert tracking.trackers_named(nothing) is None


def test_a_tracker_that_is_unknown_or_not_installed_is_named():
    with pytest.raises(UserError, match="report_to tensorbord: no such tracker; allowed are none, .*tensorboard"):
        tracking.trackers_named("tensorbord")
    if not _installed("mlflow"):
        with pytest.raises(UserError, match="mlflow: it is not installed. pip install mlflow"):
            tracking.trackers_named("mlflow")


def test_metrics_after_the_resumed_step_are_dropped(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        tracking.append_metrics(path, {"loss": step / 2}, step)
    with path.open("a") as file:
        file.write('{"step": 2, "lo')  # a kill cut it off
    tracking.truncate_metrics(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_the_token_is_in_nothing_that_is_written():
    written = json.dumps(to_dict(Config(hub=HubOptions(token="hf_planted"))))
    assert "hf_planted" not in written and "model_id" in written


FORK = """
import os, pathlib, sys, time
from t2i_adapter.runs.lock import lock

held = lock(pathlib.Path(sys.argv[1]))
if os.fork() == 0:
    time.sleep(30)
    os._exit(0)
print("held", flush=True)
time.sleep(60)
"""


def test_a_worker_that_outlasts_its_killed_run_holds_nothing(tmp_path: Path):
    other = subprocess.Popen(
        [sys.executable, "-c", FORK, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        other.kill()
        other.wait(timeout=10)
        lock(tmp_path).close()
    finally:
        os.killpg(other.pid, signal.SIGKILL)
