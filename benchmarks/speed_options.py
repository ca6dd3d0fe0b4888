"""What each means of speed gives, one by one: the frozen-base training step of `nano` and the encoding of its data.

    python benchmarks/speed_options.py [--rounds 5] [--batch 4] [--resolution 128] [--threads CORES] [--device cpu]
        [--compile] [--only GROUP] [--out benchmarks/speed_options.json]

The arms of a group are timed in turn, round after round (A B C A B C), and each is given relative to the group's first.
On a CPU the arms of one thread are timed by the thread's CPU time, which other work on the machine disturbs less than
the clock on the wall; arms of several threads, and a GPU, by the wall. --compile adds the compiled arms, which take
minutes to make.

Result file: settings, versions, machine, and for each arm the milliseconds of every round, the median, and the ratio
of the group's first median to its own (above 1 is faster).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from t2i_adapter.batches.example import example_batch
from t2i_adapter.config.tree import AdapterOptions, BaseOptions
from t2i_adapter.devices import on_cores
from t2i_adapter.diffusion.schedule import NoiseSchedule
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.base import Base
from t2i_adapter.models.encoders import encode_pixels
from t2i_adapter.models.open import open_base
from t2i_adapter.training.compile import compile_unet
from t2i_adapter.training.cpu.lanes import CpuThreads
from t2i_adapter.training.cpu.trace import RECORD_AT, TraceCache
from t2i_adapter.training.step import FrozenModel, batch_losses
from t2i_adapter.types import Batch

Step = Callable[[], object]
REPEAT, WARM_UP = 6, 2


@dataclass(frozen=True)
class Arm:
    """group: what it is compared within. threads: 1 is timed by CPU time. make: builds what is timed, anew a round."""

    group: str
    name: str
    threads: int
    make: Callable[[], Step]


class Bench:
    """The parts of a training step and what is done to them."""

    def __init__(self, base: Base, device: torch.device, batch: int, resolution: int) -> None:
        self.base, self.device, self.size, self.resolution = base, device, batch, resolution

    def frozen(self, change: Callable[[Any], object] | None = None) -> FrozenModel:
        unet = self.base.unet(self.device, torch.float32)
        if change:
            change(unet)
        schedule = NoiseSchedule.of(self.base.scheduler()).to(self.device)
        return FrozenModel(unet, schedule, self.base.latent_scale, torch.float32)

    def adapter(self) -> Any:
        torch.manual_seed(0)
        adapter: Any = build_adapter(AdapterOptions(), self.base.unet_config)
        return adapter.to(self.device).train()

    def batch(self, size: int) -> Batch:
        torch.manual_seed(1)
        return example_batch(
            self.base.unet_config, size, height=self.resolution, width=self.resolution, device=self.device
        )

    def step(
        self, size: int, change: Callable[[Any], object] | None = None, adapt: Callable[[Any], object] | None = None
    ) -> Step:
        """Forward and backward of a batch on this thread."""
        frozen, adapter, batch = self.frozen(change), self.adapter(), self.batch(size)
        if adapt:
            adapt(adapter)

        def run() -> None:
            batch_losses(adapter, frozen, batch).mean().backward()
            adapter.zero_grad()

        return run

    def lanes(self, count: int, *, record: bool) -> Step:
        """The same, the batch shared between threads, which replay their operations once they are recorded."""
        frozen, adapter, batch = self.frozen(), self.adapter(), self.batch(self.size)
        recorder = TraceCache(print) if record else None
        lanes = CpuThreads(count, adapter, lambda network, part: batch_losses(network, frozen, part), recorder)

        def run() -> None:
            with on_cores(1):  # of the thread that feeds the lanes
                lanes.add(batch, 1 / self.size)
                adapter.zero_grad()

        for _ in range(RECORD_AT):
            run()
        return run

    def update(self, **settings: Any) -> Step:
        """AdamW alone."""
        adapter = self.adapter()
        for parameter in adapter.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        return torch.optim.AdamW(adapter.parameters(), lr=1e-6, **settings).step

    def encode(self, at_once: int, layout: torch.memory_format) -> Step:
        """32 pictures through the VAE's encoder, some at a time."""
        encoder = self.base.latent_encoder(self.device)
        encoder.vae.to(memory_format=layout)
        pixels = torch.zeros(32, 3, self.resolution, self.resolution, dtype=torch.uint8, device=self.device)
        return lambda: [
            encode_pixels(encoder, part) if at_once <= 8 else _whole(encoder, part) for part in pixels.split(at_once)
        ]


def _whole(encoder: Any, pixels: torch.Tensor) -> torch.Tensor:
    """`encode_pixels` without its limit."""
    return encoder.encode(pixels.float() / 255)


def arms(bench: Bench, threads: int, *, with_compile: bool) -> Iterator[Arm]:
    last, first = torch.channels_last, torch.contiguous_format
    half = max(1, bench.size // 2)
    yield Arm("a batch on all cores", "each operation on all cores", threads, lambda: bench.step(bench.size))
    if bench.device.type == "cpu":
        count, group = min(threads, bench.size), "a batch on all cores"
        yield Arm(group, "train.lanes, not recorded", threads, lambda: bench.lanes(count, record=False))
        yield Arm(group, "train.lanes", threads, lambda: bench.lanes(count, record=True))
    step = "a lane's step"
    yield Arm(step, "as it is", 1, lambda: bench.step(half))
    yield Arm(step, "channels last, UNet", 1, lambda: bench.step(half, lambda unet: unet.to(memory_format=last)))
    yield Arm(step, "channels last, adapter", 1, lambda: bench.step(half, None, lambda net: net.to(memory_format=last)))
    yield Arm(step, "projections fused", 1, lambda: bench.step(half, lambda unet: unet.fuse_qkv_projections()))
    yield Arm(
        step, "weights of the base not frozen", 1, lambda: bench.step(half, lambda unet: unet.requires_grad_(True))
    )
    if with_compile:
        yield Arm(
            step,
            "train.compile",
            1,
            lambda: bench.step(half, lambda unet: compile_unet(unet, bench.device, "on", None, print)),
        )
    yield Arm("AdamW", "torch's default", 1, bench.update)
    yield Arm("AdamW", "foreach", 1, lambda: bench.update(foreach=True))
    yield Arm("AdamW", "fused", 1, lambda: bench.update(fused=True))
    yield Arm("encoding 32 pictures", "32 at once", 1, lambda: bench.encode(32, first))
    yield Arm("encoding 32 pictures", "8 at once", 1, lambda: bench.encode(8, first))
    yield Arm("encoding 32 pictures", "8 at once, channels last", 1, lambda: bench.encode(8, last))


@contextmanager
def using(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield
    torch.set_num_threads(before)


def milliseconds(step: Step, device: torch.device, threads: int) -> float:
    """The median of some steps."""
    clock = time.thread_time if device.type == "cpu" and threads == 1 else time.perf_counter
    found = []
    for turn in range(WARM_UP + REPEAT):
        started = clock()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if turn >= WARM_UP:
            found.append(1000 * (clock() - started))
    return statistics.median(found)


def measure(bench: Bench, options: argparse.Namespace) -> dict[str, dict[str, dict[str, Any]]]:
    """group -> arm -> figures."""
    found: dict[Arm, list[float]] = {}
    every = arms(bench, options.threads, with_compile=options.compile)
    chosen = [arm for arm in every if options.only in (None, arm.group)]
    made: dict[Arm, Step] = {}
    for number in range(1, options.rounds + 1):
        for arm in chosen:
            with using(arm.threads):
                if arm not in made:
                    made[arm] = arm.make()
                found.setdefault(arm, []).append(milliseconds(made[arm], bench.device, arm.threads))
            print(f"round {number}  {arm.group:24} {arm.name:34} {found[arm][-1]:8.1f} ms", flush=True)
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for arm, values in found.items():
        group = groups.setdefault(arm.group, {})
        median = statistics.median(values)
        first = next(iter(group.values()))["median_ms"] if group else median
        rounded = [round(value, 2) for value in values]
        clock = "thread CPU" if arm.threads == 1 and bench.device.type == "cpu" else "wall"
        group[arm.name] = {"clock": clock, "ms": rounded, "median_ms": median, "faster": first / median}
    return groups


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="nano", help="nano, or a diffusers folder of an SDXL")
    parser.add_argument("--rounds", type=int, default=5, help="rounds over all arms")
    parser.add_argument("--batch", type=int, default=4, help="samples a step; a lane's step takes half of them")
    parser.add_argument("--resolution", type=int, default=128, help="side of the pictures in pixels")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of the arms that use all cores")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--compile", action="store_true", help="measure the compiled step too, which takes minutes")
    parser.add_argument("--only", help="measure this group of arms alone")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/speed_options.json"))
    return parser.parse_args()


def main() -> None:
    options = parse()
    bench = Bench(
        open_base(BaseOptions(name=options.base)), torch.device(options.device), options.batch, options.resolution
    )
    groups = measure(bench, options)
    names = ("torch", "diffusers", "sdxl-t2i-adapter")
    result = {
        "date": date.today().isoformat(),
        "machine": {"cpu_cores": os.cpu_count(), "processor": platform.machine(), "system": platform.system()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
        "settings": {name: str(getattr(options, name)) for name in vars(options) if name not in ("out", "base")}
        | {"base": Path(options.base).name, "load_average": [round(load, 1) for load in os.getloadavg()]},
        "groups": groups,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for group, found in groups.items():
        print(f"\n{group}")
        for name, row in found.items():
            print(f"  {name:36} {row['median_ms']:8.1f} ms ({row['clock']})   {row['faster']:.2f}x")


if __name__ == "__main__":
    main()
