"""Memory that really runs out: the process has less address space than a micro-batch needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from t2i_adapter.devices import is_out_of_memory

SCRIPT = """
import json, re, resource, sys
from pathlib import Path

import torch
from accelerate import Accelerator
from t2i_adapter.config.tree import AdapterOptions, BaseOptions
from t2i_adapter.diffusion.schedule import NoiseSchedule
from t2i_adapter.errors import UserError
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.open import open_base
from t2i_adapter.training.accumulate import Accumulation, plain_gradients
from t2i_adapter.batches.example import example_batch
from t2i_adapter.training.step import FrozenModel, batch_losses

SIZE, COUNT, MIB = 16, 2, 2**20
torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
base = open_base(BaseOptions())
unet, schedule = base.unet("cpu", torch.float32), NoiseSchedule.of(base.scheduler())
frozen = FrozenModel(unet, schedule, base.latent_scale, torch.float32)
torch.manual_seed(0)
adapter = build_adapter(AdapterOptions(), base.unet_config)
wrapped = accelerator.prepare(adapter)


def batch(number, size):
    torch.manual_seed(100 * rank + number)
    return example_batch(base.unet_config, size, height=128, width=128)


def gradient(limit=None, size=SIZE):
    losses = []
    add_gradients = plain_gradients(accelerator, lambda samples: batch_losses(wrapped, frozen, samples))
    accumulation = Accumulation(accelerator, wrapped, add_gradients, COUNT, losses.append)
    for parameter in adapter.parameters():
        parameter.grad = None
    batches = [batch(number, size) for number in range(COUNT)]
    if limit is not None:
        used = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (used + limit * MIB, resource.RLIM_INFINITY))
    try:
        accumulation.add(iter(batches))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    grad = torch.cat([parameter.grad.flatten() for parameter in adapter.parameters()]).clone()
    return grad, torch.stack(losses).sum(), accumulation.at_once


whole, loss, unsplit = gradient()
gradient()  # buckets of several processes are laid out anew after the first update
limit = int(sys.argv[1])
try:
    parts, parts_loss, at_once = gradient(limit if rank == accelerator.num_processes - 1 else None)
except UserError as fault:
    print(json.dumps({"refused": str(fault)}), flush=True)
    sys.exit()
found = {
    "rank": rank, "at_once": at_once, "unsplit": unsplit, "loss": abs(parts_loss - loss).item() / loss.item(),
    "gradient": ((parts - whole).norm() / whole.norm()).item(),
}
Path(sys.argv[2], f"{rank}.json").write_text(json.dumps(found))
"""


def measured(tmp_path: Path, limit: int, processes: int = 1) -> tuple[list[dict], str]:
    """What each process found with `limit` MiB beyond what it had, and what they printed."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(limit), str(tmp_path)],
        # Freed memory goes back at once, so that the limit is on what is in use.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(file.read_text()) for file in sorted(tmp_path.glob("*.json"))], done.stdout + done.stderr


def test_a_micro_batch_that_does_not_fit_is_split_and_the_update_is_the_same(tmp_path: Path):
    (found,), printed = measured(tmp_path, limit=80)
    assert found["unsplit"] is None and found["at_once"] < 16
    assert "Out of memory for 16 samples at once: from here on 8" in printed
    # The same sum in another order: float32 rounding
    assert found["loss"] < 1e-6 and found["gradient"] < 1e-5


def test_one_process_that_runs_out_does_not_lose_the_others(tmp_path: Path):
    (first, last), _ = measured(tmp_path, limit=80, processes=2)
    assert first["at_once"] is None and last["at_once"] < 16
    assert first["gradient"] < 1e-5 and last["gradient"] < 1e-5


def test_where_no_single_sample_fits_a_line_says_what_to_do(tmp_path: Path):
    found, printed = measured(tmp_path, limit=4)
    assert not found
    assert "Out of memory for a single sample (" in printed
    assert "use --train.gradient_checkpointing, --base.quantize" in printed


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_both_allocators_are_known(fault: BaseException):
    assert is_out_of_memory(fault)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
