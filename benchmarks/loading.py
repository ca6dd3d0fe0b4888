"""How a loader process should hand a batch over: in slots of shared memory that are reused, or in new shared memory.

Both sides build the same batches of SDXL's size (1024 px, batch 4) from records in memory, with their noise. `slots` is
the package's way (`batches/packing.py`): the worker writes into one of three slots, and the training process copies the
batch out. `new` is the usual way, as in torch's `default_collate`: each batch gets new shared memory, which the
training process uses in place. Without workers both sides run the same code, so their ratio shows the noise of the
measurement. The consumer copies each tensor once, as a transfer to a device does.

    python benchmarks/loading.py [--rounds 7] [--batches 40] [--out FILE.json]

Result file: settings, and for each number of condition channels and of workers the samples a second of every round, the
medians, and the ratio new / slots. Each round measures both sides, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from t2i_adapter.batches import loader
from t2i_adapter.batches.choices import DrawnSample
from t2i_adapter.batches.packing import Packed, _fields, _lay_out, _write
from t2i_adapter.config.tree import Config, DataOptions, TrainOptions
from t2i_adapter.types import Geometry, ImageRecord, PartialBatch, TextRecord

SIDE, SAMPLES, BATCH = 1024, 8, 4
WARM_UP = 6  # batches
SLOTS = loader.MicroBatches


class Records:
    """A dataset of SAMPLES random records of SDXL's sizes in memory, which loader processes share."""

    views, shards, groups = 1, (SAMPLES,), (np.arange(SAMPLES),)

    def __init__(self, channels: int) -> None:
        rng, h = np.random.default_rng(0), SIDE // 8
        self._images = [
            ImageRecord(
                rng.normal(size=(8, h, h)).astype(np.float16),
                np.broadcast_to(rng.integers(0, 256, (channels, SIDE, SIDE), np.uint8), (3, SIDE, SIDE)),
                Geometry((SIDE, SIDE), (SIDE, SIDE), (0, 0), (SIDE, SIDE)),
            )
            for _ in range(SAMPLES)
        ]
        self._text = TextRecord(*(rng.normal(size=shape).astype(np.float16) for shape in ((77, 2048), (1280,))))

    def __len__(self) -> int:
        return SAMPLES

    def key(self, number: int) -> str:
        return str(number)

    def fetch(self, number: int, view: int, draw: str = "") -> ImageRecord:
        return self._images[number]

    def captions(self, number: int) -> tuple[str, ...]:
        return (str(number),)

    def text(self, caption: str) -> TextRecord:
        return self._text


class NewMemory(SLOTS):
    """Batches in new shared memory."""

    def _pack(self, samples: list[DrawnSample]) -> Packed:
        if get_worker_info() is None:
            return super()._pack(samples)
        columns = _lay_out(samples)
        storage = torch.UntypedStorage._new_shared(columns[-1].end)
        memory = torch.empty(0, dtype=torch.uint8).set_(storage)
        _write(samples, columns, memory)
        return Packed(columns, _fields(samples), memory)


def batches(side: type[SLOTS], records: Records, workers: int, count: int) -> Iterator[PartialBatch]:
    loader.MicroBatches = side
    config = Config(data=DataOptions(num_workers=workers), train=TrainOptions(batch_size=BATCH, seed=0))
    return loader.make_partial_batches(
        records, config, rank=0, world=1, start_step=0, stop_step=count, num_timesteps=1000
    )


def rate(source: Iterator[PartialBatch], count: int) -> float:
    """Samples a second, after WARM_UP batches."""
    for _ in range(WARM_UP):
        next(source)
    began = time.perf_counter()
    for batch in source:
        copy(batch)
    return count * BATCH / (time.perf_counter() - began)


def copy(batch: PartialBatch) -> None:
    for value in vars(batch).values():
        if isinstance(value, torch.Tensor):
            (value[:, :1] if value.ndim == 4 and value.stride(1) == 0 else value).clone()


def compare(records: Records, workers: int, options: argparse.Namespace) -> dict[str, Any]:
    sides: dict[str, type[SLOTS]] = {"slots": SLOTS, "new": NewMemory}
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(options.rounds):
        for name in sorted(sides, reverse=number % 2 == 0):
            source = batches(sides[name], records, workers, options.batches + WARM_UP)
            found[name].append(round(rate(source, options.batches), 1))
    ratios = sorted(new / slots for new, slots in zip(found["new"], found["slots"], strict=True))
    return {
        "samples_per_s": found,
        "median": {name: statistics.median(values) for name, values in found.items()},
        "new / slots": round(statistics.median(ratios), 2),
        "range": [round(ratios[0], 2), round(ratios[-1], 2)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=40, help="that a rate is measured over")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": {"cpu_cores": os.cpu_count(), "processor": platform.machine(), "threads": 1},
        "versions": {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()},
        "settings": {"side": SIDE, "batch": BATCH, "rounds": options.rounds, "batches": options.batches},
    }
    for channels in (1, 3):
        records = Records(channels)
        for workers in (0, 1, 2):
            name = f"{channels} condition channels, {workers} workers"
            result[name] = compare(records, workers, options)
            print(name, result[name]["median"], result[name]["new / slots"], result[name]["range"], flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
