"""Runs the cases of this folder, and those of tests/gpu, on the emulated device: each file in a process of its own.

The device must be there before torch is imported, so the cases are in files that pytest does not collect by itself. To
run one: `PYTHONPATH=tests .venv/bin/pytest -p support.emulated.device tests/emulated/cases_training.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.emulated.build import UnavailableError, build

HERE = Path(__file__).parent
TESTS = HERE.parent
FILES = sorted(file.name for file in HERE.glob("cases_*.py"))


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    try:
        build()
    except UnavailableError as reason:
        pytest.skip(str(reason))


def run(file: Path, *options: str) -> None:
    """Runs the tests of a file on the emulated device; their output is the message if one fails."""
    words = ["-m", "pytest", "-p", "support.emulated.device", *options, str(file)]
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *words],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-20_000:]


@pytest.mark.parametrize("name", FILES)
def test_on_the_emulated_device(name: str):
    run(HERE / name, "-m", "not soak")


@pytest.mark.soak
def test_more_set_ups_on_the_emulated_device():
    run(HERE / "cases_training.py", "-m", "soak")


@pytest.mark.soak
def test_the_tests_of_a_gpu_run_on_the_emulated_device():
    """Without those of compiled code and of a step's memory, which depend on CUDA's own kernels."""
    run(TESTS / "gpu", "-k", "not compile and not foretell")
