"""Disks that fail for a while, damaged checkpoints: the resumed run is equal to the bit and leaves no files behind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest
from support.disks import Disk, damaged_checkpoints, failing_disk, full_disk, read_only_folder
from support.forks import Forks
from support.kills import WORDS, make_data


@pytest.mark.parametrize("spells", [2, pytest.param(60, marks=pytest.mark.soak)])
@pytest.mark.parametrize("failing", [full_disk, read_only_folder])
@pytest.mark.timeout(7200)
def test_a_run_outlives_its_disk(tmp_path: Path, failing: Callable[[Path], AbstractContextManager[Disk]], spells: int):
    make_data(tmp_path)
    with ExitStack() as held:
        try:
            disk = held.enter_context(failing(tmp_path))
        except OSError as fault:
            pytest.skip(f"mounting a disk for the test needs root ({fault})")
        forks = held.enter_context(Forks(tmp_path))
        found = failing_disk(forks, WORDS, disk, spells=spells)
    assert found["faults"] == 0, found
    assert found["spells"] >= spells and found["runs"] >= 1


@pytest.mark.parametrize("rounds", [3, pytest.param(100, marks=pytest.mark.soak)])
@pytest.mark.timeout(7200)
def test_damaged_checkpoints_are_named_and_the_one_before_is_used(tmp_path: Path, rounds: int):
    make_data(tmp_path)
    with Forks(tmp_path) as forks:
        found = damaged_checkpoints(forks, WORDS, rounds=rounds)
    assert found["faults"] == 0, found
    assert found["runs"] == rounds and found["damaged"] >= rounds
