"""The memory that `plan` forecasts, against what a run then takes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RUN = "--data.resolution 128 --data.num_workers 0 --tracking.report_to none --train.seed 0 --train.cpu_threads 1"
PEAK = "print('peak', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
"""Of this program alone: getrusage's peak is inherited from whoever started it."""


@pytest.mark.parametrize("batch", [16, 48])
def test_a_run_takes_the_memory_that_was_foretold(batch: int, tiny_data: Path, tmp_path: Path):
    options = f"{RUN} --data {tiny_data} --train.batch_size {batch} --train.max_steps 3"
    asked = f"plan --no_probe {options}".split()
    told = re.search(r"memory\s+([\d.]+) GiB", printed(f"from t2i_adapter.cli import main; main({asked!r})"))
    assert told is not None
    words = f"train {options} --output_dir {tmp_path}/run".split()
    taken = re.search(r"peak (\d+)", printed(f"from t2i_adapter.cli import main; main({words!r}); {PEAK}"))
    assert taken is not None
    assert float(told[1]) * 1024 == pytest.approx(int(taken[1]) / 1024, rel=0.10)


def printed(script: str) -> str:
    """What a Python program prints. It is a process of its own, so that it has none of this one's memory."""
    line = [sys.executable, "-c", script]
    found = subprocess.run(line, capture_output=True, text=True, timeout=500, env=dict(os.environ))
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout
