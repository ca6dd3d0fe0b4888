"""Measures saving at SDXL's size: how long training waits for a checkpoint, and how long until it is on the disk.

It saves an adapter of the size of the official SDXL ones (79 M parameters) with AdamW's two moments, as a run does.
Training waits for the copy. While the writer thread writes, reads back and renames, this process computes matrix
products; the result file holds their speed relative to the speed without the writer.

    python benchmarks/saving.py [--folder FOLDER] [--rounds 5]
"""

from __future__ import annotations

import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import make_parser, write_result
from diffusers import T2IAdapter

from t2i_adapter.training import checkpoint
from t2i_adapter.training.checkpoint import KeepPolicy, TrainingState
from t2i_adapter.training.saving import Saver

SIDE = 512  # rows and columns of the matrices whose products stand for training


def make_state() -> tuple[T2IAdapter, TrainingState]:
    adapter = T2IAdapter(3, [320, 640, 1280, 1280], 2, 16, "full_adapter_xl")
    tensors = {
        f"optimizer.{index}.{key}": torch.rand_like(parameter)
        for index, parameter in enumerate(adapter.parameters())
        for key in ("exp_avg", "exp_avg_sq")
    }
    plan = {"seed": 0, "global_batch": 1, "samples": 1}
    state = {"step": 0, "plan": plan, "numbers": {}, "scaler": {}, "options": {}, "versions": {}}
    return adapter, TrainingState(tensors, state)


def products(until: Callable[[], bool]) -> float:
    """Matrix products a second until `until` returns True."""
    a, done, began = torch.rand(SIDE, SIDE), 0, time.perf_counter()
    while not until():
        a = torch.tanh(a @ a / SIDE)
        done += 1
    return done / (time.perf_counter() - began)


def alone(seconds: float) -> float:
    end = time.perf_counter() + seconds
    return products(lambda: time.perf_counter() > end)


def measure(folder: Path, rounds: int) -> dict[str, object]:
    adapter, training = make_state()
    saver = Saver(folder, KeepPolicy(1), print)
    copy, write, share, nbytes = [], [], [], 0
    for step in range(rounds):
        training.state["step"] = step
        began = time.perf_counter()
        taken = checkpoint.snapshot(adapter, training)
        copied = time.perf_counter()
        nbytes = taken.nbytes
        saver.save(taken)
        del taken
        beside = products(lambda step=step: saver.saved == step)
        write.append(time.perf_counter() - copied)
        copy.append(copied - began)
        share.append(beside / alone(write[-1]))
        saver.wait()
    return {
        "bytes": nbytes,
        "seconds_waited": {"median": statistics.median(copy), "all": copy},
        "seconds_until_whole": {"median": statistics.median(write), "all": write},
        "compute_beside_the_writer": {"median": statistics.median(share), "all": share},
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        figures = measure(Path(scratch), options.rounds)
    result = {
        "command": shlex.join(["python", *sys.argv]),
        **figures,
    }
    write_result("saving", result, options.out, threads=torch.get_num_threads())
    for name in ("seconds_waited", "seconds_until_whole", "compute_beside_the_writer"):
        print(f"{name:<28}{result[name]['median']:.3f}")  # type: ignore[index]


if __name__ == "__main__":
    main()
