"""Killed at random moments, resumed by one and the same command: the same run to the bit, and nothing left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from forks import Forks
from kills import campaign

WORDS = [
    *("train", "--data.train_data_dir", "data", "--data.resolution", "64", "--train.max_steps", "12"),
    *("--train.batch_size", "1", "--train.seed", "3", "--optim.lr", "1e-3", "--checkpoint.every", "2"),
    *("--checkpoint.keep", "2", "--tracking.log_every", "1", "--tracking.report_to", "none"),
    *("--checkpoint.resume", "auto"),
]


def make_data(folder: Path) -> None:
    words = ["make-data", "shapes", "--out", "data", "--num", "8", "--size", "64", "--seed", "0"]
    subprocess.run([sys.executable, "-m", "t2i_adapter", *words], cwd=folder, check=True, timeout=120)


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.soak)])
@pytest.mark.timeout(7200)
def test_a_killed_run_is_the_run_left_alone(tmp_path: Path, kills: int):
    make_data(tmp_path)
    with Forks(tmp_path) as forks:
        found = campaign(forks, WORDS, kills=kills, most_a_run=kills if kills < 10 else 10)
    assert found.faults == []
    assert found.kills == kills
    assert found.runs >= 1
