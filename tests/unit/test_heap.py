"""Freed memory: kept for the next use while that is wanted, and then given back."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
from resource import RUSAGE_SELF, getrusage
import torch
from t2i_adapter.models import heap
from t2i_adapter.models.threads import sharing_cores

def use(_):
    parts = [torch.ones(2**20) for _ in range(8)]
    del parts

def pages():
    before = getrusage(RUSAGE_SELF).ru_minflt
    list(pool.map(use, range(10)))
    return getrusage(RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) // 256

with sharing_cores(1) as pool:
    by_itself = pages()
    heap.keep_freed()
    pages()
    kept, held = pages(), resident()
    heap.give_back()
    print(by_itself, kept, held - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_freed_memory_is_kept_for_the_next_use_and_then_given_back():
    told = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=200, check=True)
    by_itself, kept, given_back = map(int, told.stdout.split())
    assert by_itself > 10_000, "glibc has the system clear every page anew"
    assert kept < by_itself / 2
    assert given_back > 16, "MiB of the 32 that were in use"
