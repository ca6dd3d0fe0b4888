"""The numbers that a run logs about its own speed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from support.runs import read_metrics, tiny_config

from t2i_adapter.training.meter import Meter
from t2i_adapter.verbs.train import run


def slowly(seconds: float, count: int) -> Iterator[int]:
    for number in range(count):
        time.sleep(seconds)
        yield number


def test_time_until_a_batch_is_there_is_waiting_and_time_after_it_is_not():
    meter, accelerator = Meter(torch.device("cpu")), Accelerator(cpu=True)
    started = time.perf_counter()
    for _ in meter.waiting(slowly(0.05, 4)):  # pyright: ignore[reportArgumentType]
        time.sleep(0.01)
    took = time.perf_counter() - started
    share = meter.read(accelerator, 1)["wait_share"]
    assert 0.2 / took - 0.01 <= share <= 1 - 0.04 / took + 0.01
    for _ in meter.waiting(slowly(0.0, 2)):  # pyright: ignore[reportArgumentType]
        time.sleep(0.05)
    assert meter.read(accelerator, 1)["wait_share"] < 0.5, "each reading starts anew"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_says_what_share_of_its_time_it_waited_for_batches(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, workers: int
):
    changes = {"data.num_workers": workers, "train.max_steps": 6, "tracking.log_every": 2}
    config = tiny_config(tiny_base, tiny_data, tmp_path / "run", changes)
    run(config)
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 3
    assert all(0 <= row["wait_share"] <= 1 for row in rows)
    assert min(row["wait_share"] for row in rows[1:]) < 0.5, "loading takes less than the step, also within it"
