"""Compares the diffusers script, unmodified, with the drop-in script of this repository on equal flags, data and start.

Both train the same initial adapter on the same base and pairs, in turn. Each run is its own process on the CPU or GPU,
with equally many threads and empty caches. The script's file is not part of this repository: it is
examples/t2i_adapter/train_t2i_adapter_sdxl.py of diffusers.

    python benchmarks/compare_diffusers.py --script PATH/train_t2i_adapter_sdxl.py
        [--base nano|FOLDER] [--steps 40] [--rounds 3] [--batch 4] [--resolution 128] [--pairs 200] [--threads CORES]
        [--device cpu|cuda] [--precision no|fp16|bf16] [--once]

Measured for each run:
  samples_per_s       batch / median time between two logged steps, without the warm-up
  rss_mib             peak resident memory of the largest process
  tree_rss_mib        peak of the sum over the process and its loader; shared pages count twice
  tree_pss_mib        peak of the sum with shared pages counted once (Linux)
  gpu_mib             peak of the GPU's memory in use, less what was in use before (CUDA)
  first_step_s        from the start of the process to its first finished step: imports, loading, preparing
  later_first_step_s  first_step_s of a second start with the same flags, which finds the caches of the first; not with
                      --once
  wall_s              from the start of the process to its end
  mean_loss           over all steps. The noise differs and the initial weights do not: means far apart would be a fault

The result file holds the settings, the figures of every run, and for each figure the median, the range and the ratio
ours / script (of the medians; least and greatest of the rounds).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from common import ROOT, make_parser, write_result
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

LAUNCHER = ROOT / "benchmarks" / "torchvision_stand_in.py"
OURS, SCRIPT = "ours", "script"
WARM_UP = 5  # intervals skipped: the loader is ahead at first, and buffers are allocated
SAMPLING_S = 0.2  # seconds between readings of the memory; a reading takes milliseconds of one core
LIMIT_S = 3600  # seconds; a run that takes longer hangs
MIB = 2**20

LABELS = {
    "samples_per_s": "samples/s in steady state",
    "rss_mib": "peak memory of the largest process, MiB",
    "tree_rss_mib": "peak memory of all processes, MiB",
    "tree_pss_mib": "peak memory of all processes, shared pages counted once, MiB",
    "gpu_mib": "peak memory of the GPU, MiB",
    "first_step_s": "seconds to the first finished step, nothing prepared",
    "later_first_step_s": "seconds to the first finished step of a second run, with the caches of the first",
    "wall_s": "seconds of the whole run",
    "mean_loss": "mean loss",
}

NUMBERS = ("steps", "rounds", "batch", "resolution", "pairs", "threads")
Figures = dict[str, float]


class BenchmarkError(Exception):
    """A run that cannot be measured. The text is one line, or ends with the last lines of the run's output."""


@dataclass(frozen=True)
class Entry:
    """One logged step. wall: seconds since the epoch."""

    step: int
    wall: float
    loss: float


@dataclass(frozen=True)
class Inputs:
    """The folders that both sides train from: the base, the data and the initial adapter."""

    base: Path
    data: Path
    adapter: Path


def read_entries(folder: Path) -> list[Entry]:
    """Every logged loss in the TensorBoard files under `folder`, in the order of steps."""
    found = []
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(file), size_guidance={SCALARS: 0})  # 0: all
        events.Reload()
        if "loss" in events.Tags()[SCALARS]:
            found += [Entry(event.step, event.wall_time, event.value) for event in events.Scalars("loss")]
    return sorted(found, key=lambda entry: entry.step)


def intervals(entries: Sequence[Entry]) -> list[float]:
    """Seconds between consecutive steps, without the warm-up (or without the first quarter of a short run)."""
    steps = [entry.step for entry in entries]
    if len(entries) < 3 or steps != list(range(1, len(entries) + 1)):
        raise BenchmarkError(f"The log has steps {steps}; expected are 1, 2, 3, ..., at least three.")
    found = [after.wall - before.wall for before, after in pairwise(entries)]
    return found[min(WARM_UP, len(found) // 4) :]


def figures(entries: Sequence[Entry], *, started: float, finished: float, batch: int, peaks: Figures) -> Figures:
    """Computes the figures of one run. started, finished: seconds since the epoch."""
    found = {
        "samples_per_s": batch / statistics.median(intervals(entries)),
        **peaks,
        "first_step_s": entries[0].wall - started,
        "wall_s": finished - started,
        "mean_loss": statistics.fmean(entry.loss for entry in entries),
    }
    return {name: round(value, 4) for name, value in found.items()}


def summarise(rounds: Sequence[dict[str, Figures]]) -> dict[str, dict[str, Any]]:
    """Figure -> median, least and greatest of both sides, and the ratio ours / script.

    rounds: side -> figures, for each round.
    """
    summary: dict[str, dict[str, Any]] = {}
    for name in rounds[0][OURS]:
        values = {side: [figures[side][name] for figures in rounds] for side in (SCRIPT, OURS)}
        spread = {
            side: {"median": statistics.median(found), "min": min(found), "max": max(found)}
            for side, found in values.items()
        }
        ratios = [ours / script for script, ours in zip(values[SCRIPT], values[OURS], strict=True)]
        ratio = spread[OURS]["median"] / spread[SCRIPT]["median"]
        summary[name] = {**spread, "ratio": {"of_medians": ratio, "min": min(ratios), "max": max(ratios)}}
    return summary


def table(summary: dict[str, dict[str, Any]]) -> str:
    """The Markdown table of the documentation."""
    lines = ["| median (range) | diffusers script | ours | ours / script |", "|---|---|---|---|"]
    for name, row in summary.items():
        script, ours = (_spread(row[side]["median"], row[side]) for side in (SCRIPT, OURS))
        lines.append(f"| {LABELS[name]} | {script} | {ours} | {_spread(row['ratio']['of_medians'], row['ratio'])} |")
    return "\n".join(lines)


def _spread(middle: float, row: Figures) -> str:
    return f"{_digits(middle)} ({_digits(row['min'])} to {_digits(row['max'])})"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def prepare(folder: Path, options: argparse.Namespace) -> Inputs:
    """Renders the pairs and initialises the adapter that both sides start from."""
    import torch

    from t2i_adapter.config.tree import AdapterOptions, BaseOptions
    from t2i_adapter.data.shapes import write_dataset
    from t2i_adapter.models import nano
    from t2i_adapter.models.adapter import build_adapter
    from t2i_adapter.models.open import open_base

    base = nano.path() if options.base == "nano" else Path(options.base).resolve()
    torch.manual_seed(0)
    adapter = build_adapter(AdapterOptions(), open_base(BaseOptions(name=str(base))).unet_config)
    adapter.save_pretrained(folder / "adapter")
    write_dataset(
        folder / "data", num=options.pairs, split="train", seed=0, size=options.resolution, condition="outline"
    )
    return Inputs(base, folder / "data", folder / "adapter")


def flags(inputs: Inputs, output: Path, options: argparse.Namespace) -> list[str]:
    """Flags of both sides; all other options have the script's defaults on both."""
    named = {
        "pretrained_model_name_or_path": inputs.base,
        "adapter_model_name_or_path": inputs.adapter,
        "train_data_dir": inputs.data,
        "output_dir": output,
        "resolution": options.resolution,
        "train_batch_size": options.batch,
        "max_train_steps": options.steps,
        "checkpointing_steps": options.steps,  # one checkpoint each, at the end
        "mixed_precision": options.precision,
        "report_to": "tensorboard",
        "seed": 0,
    }
    return [f"--{name}={value}" for name, value in named.items()]


def command(side: str, script: Path) -> list[str]:
    """Command line of a side before its flags. Ours logs every step, as the script does."""
    if side == SCRIPT:
        return [sys.executable, str(LAUNCHER), str(script.resolve())]
    return [sys.executable, str(ROOT / "train_t2i_adapter_sdxl.py"), "--tracking.log_every=1"]


def environment(caches: Path, threads: int, device: str = "cpu") -> dict[str, str]:
    """Environment of both sides: caches of this run alone, no network, `threads` CPU threads, no GPU unless `device` is
    cuda."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_CACHE_HOME"))}
    return inherited | {
        "HF_HOME": str(caches / "huggingface"),
        "T2I_ADAPTER_CACHE": str(caches / "prepared"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        **({} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}),
    }


def run(side: str, inputs: Inputs, options: argparse.Namespace) -> Figures:
    """Measures one side: a whole run with empty caches and an empty folder, then the start of a second run with the
    caches of the first."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        found = once(side, inputs, folder, options)
        if options.once:
            return found
        shutil.rmtree(folder / "out")  # not the caches, whose keys contain the folder in the script
        again = once(side, inputs, folder, options)
        return found | {"later_first_step_s": again["first_step_s"]}


def once(side: str, inputs: Inputs, folder: Path, options: argparse.Namespace) -> Figures:
    """Measures one run, with its output and caches in `folder`."""
    log, output = folder / "log.txt", folder / "out"
    line = [*command(side, options.script), *flags(inputs, output, options)]
    with log.open("wb") as file:
        started = time.time()
        process = subprocess.Popen(
            line,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment(folder / "caches", options.threads, options.device),
            start_new_session=True,
        )
        peaks = watch(process, Card() if options.device == "cuda" else None)
        finished = time.time()
    if process.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])
        raise BenchmarkError(f"{side} ended with code {process.returncode}:\n{tail}")
    return figures(read_entries(output), started=started, finished=finished, batch=options.batch, peaks=peaks)


class Card:
    """The GPU's memory that others than this process use, since this object was made."""

    def __init__(self) -> None:
        import torch

        self._info = torch.cuda.mem_get_info
        self._before = self._used()

    def _used(self) -> int:
        free, total = self._info()
        return total - free

    def memory(self) -> Figures:
        return {"gpu_mib": (self._used() - self._before) / MIB}


def watch(process: subprocess.Popen[bytes], card: Card | None = None) -> Figures:
    """Waits for the process' end and returns the memory peaks of it and its descendants, in MiB."""
    peaks: Figures = {}
    deadline = time.monotonic() + LIMIT_S
    try:
        while True:
            for name, value in (memory(process.pid) | (card.memory() if card else {})).items():
                peaks[name] = max(value, peaks.get(name, 0.0))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SAMPLING_S)
                return peaks
            if time.monotonic() > deadline:
                raise BenchmarkError(f"A run took more than {LIMIT_S} s and was ended.")
    finally:
        if process.poll() is None:  # it hangs, or this program was interrupted
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def memory(pid: int) -> Figures:
    """Resident memory of a process tree now, in MiB. A process that ends meanwhile is not counted."""
    rss, pss = [], []
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                found = process.memory_full_info()
                rss.append(found.rss / MIB)
                pss.append(getattr(found, "pss", 0) / MIB)
    sums = {"rss_mib": max(rss, default=0.0), "tree_rss_mib": sum(rss)}
    return {**sums, "tree_pss_mib": sum(pss)} if sum(pss) else sums


def torchvision_version() -> str:
    """The version of torchvision, or the name of its stand-in."""
    try:
        return version("torchvision")
    except PackageNotFoundError:
        return "none: benchmarks/torchvision_stand_in.py"


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The key `settings` of the result file, without paths of this machine: a digest identifies the script."""
    return {
        "script": {"name": options.script.name, "sha256": hashlib.sha256(options.script.read_bytes()).hexdigest()},
        "base": Path(options.base).name,
        **{name: getattr(options, name) for name in NUMBERS},
        "precision": {"no": "fp32"}.get(options.precision, options.precision),
        "torchvision": torchvision_version(),
        "warm_up_steps": WARM_UP,
    }


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--script", type=Path, required=True, help="the diffusers script")
    parser.add_argument("--base", default="nano", help="nano, or a diffusers folder of an SDXL")
    parser.add_argument("--steps", type=int, default=40, help="updates of a run; 3 or more")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument("--batch", type=int, default=4, help="samples a step")
    parser.add_argument("--resolution", type=int, default=128, help="side of the pictures in pixels")
    parser.add_argument("--pairs", type=int, default=200, help="pairs in the data")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of each side")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("no", "fp16", "bf16"), default="no", help="mixed precision of both")
    parser.add_argument("--once", action="store_true", help="no second start of each run")
    options = parser.parse_args()
    if not options.script.is_file():
        parser.error(
            f"--script {options.script}: no such file. It is in the diffusers repository, examples/t2i_adapter."
        )
    if options.steps < 3 or options.rounds < 1:
        parser.error("--steps takes 3 or more, --rounds 1 or more")
    return options


def measure(options: argparse.Namespace) -> list[dict[str, Figures]]:
    """Runs the sides in turn; returns side -> figures for each round."""
    rounds: list[dict[str, Figures]] = []
    with tempfile.TemporaryDirectory() as temporary:
        inputs = prepare(Path(temporary), options)
        for number in range(1, options.rounds + 1):
            rounds.append({})
            for side in (SCRIPT, OURS):
                found = rounds[-1][side] = run(side, inputs, options)
                line = "  ".join(f"{name} {_digits(value)}" for name, value in found.items())
                print(f"round {number}  {side:6}  {line}", flush=True)
    return rounds


def main() -> None:
    options = parse()
    try:
        rounds = measure(options)
    except BenchmarkError as fault:
        sys.exit(f"{fault}")
    summary = summarise(rounds)
    result = {"settings": settings(options), "rounds": rounds, "summary": summary}
    write_result("compare_diffusers", result, options.out, on_gpu=options.device == "cuda", threads=options.threads)
    print(table(summary))


if __name__ == "__main__":
    main()
