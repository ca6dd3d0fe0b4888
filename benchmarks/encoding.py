"""Encoding pictures on a CPU, with freed memory kept for the next picture and with what glibc does by itself.

    python benchmarks/encoding.py [--rounds 5] [--pictures 64] [--resolution 128] [--threads CORES]
        [--out benchmarks/encoding.json]

`nano`'s VAE encodes batches on as many threads as cores, as a start does (`cache/pictures.py`). Each way is a process
of its own, in turn, for what a C library has been told cannot be taken back.

Result file: settings, versions, machine; of each round milliseconds a picture (wall), CPU milliseconds spent by the
program and by the system for it, and pages that the system had to clear; the medians, and how many times as fast.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

from t2i_adapter.cache.live import batch_size, encode_pixels
from t2i_adapter.config import BaseOptions
from t2i_adapter.models import heap
from t2i_adapter.models.base import open_base
from t2i_adapter.models.threads import sharing_cores
from t2i_adapter.training.run import versions

KEPT, GIVEN_BACK = "kept", "as glibc does"
Figures = dict[str, float]


def encode(way: str, options: argparse.Namespace) -> Figures:
    """Of the second time that the pictures are encoded, a picture's share."""
    if way == KEPT:
        heap.keep_freed()
    torch.set_num_threads(options.threads)
    encoder = open_base(BaseOptions()).latent_encoder("cpu")
    size = batch_size(options.resolution**2, "cpu")
    batches = torch.randint(0, 256, (options.pictures, 3, *[options.resolution] * 2), dtype=torch.uint8).split(size)
    with sharing_cores(options.threads) as lanes:
        for _ in range(2):
            before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
            list(lanes.map(lambda pixels: encode_pixels(encoder, pixels), batches))
            seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "ms": 1000 * seconds / options.pictures,
        "user_ms": 1000 * (after.ru_utime - before.ru_utime) / options.pictures,
        "system_ms": 1000 * (after.ru_stime - before.ru_stime) / options.pictures,
        "pages": (after.ru_minflt - before.ru_minflt) / options.pictures,
    }


def in_a_process(way: str, words: list[str]) -> Figures:
    done = subprocess.run([sys.executable, __file__, *words, "--child", way], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{way} failed")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/encoding.json"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(encode(options.child, options)))
        return
    rounds = []
    for _ in range(options.rounds):
        rounds.append({way: in_a_process(way, sys.argv[1:]) for way in (GIVEN_BACK, KEPT)})
        print(json.dumps(rounds[-1]), flush=True)
    medians = {
        way: {name: round(statistics.median(each[way][name] for each in rounds), 2) for name in rounds[0][way]}
        for way in rounds[0]
    }
    result = {
        "date": date.today().isoformat(),
        "machine": {"cpu_cores": os.cpu_count(), "processor": platform.machine(), "system": platform.system()},
        "versions": versions(),
        "settings": {name: getattr(options, name) for name in ("rounds", "pictures", "resolution", "threads")},
        "rounds": rounds,
        "medians": medians,
        "faster": medians[GIVEN_BACK]["ms"] / medians[KEPT]["ms"],
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(medians, indent=1))


if __name__ == "__main__":
    main()
