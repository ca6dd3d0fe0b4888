"""Measures each way to make a step fast, one by one: the training step of `nano` and the encoding of its data.

    python benchmarks/speed_options.py [--rounds 5] [--batch 4] [--resolution 128] [--threads CORES] [--device cpu]
        [--compile] [--only GROUP]

The arms of a group are timed in turn, round after round (A B C A B C), and compared with the group's first arm. On a
CPU, arms of one thread are timed by the thread's CPU time, which other work on the machine disturbs less than wall
time. Arms of several threads, and all arms on a GPU, are timed by wall time. --compile adds the compiled arms, which
take minutes to compile.

The result file holds for each arm the milliseconds of every round, their median, and how many times faster it is than
the group's first arm.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import make_parser, write_result

from t2i_adapter.batches.example import example_batch
from t2i_adapter.config.tree import AdapterOptions, BaseOptions
from t2i_adapter.devices import on_cores
from t2i_adapter.diffusion.schedule import NoiseSchedule
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.base import Base
from t2i_adapter.models.encoders import encode_pixels
from t2i_adapter.models.open import open_base
from t2i_adapter.training.compile import compile_unet
from t2i_adapter.training.cpu.threads import CpuThreads
from t2i_adapter.training.cpu.trace import TRACE_AT, TraceCache
from t2i_adapter.training.step import FrozenModel, batch_losses
from t2i_adapter.types import Batch

Step = Callable[[], object]
REPEAT, WARM_UP = 6, 2


@dataclass(frozen=True)
class Arm:
    """One way to do a step.

    Attributes:
        group: the arms that it is compared with.
        threads: CPU threads; arms of one thread are timed by CPU time.
        make: builds the step.
    """

    group: str
    name: str
    threads: int
    make: Callable[[], Step]


class Bench:
    """The parts of a training step, and the changes to them that the arms measure."""

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

    def cpu_threads(self, count: int, *, replay: bool) -> Step:
        """Forward and backward of a batch that `count` CPU threads share; with `replay` they replay a trace."""
        frozen, adapter, batch = self.frozen(), self.adapter(), self.batch(self.size)
        traces = TraceCache(print) if replay else None
        threads = CpuThreads(count, adapter, lambda network, part: batch_losses(network, frozen, part), traces)

        def run() -> None:
            with on_cores(1):  # of the thread that feeds the CPU threads
                threads.add(batch, 1 / self.size)
                adapter.zero_grad()

        for _ in range(TRACE_AT):
            run()
        return run

    def update(self, **settings: Any) -> Step:
        """AdamW alone."""
        adapter = self.adapter()
        for parameter in adapter.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        return torch.optim.AdamW(adapter.parameters(), lr=1e-6, **settings).step

    def encode(self, at_once: int, layout: torch.memory_format) -> Step:
        """Encodes 32 pictures with the VAE, `at_once` at a time."""
        encoder = self.base.latent_encoder(self.device)
        encoder.vae.to(memory_format=layout)
        pixels = torch.zeros(32, 3, self.resolution, self.resolution, dtype=torch.uint8, device=self.device)
        return lambda: [
            encode_pixels(encoder, part) if at_once <= 8 else _whole(encoder, part) for part in pixels.split(at_once)
        ]


def _whole(encoder: Any, pixels: torch.Tensor) -> torch.Tensor:
    """`encode_pixels` without its limit of pictures at a time."""
    return encoder.encode(pixels.float() / 255)


def arms(bench: Bench, threads: int, *, with_compile: bool) -> Iterator[Arm]:
    last, first = torch.channels_last, torch.contiguous_format
    half = max(1, bench.size // 2)
    yield Arm("a batch on all cores", "each operation on all cores", threads, lambda: bench.step(bench.size))
    if bench.device.type == "cpu":
        count, group = min(threads, bench.size), "a batch on all cores"
        yield Arm(group, "train.cpu_threads, not recorded", threads, lambda: bench.cpu_threads(count, replay=False))
        yield Arm(group, "train.cpu_threads", threads, lambda: bench.cpu_threads(count, replay=True))
    step = "a CPU thread's step"
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
    """Median milliseconds of a step."""
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
    parser = make_parser(__doc__)
    parser.add_argument("--base", default="nano", help="nano, or a diffusers folder of an SDXL")
    parser.add_argument("--rounds", type=int, default=5, help="rounds over all arms")
    parser.add_argument(
        "--batch", type=int, default=4, help="samples a step; the step of one CPU thread takes half of them"
    )
    parser.add_argument("--resolution", type=int, default=128, help="side of the pictures in pixels")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of the arms that use all cores")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--compile", action="store_true", help="measure the compiled step too, which takes minutes")
    parser.add_argument("--only", help="measure this group of arms alone")
    return parser.parse_args()


def main() -> None:
    options = parse()
    bench = Bench(
        open_base(BaseOptions(name=options.base)), torch.device(options.device), options.batch, options.resolution
    )
    groups = measure(bench, options)
    result = {
        "settings": {name: str(getattr(options, name)) for name in vars(options) if name not in ("out", "base")}
        | {"base": Path(options.base).name},
        "groups": groups,
    }
    write_result("speed_options", result, options.out, on_gpu=options.device != "cpu")
    for group, found in groups.items():
        print(f"\n{group}")
        for name, row in found.items():
            print(f"  {name:36} {row['median_ms']:8.1f} ms ({row['clock']})   {row['faster']:.2f}x")


if __name__ == "__main__":
    main()
