"""One of two processes is killed: both end within a minute, and the same command resumes to the same end."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.ranks import kill_ranks


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_one_of_two_processes_killed(tmp_path: Path):
    found = kill_ranks(tmp_path, 10, seed=0, log=print)
    assert found["found"] == []
    assert found["kills"] == 10
