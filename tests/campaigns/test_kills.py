"""A run killed at random moments and resumed by the same command is equal to the bit and leaves no files behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.forks import Forks
from support.kills import WORDS, campaign, make_data


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.soak)])
@pytest.mark.timeout(7200)
def test_a_killed_run_is_the_run_left_alone(tmp_path: Path, kills: int):
    make_data(tmp_path)
    with Forks(tmp_path) as forks:
        found = campaign(forks, WORDS, kills=kills, max_kills_per_run=kills if kills < 10 else 10)
    assert found.faults == []
    assert found.kills == kills
    assert found.runs >= 1
