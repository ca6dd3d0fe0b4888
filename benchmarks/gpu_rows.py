"""The rows of `gpu.py`, measured in a process of their own: `python benchmarks/gpu_rows.py TASK OUT`.

TASK is a JSON file: `rows` to measure and their `context`. OUT gets a JSON line when a row begins, {"begin": name}, and
one when it ends, {"end": name, "found": figures}. Running out of memory is a result. Any other error ends the process,
because a CUDA device may be unusable after it; `gpu.py` starts another process for the rows that are left.
"""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from children import die_with_parent, last_line, run_child
from common import measured
from inference_cost import time_network, time_picture
from sdxl import SIZES, Bench, Size, step_tflop, train_words, write_base, write_configs
from torch._dynamo.utils import counters

from t2i_adapter.config.tree import TrainOptions
from t2i_adapter.data.shapes import write_dataset
from t2i_adapter.errors import first_line
from t2i_adapter.models.quantize import FORMATS
from t2i_adapter.training.accumulate import is_out_of_memory

MIB, GIB = 2**20, 2**30
Figures = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """What the rows of a run share.

    Attributes:
        size: `true` or `tiny`.
        configs: folder of the base's configs.
        scratch: folder for the base's weights, data and runs.
        until: when measuring must end, seconds of `time.time`.
        rounds, round_s: a row's timed rounds, and the least seconds of one.
        tflop: 10^12 FLOPs of one sample's step; None until the card was measured.
        matmul: TFLOP/s of a large bf16 matrix product on this card; None until the card was measured.
    """

    size: str
    configs: Path
    scratch: Path
    until: float
    rounds: int
    round_s: float
    tflop: float | None = None
    matmul: float | None = None

    @classmethod
    def read(cls, values: dict[str, Any]) -> Context:
        return cls(**{**values, "configs": Path(values["configs"]), "scratch": Path(values["scratch"])})

    @property
    def scale(self) -> Size:
        return SIZES[self.size]

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class SkippedError(Exception):
    """A row that cannot be measured here; the text says why and what to do."""


class Rows:
    """Measures rows. A network on the device is kept for the next row if that has the same settings."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._settings: Figures | None = None
        self._bench: Bench | None = None
        if not context.configs.is_dir():
            write_configs(context.configs, context.scale)

    def measure(self, row: Figures) -> Figures:
        kinds: dict[str, Callable[[Figures], Figures]] = {
            "card": self.card,
            "step": self.step,
            "memory": self.memory,
            "limit": self.limit,
            "network": self.network,
            "picture": self.picture,
            "train": self.train,
            "cosine": self.cosine,
            "curve": self.curve,
            "write": self.write,
        }
        return kinds[row["kind"]](row)

    def bench(self, settings: Figures) -> Bench:
        """The network of these settings; the former one leaves the device first."""
        if self._bench is None or settings != self._settings:
            self.drop()
            self._bench, self._settings = Bench(self.context.configs, settings, self.context.device), settings
        return self._bench

    def drop(self) -> None:
        if self._bench is not None:
            bench, self._bench = self._bench, None
            bench.clear()
            bench.frozen.unet.to("meta")
            torch.compiler.reset()
        empty_cache(self.context.device)

    # The card ---------------------------------------------------------------------------------------------------------

    def card(self, row: Figures) -> Figures:
        """The device, the FLOPs of a step, and the matrix rate that the device reaches."""
        device, side = self.context.device, 8192 if self.context.size == "true" else 128
        a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
        seconds = rounds_of(lambda: a @ b, device, self.context, warm_up=3)
        is_gpu = device.type == "cuda"
        found: Figures = {
            "measured": measured(on_gpu=is_gpu),
            "matmul_side": side,
            "matmul_tflop_per_s": 2 * side**3 / statistics.median(seconds) / 1e12,
            "step_tflop": step_tflop(self.context.configs, self.context.scale.resolution),
        }
        if is_gpu:
            free, total = torch.cuda.mem_get_info()
            capability = ".".join(map(str, torch.cuda.get_device_capability()))
            found |= {"cuda": torch.version.cuda, "capability": capability, "memory_mib": total // MIB}
            found["free_mib"] = free // MIB
        return found

    # A step ----------------------------------------------------------------------------------------------------------

    def step(self, row: Figures) -> Figures:
        """Speed of training steps on one batch, and the most memory that they take."""
        counters.clear()
        bench, is_compiled = self.bench(row["settings"]), "compile" in row["settings"]
        found = self._speed(bench, row["batch"], warm_up=4 if is_compiled else 2)
        if (
            is_compiled and not counters["frames"]["ok"]
        ):  # a run continues uncompiled; here that would be a wrong figure
            raise RuntimeError("nothing was compiled; the log of a run says why")
        return {**found, **({"compiled_frames": counters["frames"]["ok"]} if is_compiled else {})}

    def _speed(self, bench: Bench, size: int, *, warm_up: int) -> Figures:
        bench.clear()
        batch, device = bench.batch(size, self.context.scale.resolution), self.context.device
        began = time.perf_counter()
        loss = bench.step(batch)
        synchronize(device)
        first = time.perf_counter() - began
        seconds = rounds_of(lambda: bench.step(batch), device, self.context, warm_up=warm_up - 1)
        median = statistics.median(seconds)
        found: Figures = {
            "batch": size,
            "first_step_s": first,
            "s_per_step": median,
            "samples_per_s": size / median,
            "least_samples_per_s": size / max(seconds),
            "most_samples_per_s": size / min(seconds),
            "rounds": len(seconds),
            "finite": bool(torch.isfinite(loss)),
            **peaks(device),
        }
        if self.context.tflop:
            found["tflop_per_s"] = found["samples_per_s"] * self.context.tflop
        if self.context.tflop and self.context.matmul:
            found["share_of_matmul"] = found["tflop_per_s"] / self.context.matmul
        return found

    def memory(self, row: Figures) -> Figures:
        """The most memory of a step beside what `t2i-adapter plan` says."""
        bench, size, pixels = self.bench(row["settings"]), row["batch"], self.context.scale.resolution
        foretold = bench.forecast(size, pixels).total / MIB
        bench.clear()
        batch = bench.batch(size, pixels)
        bench.step(batch)  # the first step makes the optimiser's state
        reset_peaks(self.context.device)
        bench.step(batch)
        synchronize(self.context.device)
        found = {"batch": size, "plan_mib": foretold, **peaks(self.context.device)}
        if "peak_allocated_mib" in found:
            found["plan_over_peak"] = foretold / found["peak_allocated_mib"]
        return found

    def limit(self, row: Figures) -> Figures:
        """The fastest of some batch sizes, held to a memory limit that includes CUDA's own context."""
        if self.context.device.type != "cuda":
            raise SkippedError("a memory limit needs a CUDA device")
        torch.zeros(1, device="cuda")
        free, total = torch.cuda.mem_get_info()
        context = min(total - free, GIB)
        limit = row["limit_gib"] * GIB - context if self.context.size == "true" else total
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
        settings = dict(row["settings"])
        if settings.get("optimizer") == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
            settings["optimizer"] = "adamw"
        bench, found = self.bench(settings), []
        for size in row["batches"]:
            try:
                found.append(self._speed(bench, size, warm_up=2))
            except RuntimeError as fault:
                if not is_out_of_memory(fault):
                    raise
                break
        if not found:
            return {"out_of_memory": True, "limit_gib": row["limit_gib"]}
        best = max(found, key=lambda entry: entry["samples_per_s"])
        optimizer = settings.get("optimizer", "adamw")
        more = {"limit_gib": row["limit_gib"], "context_mib": context // MIB, "optimizer": optimizer}
        return {**best, "largest_batch": found[-1]["batch"], **more}

    # The price of memory and of control ------------------------------------------------------------------------------

    def cosine(self, row: Figures) -> Figures:
        """Cosine of the adapter's gradient on each quantised base and on the plain one."""
        pixels = self.context.scale.resolution
        bench = self.bench({})
        plain = bench.gradient(bench.batch(row["batch"], pixels))
        found = {}
        for kind in FORMATS:
            bench = self.bench({"quantize": kind})
            gradient = bench.gradient(bench.batch(row["batch"], pixels))
            found[kind] = torch.cosine_similarity(plain.double(), gradient.double(), dim=0).item()
        return found

    def curve(self, row: Figures) -> Figures:
        """Losses over the same batches on the plain base and on a quantised one, both on the device."""
        pixels, device = self.context.scale.resolution, self.context.device
        self.drop()
        benches = [Bench(self.context.configs, row[name], device) for name in ("settings", "against")]
        losses: list[tuple[float, float]] = []
        for seed in range(row["steps"]):
            first, second = (bench.step(bench.batch(1, pixels, seed)).item() for bench in benches)
            losses.append((first, second))
            if time.time() > self.context.until and len(losses) >= 20:
                break
        count = len(losses)
        means = [
            [statistics.fmean(pair[side] for pair in losses[i : i + 20]) for i in range(0, count, 20)]
            for side in (0, 1)
        ]
        whole = [statistics.fmean(pair[side] for pair in losses) for side in (0, 1)]
        return {
            "updates": count,
            "means_of_20_differ_by": max(abs(a / b - 1) for a, b in zip(*means, strict=True)),
            "means_differ_by": abs(whole[0] / whole[1] - 1),
            "losses": [[round(loss, 5) for loss in pair] for pair in losses],
        }

    def network(self, row: Figures) -> Figures:
        """One forward pass of one network for inference."""
        device, unet = self.context.device.type, self.context.scale.unet
        return time_network(row["network"], device, unet["sample_size"], unet)

    def picture(self, row: Figures) -> Figures:
        """The denoising of one picture."""
        device, unet = self.context.device.type, self.context.scale.unet
        return {"steps": row["steps"], **time_picture(row["arm"], device, unet, row["steps"])}

    # The command line ------------------------------------------------------------------------------------------------

    def write(self, row: Figures) -> Figures:
        """Writes the base's weights for the rows that run commands."""
        began = time.perf_counter()
        write_base(self.context.scratch / "base", self.context.scale, self.context.device.type)
        return {"seconds": time.perf_counter() - began}

    def train(self, row: Figures) -> Figures:
        """`t2i-adapter train` as a user runs it, from pictures to the adapter's folder."""
        names = [field.name for field in fields(TrainOptions)]
        if missing := [word for word in row.get("options", ()) if word not in names]:
            raise SkippedError(f"this version has no option train.{missing[0]}")
        scratch, pixels = self.context.scratch, self.context.scale.resolution
        if not (scratch / "data").is_dir():
            write_dataset(scratch / "data", num=16, split="train", size=pixels)
        run = scratch / row["name"]
        changes = {"train.batch_size": row["batch"], "tracking.log_every": row["steps"] // 2}
        words = train_words(scratch / "base", scratch / "data", run, pixels, row["steps"], changes)
        words += [f"--train.{option}" for option in row.get("options", ())]
        began, log = time.perf_counter(), scratch / f"{row['name']}.log"
        left = self.context.until - time.time()
        code = run_child([sys.executable, *words], log, until=time.monotonic() + left)
        if code is None:
            raise SkippedError("no time left; run this part alone with --parts")
        if code:
            raise RuntimeError(last_line(log))
        entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        last = [entry for entry in entries if "samples_per_s" in entry][-1]
        wall = time.perf_counter() - began
        return {"batch": row["batch"], "wall_s": wall, "samples_per_s": last["samples_per_s"], "loss": last["loss"]}


# Time and memory -----------------------------------------------------------------------------------------------------


def rounds_of(run: Callable[[], Any], device: torch.device, context: Context, *, warm_up: int) -> list[float]:
    """Seconds of one call, one number a round. The host waits for the device only at the end of a round.

    A round has as many calls as fill `context.round_s`. There are at least two rounds, and at most `context.rounds`.
    """
    for _ in range(warm_up):
        run()
    synchronize(device)
    reset_peaks(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    calls = max(1, min(100, math.ceil(context.round_s / (time.perf_counter() - began))))
    found: list[float] = []
    while len(found) < context.rounds and (len(found) < 2 or time.time() < context.until):
        began = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize(device)
        found.append((time.perf_counter() - began) / calls)
    return found


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peaks(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peaks(device: torch.device) -> Figures:
    """Most MiB since `reset_peaks`: in tensors, and held by torch's allocator; and MiB of the device in use now, CUDA's
    context included."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info()
    return {
        "peak_allocated_mib": torch.cuda.max_memory_allocated() / MIB,
        "peak_reserved_mib": torch.cuda.max_memory_reserved() / MIB,
        "device_used_mib": (total - free) / MIB,
    }


# The process ---------------------------------------------------------------------------------------------------------


def main() -> None:
    die_with_parent()
    task_file, out = map(Path, sys.argv[1:])
    task = json.loads(task_file.read_text(encoding="utf-8"))
    context = Context.read(task["context"])
    rows = Rows(context)
    full: set[str] = set()  # ladders of batch sizes whose last one did not fit
    with out.open("a", encoding="utf-8") as file:

        def tell(**entry: Any) -> None:
            print(json.dumps(entry), file=file, flush=True)

        for row in task["rows"]:
            name, ladder = row["name"], row.get("ladder")
            if ladder in full:
                tell(end=name, found={"skipped": "a smaller batch did not fit"})
                continue
            if time.time() > context.until:
                tell(end=name, found={"skipped": "no time left; run this part alone with --parts"})
                continue
            tell(begin=name)
            try:
                found = rows.measure(row)
            except SkippedError as reason:
                found = {"skipped": str(reason)}
            except Exception as fault:
                if not is_out_of_memory(fault):
                    tell(end=name, found={"failed": f"{type(fault).__name__}: {first_line(fault)}"})
                    raise
                found = {"out_of_memory": True, "batch": row.get("batch")}
                full |= {ladder} - {None}
            if found.get("out_of_memory"):
                rows.drop()
            tell(end=name, found=found)


if __name__ == "__main__":
    main()
