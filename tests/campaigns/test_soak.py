"""Memory, open files and threads do not grow over many short epochs; and the fit that tests this detects growth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.soak import EIGHT_HOURS, Reading, soak, trend


def readings(growth: float, noise: float = 1.0, count: int = 400) -> list[Reading]:
    """Artificial readings: 500 MiB, and `growth` MiB more over the updates of eight hours."""
    drawn = np.random.default_rng(0).normal(0, noise, count)
    steps = np.arange(count) * 5
    rss = 500 + growth * steps / EIGHT_HOURS["updates"] + drawn
    return [Reading(int(s), float(r), 20, 8, 2, 0.0) for s, r in zip(steps, rss, strict=True)]


def test_a_leak_is_distinguished_from_noise():
    assert trend(readings(0), "rss_mib").flat
    assert not trend(readings(300), "rss_mib").flat
    found = trend(readings(300), "rss_mib")
    assert found.low < 300 < found.high
    assert trend(readings(0), "files").flat


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_long_run_stays_flat(tmp_path: Path):
    found = soak(tmp_path, minutes=20)
    assert found["flat"], found["trends"]
    assert found["counts"]["saves"] >= EIGHT_HOURS["saves"]
