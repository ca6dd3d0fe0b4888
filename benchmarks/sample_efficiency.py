"""Measures how much training an adapter needs until it controls: arms that change one choice of the demo's recipe.

Every arm trains on the embedded base (nano) with the trainer's own parts, the same pairs and the same measurements:

- held-out error: squared error of the predicted latents of 32 unseen pairs, at 32 fixed timesteps of the noisier half,
  relative to the base without an adapter (1: the condition is ignored);
- IoU, with `--iou`: pictures from unseen conditions, measured as `t2i-adapter evaluate` does.

A sample is one pass through the UNet: a pair with two noise samples counts twice. The clock is the CPU time of this
one-thread process while it trains, without measuring and sampling. A machine that other work shares gives about the
numbers of an idle one; caches and memory are shared still.

    OMP_NUM_THREADS=1 python benchmarks/sample_efficiency.py --minutes 60
    OMP_NUM_THREADS=1 python benchmarks/sample_efficiency.py --set other --arms chosen before
    OMP_NUM_THREADS=1 python benchmarks/sample_efficiency.py --table

Runs in the result file, or without --out in the newest file of this hardware, are not run again: a later call continues
where an earlier one stopped.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import make_parser, newest, read_earlier, write_result

from t2i_adapter.batches.encoders import Encoders
from t2i_adapter.config.read import with_values
from t2i_adapter.config.tree import AdapterOptions, Config, ObjectiveOptions, TrackingOptions, TrainOptions, to_dict
from t2i_adapter.data.shapes import write_dataset
from t2i_adapter.data.source import open_source
from t2i_adapter.diffusion.objective import add_noise, losses
from t2i_adapter.evaluation.evaluate import ADAPTER, evaluate
from t2i_adapter.evaluation.pairs import Pair, read_pairs
from t2i_adapter.generation.options import SamplingOptions
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.open import open_base
from t2i_adapter.training import optim
from t2i_adapter.training.accelerator import make_accelerator
from t2i_adapter.training.data import make_batches, prepare_data
from t2i_adapter.training.ema import Ema
from t2i_adapter.training.frozen_model import load_frozen_model
from t2i_adapter.training.plan import make_plan
from t2i_adapter.training.setup import make_adapter
from t2i_adapter.training.step import batch_losses, predict
from t2i_adapter.types import Batch
from t2i_adapter.verbs.demo import GUIDANCE, SIZE, demo_config

NEVER = 10**6  # updates; more than any arm has time for
HELD_OUT = 32
THRESHOLDS = (0.8, 0.9)
COMPARED = (64, 128, 256)  # sample counts that the table shows

SETS: dict[str, dict[str, Any]] = {
    "circles": {"kinds": ("circle",), "max_shapes": 1, "patterns": ("plain",), "condition": "outline"},
    "other": {"kinds": ("square", "star", "heart"), "max_shapes": 2, "condition": "segmentation"},
}
"""`circles` is the demo's data; `other` has other shapes, another condition and patterned grounds."""

ADAMW = {"optim.name": "adamw", "optim.lr": 4e-3}
BEFORE = {
    "optim.name": "adamw",
    "optim.lr": 2e-3,
    "optim.warmup_steps": 20,
    "train.ema_decay": 0.0,
    "objective.stratify": False,
}
"""The demo's recipe before this table."""
DIFFUSERS = {
    "optim.name": "adamw",
    "optim.lr": 1e-5,
    "optim.schedule": "constant",
    "optim.warmup_steps": 0,
    "train.batch_size": 4,
    "train.ema_decay": 0.0,
    "objective.min_snr_gamma": None,
    "objective.stratify": False,
}
"""The diffusers script's initialisation, loss, batch size and schedule, at its guide's learning rate."""
FIRST = "first"
LOGIT = {"objective.timesteps": "logit_normal", "objective.logit_mean": 1.2, "objective.logit_std": 0.6}

ARMS: dict[str, dict[str, Any]] = {
    "chosen": {},
    "before": BEFORE,
    "AdamW, 4e-3": ADAMW,
    "2e-2": {"optim.lr": 2e-2},
    "4e-2": {"optim.lr": 4e-2},
    "8e-2": {"optim.lr": 8e-2},
    "batch 8, 2e-2": {"train.batch_size": 8, "optim.lr": 2e-2},
    "batch 8, 2e-2, no average": {"train.batch_size": 8, "optim.lr": 2e-2, "train.ema_decay": 0.0},
    "batch 8, AdamW, 4e-3": {"train.batch_size": 8, **ADAMW},
    "batch 4": {"train.batch_size": 4},
    "no average": {"train.ema_decay": 0.0},
    "two draws of noise of 8 pairs": {"train.noise_draws": 2, "train.batch_size": 8},
    "not stratified": {"objective.stratify": False},
    "uniform timesteps": {"objective.timesteps": "uniform"},
    "logit-normal timesteps": LOGIT,
    "logit-normal timesteps, unweighted": {**LOGIT, "objective.min_snr_gamma": None},
    "unweighted": {"objective.min_snr_gamma": None},
    "min-SNR 5": {"objective.min_snr_gamma": 5.0},
    "start of zeros": {"adapter.init": "zero"},
    "quiet start": {"adapter.init": "quiet"},
    "AdamW, 2e-3": {**ADAMW, "optim.lr": 2e-3},
    "AdamW, 8e-3": {**ADAMW, "optim.lr": 8e-3},
    "AdamW, 4e-3, betas 0.9 and 0.95": {**ADAMW, "optim.betas": (0.9, 0.95)},
    "warm-up of 20": {"optim.warmup_steps": 20},
    "a run of 16 updates, cosine": {"optim.schedule": "cosine", "train.max_steps": 16},
    "a run of 64 updates, cosine": {"optim.schedule": "cosine", "train.max_steps": 64},
    "64 px for the first 64 samples": {FIRST: (64, 64)},
    "64 px for the first 128 samples": {FIRST: (128, 64)},
    "diffusers recipe, 1e-5": DIFFUSERS,
    "diffusers recipe, 1e-3": {**DIFFUSERS, "optim.lr": 1e-3},
}
"""Arm -> the options it changes of the demo's training (`verbs.demo.demo_config`, recipes/nano-shapes.yaml).

FIRST is an option of this benchmark: (samples, pixels) of smaller batches at the beginning.
"""


class Bench:
    """What all arms share: base, dataset and measurements. One process, one thread."""

    def __init__(self, data: Path, out: Path, options: argparse.Namespace) -> None:
        config = demo_config(str(data), str(out), steps=NEVER, seed=0)
        self.options = options
        self.accelerator = make_accelerator(replace(config, tracking=TrackingOptions(report_to="none")))
        self.base = open_base(config.base)
        self.frozen = load_frozen_model(config, self.base, torch.device("cpu"), torch.float32)
        self.dataset = self._dataset(config)
        test = with_values(config, {"data.split": "test"})
        self.held_out = self._held_out(test)
        self.pairs: list[Pair] = []
        self.pipeline: Any = None
        if options.iou:
            self.pairs = read_pairs(open_source(test.data, 0), SIZE, 3)[: options.pairs]
            self.pipeline = self.base.pipeline(
                make_adapter(config, self.base, 0), "cpu", torch.float32, unet=self.frozen.unet
            )
        zero = build_adapter(AdapterOptions(init="zero"), self.base.unet_config)
        self.error_of_base = self.error(zero)

    def _dataset(self, config: Config) -> Any:
        return prepare_data(config, self.accelerator, self.base, open_source(config.data, 0), torch.float32, [])

    def batches(self, dataset: Any, config: Config, start: int = 0, stop: int = NEVER) -> Iterator[Batch]:
        encoders = Encoders(self.base, torch.device("cpu"), torch.float32)
        count = self.frozen.schedule.num_timesteps
        return make_batches(
            dataset, config, encoders, self.accelerator, start_step=start, stop_step=stop, num_timesteps=count
        )

    def course(self, config: Config, first: tuple[int, int]) -> Iterator[Batch]:
        """The batches of a run. first: (samples, pixels) of smaller batches at the beginning."""
        samples, side = first
        small, turn = with_values(config, {"data.resolution": side}), samples // config.train.batch_size
        begun = self.batches(self._dataset(small), small, 0, turn) if turn else ()
        return chain(begun, self.batches(self.dataset, config, turn))

    def _held_out(self, config: Config) -> Batch:
        """Pairs of the test split, each with its own noise and timestep, equal for every arm and seed."""
        even = ObjectiveOptions(timesteps="uniform", stratify=True)
        fixed = with_values(config, {"train": TrainOptions(batch_size=HELD_OUT, seed=0), "objective": even})
        batch = next(self.batches(self._dataset(fixed), fixed))
        half = self.frozen.schedule.num_timesteps // 2
        return replace(batch, timesteps=half + batch.timesteps // 2)

    @torch.no_grad()
    def error(self, adapter: Any) -> float:
        """Mean squared error of the latents that the model predicts from the held-out batch's noisy ones."""
        batch, schedule = self.held_out, self.frozen.schedule
        latents = self.frozen.latent_scale.sample(batch.moments, batch.latent_noise)
        guess = predict(adapter, self.frozen, add_noise(latents, batch.noise, batch.timesteps, schedule), batch)
        return float(losses(guess, batch.noise, 1 / schedule.snr(batch.timesteps)).mean())

    def measure(self, adapter: Any, samples: int) -> dict[str, Any]:
        """The held-out error relative to the base alone, and with --iou the IoU of each generated pair."""
        found: dict[str, Any] = {"error": round(self.error(adapter) / self.error_of_base, 4)}
        if self.pairs and samples >= self.options.iou_from:
            self.pipeline.adapter.load_state_dict(adapter.state_dict())
            sampling = SamplingOptions(steps=self.options.sampling_steps, guidance=GUIDANCE)
            values = evaluate(self.pipeline, self.pairs, sampling=sampling, columns=(ADAPTER,)).values["iou"][ADAPTER]
            found["iou"] = [round(value, 4) for value in values if value is not None]
        return found

    def run(self, config: Config, first: tuple[int, int] = (0, SIZE)) -> list[dict[str, Any]]:
        """Trains as the trainer does, and measures at each sample count of --at, with the clock stopped.

        Ends at the last sample count, at the time limit, or at the highest IoU threshold.
        """
        seed = config.train.seed or 0
        adapter = make_adapter(config, self.base, seed)
        parameters = list(adapter.parameters())
        optimizer = optim.make_optimizer(config.optim, parameters, config.optim.lr)
        plan = make_plan(
            config, samples=1, processes=1, precision="fp32", seed=seed, trainable_parameters=1, device="cpu"
        )
        lr_at = optim.lr_schedule(config.optim, plan)
        ema = Ema(adapter, config.train.ema_decay) if config.train.ema_decay else None
        points: list[dict[str, Any]] = []
        course = self.course(config, first)
        began, updates, samples = time.process_time(), 0, 0
        for batch in course:
            loss = batch_losses(adapter, self.frozen, batch, min_snr_gamma=config.objective.min_snr_gamma).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.optim.max_grad_norm)
            optim.set_lr(optimizer, lr_at(updates))
            optimizer.step()
            optimizer.zero_grad()
            if ema:
                ema.update(adapter, updates)
            updates, samples = updates + 1, samples + len(batch.timesteps)
            if samples < self.options.at[len(points)]:
                continue
            spent = time.process_time() - began
            point = {"samples": samples, "updates": updates, "cpu_s": round(spent, 2)}
            points.append(point | self.measure(ema.network if ema else adapter, samples))
            shown = {k: v if k != "iou" else round(float(np.mean(v)), 3) for k, v in points[-1].items()}
            print(f"    {shown}", flush=True)
            controls = float(np.mean(points[-1].get("iou", 0))) >= THRESHOLDS[-1]
            if len(points) == len(self.options.at) or spent >= self.options.seconds or controls:
                break
            began = time.process_time() - spent
        return points


def crossing(points: list[dict[str, Any]], threshold: float, unit: str) -> float | None:
    """Where the mean IoU reaches the threshold, interpolated linearly between measurements; None if it does not.

    If the first measurement is above the threshold, its place is returned.
    """
    curve = [(point[unit], float(np.mean(point["iou"]))) for point in points if "iou" in point]
    if curve[0][1] >= threshold:
        return curve[0][0]
    for (x0, y0), (x1, y1) in pairwise(curve):
        if y1 >= threshold:
            return x0 + (x1 - x0) * (threshold - y0) / (y1 - y0)
    return None


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the ends of its 95 % percentile bootstrap interval."""
    array = np.asarray(values, float)
    means = array[np.random.default_rng(0).integers(len(array), size=(10_000, len(array)))].mean(1)
    return float(array.mean()), *(float(end) for end in np.quantile(means, [0.025, 0.975]))


def table(runs: list[dict[str, Any]]) -> str:
    """A Markdown table with a row for each set and arm, and the figures of every seed."""
    lines = [
        f"| set | arm | held-out error after {', '.join(map(str, COMPARED))} samples | ms CPU a sample "
        "| samples to IoU 0.8 (0.9) | CPU seconds to IoU 0.8 (0.9) | IoU at the end of those |",
        "|---|---|---|---|---|---|---|",
    ]
    for which, arm in dict.fromkeys((run["set"], run["arm"]) for run in runs):
        mine = [run for run in runs if (run["set"], run["arm"]) == (which, arm)]
        curves = [run["points"] for run in mine]
        drawn = [run["points"] for run in mine if run["iou"]]
        rate = np.mean([1000 * points[-1]["cpu_s"] / points[-1]["samples"] for points in curves])
        cells = [which, arm, _errors(mine), f"{rate:.0f}"]
        cells += [_crossings(drawn, "samples"), _crossings(drawn, "cpu_s"), _end(drawn)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _errors(mine: list[dict[str, Any]]) -> str:
    """Mean over the seeds after each number of samples, and their range if there are several."""
    cells = []
    for at in COMPARED:
        # Runs of one seed with and without --iou are the same run, measured at other places.
        by_seed = {run["seed"]: p["error"] for run in mine for p in run["points"] if p["samples"] == at}
        found = list(by_seed.values())
        apart = f" ({min(found):.2f} to {max(found):.2f})" if len(found) > 1 else ""
        cells.append(f"{np.mean(found):.2f}{apart}" if found else "-")
    return ", ".join(cells)


def _crossings(drawn: list[list[dict[str, Any]]], unit: str) -> str:
    """Each seed's number, or "not in N"."""
    cells = []
    for threshold in THRESHOLDS:
        found = [(crossing(points, threshold, unit), points[-1][unit]) for points in drawn]
        cells.append(", ".join(f"not in {end:.0f}" if value is None else f"{value:.0f}" for value, end in found))
    return f"{cells[0]} ({cells[1]})" if drawn else "not measured"


def _end(drawn: list[list[dict[str, Any]]]) -> str:
    """Mean over the pairs of all seeds, with its 95 % interval."""
    if not drawn:
        return "not measured"
    mean, low, high = interval([value for points in drawn for value in points[-1]["iou"]])
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


def arm_config(changes: dict[str, Any], data: Path, out: Path, seed: int) -> Config:
    """The demo's training with an arm's changes."""
    plain = demo_config(str(data), str(out), steps=NEVER, seed=seed)
    changes = {name: value for name, value in changes.items() if name != FIRST}
    # With a schedule that ends, an arm's learning rate would depend on the largest number of --at.
    return with_values(plain, {"optim.schedule": "constant_with_warmup", **changes})


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="begin no run after this time")
    parser.add_argument("--seconds", type=float, default=600, help="most CPU seconds of training a run")
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--set", choices=list(SETS), default="circles", dest="which")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--at", type=int, nargs="*", default=[64, 128, 192, 256], help="sample counts to measure at")
    parser.add_argument("--iou", action="store_true", help="also generate from unseen conditions and measure IoU")
    parser.add_argument("--iou_from", type=int, default=0, help="measure IoU only from this sample count on")
    parser.add_argument("--pairs", type=int, default=16, help="unseen conditions to generate from")
    parser.add_argument("--sampling_steps", type=int, default=8, help="denoising steps of a measured picture")
    parser.add_argument("--num_train", type=int, default=800)
    parser.add_argument("--work", type=Path, default=None, help="folder of the data; default: a temporary folder")
    parser.add_argument("--table", action="store_true", help="print the table of the result file and exit")
    return parser.parse_args(words)


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    earlier = options.out or (newest("sample_efficiency") if options.table else None)
    result = {"runs": [], **read_earlier("sample_efficiency", earlier)}
    if not options.table:
        with tempfile.TemporaryDirectory() as temporary:
            measure(options, options.work or Path(temporary), result)
    print(table(result["runs"]))


def write_data(work: Path, options: argparse.Namespace) -> Path:
    """Writes the set's pairs if they do not exist yet; returns their folder."""
    data = work / options.which
    for split, num in (("train", options.num_train), ("test", HELD_OUT)):
        if not (data / split / "metadata.jsonl").exists():
            write_dataset(data, num=num, split=split, seed=0, size=SIZE, **SETS[options.which])
    return data


def measure(options: argparse.Namespace, work: Path, result: dict[str, Any]) -> None:
    """Makes the runs that are not in the result yet, seed by seed, and writes the file after each."""
    data = write_data(work, options)
    end = time.monotonic() + 60 * options.minutes
    bench = Bench(data, work / "run", options)
    for seed in options.seeds:
        for arm in options.arms:
            key = {"set": options.which, "arm": arm, "seed": seed, "iou": options.iou}
            if any(key.items() <= run.items() for run in result["runs"]) or time.monotonic() > end:
                continue
            print(f"  {key}", flush=True)
            changes = ARMS[arm]
            points = bench.run(arm_config(changes, data, work / "run", seed), changes.get(FIRST, (0, SIZE)))
            result["runs"].append(key | {"changes": changes, "points": points})
            result["recipe"] = to_dict(arm_config(ARMS["chosen"], data, work / "run", 0))
            options.out = write_result("sample_efficiency", result, options.out, threads=1)


if __name__ == "__main__":
    main()
