"""A training run's step beside the bare one: what loading, logging and keeping count add to forward, backward, update.

    python benchmarks/step_time.py [--rounds 3] [--steps 60] [--batch 4] [--resolution 128] [--threads CORES]
        [--out benchmarks/step_time.json]

The run is the real one, on `nano`, from a cache that is filled beforehand, logging every 10 steps. The bare step is one
batch over and over: gradients, clipping, optimiser, with the run's own number of threads. They take turns, A B A B.

Result file: settings, versions, machine, each round's milliseconds a step (medians; the first ones, until they are
recorded, left out), the run's share of time spent waiting for batches, and the ratio run / bare of the medians of
all rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

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
from t2i_adapter.training.cpu.lanes import CpuThreads, count_cpu_threads
from t2i_adapter.training.cpu.trace import RECORD_AT, TraceCache
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
            train_data_dir=str(folder / "data"), resolution=options.resolution, prepared_dir=str(folder / "prepared")
        ),
        train=TrainOptions(batch_size=options.batch, max_steps=options.steps, seed=0),
        checkpoint=CheckpointOptions(every=options.steps),
        tracking=TrackingOptions(report_to="none", log_every=LOG_EVERY),
    )


def in_a_run(config: Config, number: int) -> Step:
    """Milliseconds a step, and the share of the time in which the run waited for batches."""
    config = replace(config, output_dir=f"{config.output_dir}-{number}")
    run(config)
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines][1 + RECORD_AT // LOG_EVERY :]
    return {
        "ms": statistics.median(1000 * config.train.batch_size / row["samples_per_s"] for row in rows),
        "wait_share": statistics.mean(row["wait_share"] for row in rows),
    }


class Bare:
    """Gradients, clipping and optimiser on a batch of the same data."""

    def __init__(self, config: Config) -> None:
        base = open_base(config.base)
        self._frozen = load_frozen_model(config, base, CPU, torch.float32)
        self._adapter = build_adapter(config.adapter, base.unet_config).train()
        self._optimizer = make_optimizer(config.optim, self._adapter.parameters(), config.optim.lr)
        self._batch = a_batch(config)
        self._lanes = CpuThreads(
            count_cpu_threads(None, CPU, len(self._batch), 1),
            self._adapter,
            lambda network, part: batch_losses(network, self._frozen, part),
            TraceCache(print),
        )

    def step(self) -> None:
        self._lanes.add(self._batch, 1 / len(self._batch))
        torch.nn.utils.clip_grad_norm_(self._adapter.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def measure(self, steps: int) -> Step:
        """In tens, as the run logs them."""
        found = []
        for _ in range(RECORD_AT):
            self.step()
        for _ in range(steps // LOG_EVERY):
            started = time.perf_counter()
            for _ in range(LOG_EVERY):
                self.step()
            found.append(1000 * (time.perf_counter() - started) / LOG_EVERY)
        return {"ms": statistics.median(found[1:])}


def a_batch(config: Config) -> Batch:
    """The run's first."""
    base = open_base(config.base)
    machine = PrepareContext(base, CPU, torch.float32, cache_root(config.data.prepared_dir), progress=False)
    facts = prepare(open_source(config.data, 0), config.data, machine, in_channels=config.adapter.in_channels)
    plain = replace(config, data=replace(config.data, num_workers=0))
    drafts = make_partial_batches(facts, plain, rank=0, world=1, start_step=0, stop_step=1, num_timesteps=1000)
    return Encoders(base, CPU, torch.float32).complete(next(drafts))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--steps", type=int, default=60, help="updates a turn, 20 or more")
    parser.add_argument("--batch", type=int, default=4, help="samples a step")
    parser.add_argument("--resolution", type=int, default=128, help="side of the pictures in pixels")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of either side")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/step_time.json"))
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
            with on_cores(1):  # of the thread that feeds the lanes, as in a run
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
    names = ("torch", "diffusers", "accelerate", "sdxl-t2i-adapter")
    result = {
        "date": date.today().isoformat(),
        "machine": {"cpu_cores": os.cpu_count(), "processor": platform.machine(), "system": platform.system()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
        "settings": {name: getattr(options, name) for name in ("rounds", "steps", "batch", "resolution", "threads")}
        | {"load_average": [round(load, 1) for load in os.getloadavg()]},
        "rounds": found,
        "summary": summary,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
