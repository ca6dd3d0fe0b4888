"""Set-up of every test: one thread, temporary folders, network on loopback only; and the fixtures of the tiny base.

This file sets the environment when it is imported, before any library reads it. Subprocesses inherit it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # for the tests of benchmarks

HOME = Path(tempfile.mkdtemp(prefix="t2i-adapter-tests-"))
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
FETCHED = Path.home() / ".cache" / "t2i_adapter" / "weights"  # where `make install` downloads to; HOME changes below
os.environ.setdefault("T2I_ADAPTER_WEIGHTS", str(FETCHED))
os.environ.update(
    HOME=str(HOME),
    HF_HOME=str(HOME / "huggingface"),
    T2I_ADAPTER_CACHE=str(HOME / "prepared"),
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
)
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "XDG_CACHE_HOME"):
    os.environ.pop(name, None)

_connect = socket.socket.connect


def _connect_to_loopback(self: socket.socket, address: Any) -> None:
    host = address[0] if isinstance(address, tuple) else None
    if host is not None and host not in ("127.0.0.1", "::1", "localhost"):
        raise OSError(f"a test tried to reach {host}; tests reach loopback only")
    _connect(self, address)


socket.socket.connect = _connect_to_loopback


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random SDXL (tests/support/tiny.py). Read only: a test that changes it makes its own copy."""
    from support.tiny import write_tiny_sdxl

    return write_tiny_sdxl(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image folder of 64 px circles: 8 pairs in train, 4 in test. Read only: a test that changes it makes a copy."""
    from support.tiny import write_circles

    folder = tmp_path_factory.mktemp("data") / "circles"
    write_circles(folder, num=8, split="train", seed=0)
    return write_circles(folder, num=4, split="test", seed=1)


@pytest.fixture
def nothing_is_left_running() -> Iterator[None]:
    """Ends the processes that a test has started, `support.processes`, whatever became of the test."""
    from support.processes import end_all

    yield
    end_all()
