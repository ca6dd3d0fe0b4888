"""Measures what loading, logging and bookkeeping add to a training step: a run's step beside the bare step.

    python benchmarks/step_time.py [--rounds 3] [--steps 60] [--batch 4] [--resolution 128] [--threads CORES]

The run is `t2i-adapter train` on `nano` with a filled cache, logging every 10 steps. The bare step repeats one batch:
gradients, clipping, optimiser, with as many CPU threads as the run. Run and bare step take turns.

The result file holds the milliseconds a step of each round (medians, without the steps before the trace is replayed),
the share of the run's time spent waiting for batches, and the ratio run / bare of the medians over all rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from common import make_parser, write_result

from t2i_adapter.batches.encoders import Encoders
from t2i_adapter.batches.loader import make_partial_batches
from t2i_adapter.cache.context import PrepareContext
from t2i_adapter.cache.prepare import prepare
from t2i_adapter.config.tree import CheckpointOptions, Config, DataOptions, TrackingOptions, TrainOptions
from t2i_adapter.data.shapes import write_dataset
from t2i_adapter.data.source import open_source
from t2i_adapter.devices import on_cores
from t2i_adapter.files import cache_root
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.open import open_base
from t2i_adapter.training.cpu.threads import CpuThreads, count_cpu_threads
from t2i_adapter.training.cpu.trace import TRACE_AT, TraceCache
from t2i_adapter.training.frozen_model import load_frozen_model
from t2i_adapter.training.optim import make_optimizer
from t2i_adapter.training.step import batch_losses
from t2i_adapter.types import Batch
from t2i_adapter.verbs.train import run

CPU = torch.device("cpu")
PAIRS, LOG_EVERY = 200, 10
Step = dict[str, float]


def config_of(options: argparse.Namespace, folder: Path) -> Config:
    return Config(
        output_dir=str(folder / "run"),
        data=DataOptions(
            location=str(folder / "data"), resolution=options.resolution, prepared_dir=str(folder / "prepared")
        ),
        train=TrainOptions(batch_size=options.batch, max_steps=options.steps, seed=0),
        checkpoint=CheckpointOptions(every=options.steps),
        tracking=TrackingOptions(report_to="none", log_every=LOG_EVERY),
    )


def in_a_run(config: Config, number: int) -> Step:
    """Trains once; returns milliseconds a step and the share of time spent waiting for batches."""
    config = replace(config, output_dir=f"{config.output_dir}-{number}")
    run(config)
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines][1 + TRACE_AT // LOG_EVERY :]
    return {
        "ms": statistics.median(1000 * config.train.batch_size / row["samples_per_s"] for row in rows),
        "wait_share": statistics.mean(row["wait_share"] for row in rows),
    }


class Bare:
    """The bare step: gradients, clipping and optimiser on one batch of the run's data."""

    def __init__(self, config: Config) -> None:
        base = open_base(config.base)
        self._frozen = load_frozen_model(config, base, CPU, torch.float32)
        self._adapter = build_adapter(config.adapter, base.unet_config).train()
        self._optimizer = make_optimizer(config.optim, self._adapter.parameters(), config.optim.lr)
        self._batch = a_batch(config)
        self._threads = CpuThreads(
            count_cpu_threads(None, CPU, len(self._batch), 1),
            self._adapter,
            lambda network, part: batch_losses(network, self._frozen, part),
            TraceCache(print),
        )

    def step(self) -> None:
        self._threads.add(self._batch, 1 / len(self._batch))
        torch.nn.utils.clip_grad_norm_(self._adapter.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def measure(self, steps: int) -> Step:
        """Milliseconds a step, timed over LOG_EVERY steps as the run logs them."""
        found = []
        for _ in range(TRACE_AT):
            self.step()
        for _ in range(steps // LOG_EVERY):
            started = time.perf_counter()
            for _ in range(LOG_EVERY):
                self.step()
            found.append(1000 * (time.perf_counter() - started) / LOG_EVERY)
        return {"ms": statistics.median(found[1:])}


def a_batch(config: Config) -> Batch:
    """The run's first batch."""
    base = open_base(config.base)
    machine = PrepareContext(base, CPU, torch.float32, cache_root(config.data.prepared_dir), progress=False)
    dataset = prepare(open_source(config.data, 0), config.data, machine, in_channels=config.adapter.in_channels)
    plain = replace(config, data=replace(config.data, num_workers=0))
    partial_batches = make_partial_batches(
        dataset, plain, rank=0, world=1, start_step=0, stop_step=1, num_timesteps=1000
    )
    return Encoders(base, CPU, torch.float32).complete(next(partial_batches))


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="turns of run and bare step")
    parser.add_argument("--steps", type=int, default=60, help="updates a turn; 20 or more")
    parser.add_argument("--batch", type=int, default=4, help="samples a step")
    parser.add_argument("--resolution", type=int, default=128, help="side of the pictures in pixels")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of run and bare step")
    options = parser.parse_args()
    if options.steps < 2 * LOG_EVERY or options.rounds < 1:
        parser.error(f"--steps takes {2 * LOG_EVERY} or more, --rounds 1 or more")
    return options


def measure(options: argparse.Namespace) -> dict[str, list[Step]]:
    found: dict[str, list[Step]] = {"run": [], "bare": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_dataset(folder / "data", num=PAIRS, split="train", seed=0, size=options.resolution, condition="outline")
        config = config_of(options, folder)
        bare = Bare(config)
        for number in range(options.rounds):
            with on_cores(1):  # of the thread that feeds the CPU threads, as in a run
                found["bare"].append(bare.measure(options.steps))
            found["run"].append(in_a_run(config, number))
            print(f"round {number + 1}  bare {found['bare'][-1]}  run {found['run'][-1]}", flush=True)
    return found


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    found = measure(options)
    median = {side: statistics.median(row["ms"] for row in rows) for side, rows in found.items()}
    summary = {
        "run_ms": median["run"],
        "bare_ms": median["bare"],
        "run_over_bare": median["run"] / median["bare"],
        "wait_share": statistics.mean(row["wait_share"] for row in found["run"]),
    }
    result = {
        "settings": {name: getattr(options, name) for name in ("rounds", "steps", "batch", "resolution", "threads")},
        "rounds": found,
        "summary": summary,
    }
    write_result("step_time", result, options.out)
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
