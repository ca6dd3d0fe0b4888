"""Measures what control guidance does to pictures of held-out conditions, for full and for weak adapters on `nano`.

    python benchmarks/control_guidance.py
    python benchmarks/control_guidance.py --grid all

It trains one adapter for each seed and each of two kinds of data: outlines of circles with the demo's recipe, and line
art of all shapes with recipes/nano-conditions.yaml. Weak adapters are the same ones at scale 0.3, and those of circles
after 60 of 400 updates. Each is measured on the same held-out pairs: the IoU of the objects, the F1 of their outlines
and the error of the colours that the prompt names.

A row is a share r of the adapter in the negative branch, r = (guidance - c) / (guidance - 1) for control guidance c, or
the form with three passes. All rows of a block have the same noise, and are compared with r = 1, the pipeline of
diffusers. An interval over pairs is that of the mean over the seeds of each pair; it holds for these adapters. An
interval over seeds is that of the mean over the pairs of each seed; it holds for other trainings, too.

Jobs (a kind of data with a seed) run in --processes processes of one thread. What is finished in --work is not run
again. The result file is written when all rows are measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from common import make_parser, write_result

from t2i_adapter.config.recipe import load
from t2i_adapter.config.tree import CheckpointOptions, Config, DataOptions, TrackingOptions
from t2i_adapter.generation.options import ModelOptions, SamplingOptions
from t2i_adapter.statistics import Interval, mean_interval
from t2i_adapter.verbs.demo import SIZE, demo_config
from t2i_adapter.verbs.make_data import ShapesOptions, make_shapes

RECIPE = Path(__file__).parents[1] / "recipes" / "nano-conditions.yaml"
METRICS = ("iou", "edge_f1", "object_color")
CIRCLES, LINE_ART = "circles", "line art"
FULL, WEAK, EARLY = "full", "scale 0.3", "early"
NUM_TRAIN = {CIRCLES: 2000, LINE_ART: 400}
UPDATES = {CIRCLES: 400, LINE_ART: 150}
EARLY_SHARE = 0.15
"""Share of the updates after which the early adapter is taken: 60 of 400."""


@dataclass(frozen=True)
class Row:
    """One setting that is measured.

    Attributes:
        data: kind of data.
        adapter: FULL, WEAK or EARLY.
        guidance: text guidance.
        control: control guidance.
        passes: control passes, 2 or 3.
    """

    data: str
    adapter: str
    guidance: float
    control: float = 1.0
    passes: Literal[2, 3] = 2

    @property
    def block(self) -> tuple[str, str, float]:
        """What the rows that are compared with each other have in common."""
        return self.data, self.adapter, self.guidance

    @property
    def label(self) -> str:
        if self.passes == 3:
            return f"separate, c {self.control:g}"
        return f"r {(self.guidance - self.control) / (self.guidance - 1):g}"

    @property
    def file(self) -> str:
        return f"{self.adapter}-g{self.guidance:g}-c{self.control:g}-p{self.passes}.json".replace(" ", "-")


def block(
    data: str, adapter: str, guidance: float, shares: Sequence[float], separate: Sequence[float] = ()
) -> list[Row]:
    """Rows of two passes with shares r of the adapter in the negative branch, and of three with control `separate`."""
    two = [Row(data, adapter, guidance, guidance - share * (guidance - 1)) for share in shares]
    return two + [Row(data, adapter, guidance, control, 3) for control in separate]


MAIN = [
    *block(CIRCLES, FULL, 3.0, (1, 0), (1.5,)),
    *block(CIRCLES, WEAK, 3.0, (1, 0.5, 0)),
    *block(LINE_ART, FULL, 3.0, (1, 0), (1.5,)),
    *block(LINE_ART, FULL, 5.0, (1, 0)),
]
ALL = [
    row
    for data in (CIRCLES, LINE_ART)
    for adapter in (FULL, WEAK, EARLY)
    for guidance in (3.0, 5.0)
    for row in block(data, adapter, guidance, (1, 0.75, 0.5, 0.25, 0), (1.5, guidance))
]


def run_job(data: str, seed: int, rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Trains the adapter of a kind of data and a seed, and measures its rows, if that is not done yet."""
    import torch

    torch.set_num_threads(1)
    out = job_folder(data, seed, options)
    (out / "rows").mkdir(parents=True, exist_ok=True)
    open_rows = [row for row in rows if not (out / "rows" / row.file).is_file()]
    if not (out / "seconds.json").is_file():
        seconds = train(data, seed, out / "adapter", options)
        (out / "seconds.json").write_text(json.dumps(seconds))
    if open_rows:
        measure_rows(out, open_rows, seed, options)


def job_folder(data: str, seed: int, options: argparse.Namespace) -> Path:
    """The job's folder, with what its numbers depend on in its name."""
    sizes = f"{options.pairs}-{options.sampling_steps}-{updates(data, options)}"
    return options.work / f"{data.replace(' ', '-')}-{sizes}" / f"seed-{seed}"


def updates(data: str, options: argparse.Namespace) -> int:
    return max(1, round(UPDATES[data] * options.training))


def num_train(data: str, options: argparse.Namespace) -> int:
    return max(32, round(NUM_TRAIN[data] * options.training))


def scenes(data: str, options: argparse.Namespace) -> Path:
    """Writes the scenes of a kind of data, if they are missing; returns their folder."""
    out = options.work / f"scenes-{data.replace(' ', '-')}-{num_train(data, options)}-{options.pairs}"
    kinds: dict[str, Any] = {"kinds": ("circle",), "max_shapes": 1} if data == CIRCLES else {"max_shapes": 2}
    make_shapes(
        ShapesOptions(
            out=out, num=num_train(data, options), num_test=options.pairs, size=SIZE, patterns=("plain",), **kinds
        )
    )
    return out


def train(data: str, seed: int, out: Path, options: argparse.Namespace) -> float:
    """Trains an adapter, with a checkpoint for the early one. Returns the CPU seconds since the last start."""
    from t2i_adapter.verbs import train as verb

    steps, folder = updates(data, options), str(scenes(data, options))
    config = demo_config(folder, str(out), steps=steps, seed=seed)
    if data == LINE_ART:
        recipe = load(str(RECIPE), Config())
        config = replace(
            recipe,
            output_dir=str(out),
            data=replace(recipe.data, location=folder, condition="lineart"),
            train=replace(recipe.train, max_steps=steps, seed=seed),
        )
    early = early_update(data, options)
    began = time.process_time()
    verb.run(
        replace(
            config,
            data=replace(config.data, prepared_dir=str(options.work / "cache")),
            checkpoint=CheckpointOptions(every=early, keep=1, keep_every=early, resume="auto"),
            tracking=TrackingOptions(log_every=50, report_to="none"),
        )
    )
    return round(time.process_time() - began, 1)


def early_update(data: str, options: argparse.Namespace) -> int:
    return max(1, round(updates(data, options) * EARLY_SHARE))


def measure_rows(out: Path, rows: Sequence[Row], seed: int, options: argparse.Namespace) -> None:
    """Writes for each row metric -> one value a pair, None where the pair does not define it."""
    from t2i_adapter.evaluation.metrics import measure
    from t2i_adapter.evaluation.pairs import condition_spec, open_pairs, read_pairs
    from t2i_adapter.generation.generate import encode_prompts, generate
    from t2i_adapter.generation.pipeline import open_models

    data, full = rows[0].data, str(out / "adapter")
    early = str(out / "adapter" / f"checkpoint-{early_update(data, options)}" / "t2iadapter")
    source = DataOptions(
        location=str(scenes(data, options)),
        split="test",
        max_train_samples=options.pairs,
        condition=condition_spec(None, full),
    )
    pairs = read_pairs(open_pairs(source, options.pairs, 0), SIZE, 3)
    conditions, seeds = [pair.condition for pair in pairs], [seed * len(pairs) + i for i in range(len(pairs))]
    for name in dict.fromkeys(row.adapter for row in rows):
        models = open_models(ModelOptions(adapter=early if name == EARLY else full, base="nano", device=options.device))
        pipeline = models.pipeline()
        texts = encode_prompts(pipeline, [pair.prompt for pair in pairs], guidance=2.0)
        for row in (row for row in rows if row.adapter == name):
            sampling = SamplingOptions(
                steps=options.sampling_steps,
                guidance=row.guidance,
                scale=0.3 if name == WEAK else 1.0,
                control_guidance=row.control,
                control_passes=3 if row.passes == 3 else 2,
            )
            pictures = generate(pipeline, texts, conditions, seeds, size=(SIZE, SIZE), sampling=sampling)
            values = [measure(np.asarray(p), pair.truth) for p, pair in zip(pictures, pairs, strict=True)]
            content = {metric: [value.get(metric) for value in values] for metric in METRICS}
            (out / "rows" / row.file).write_text(json.dumps(content))
            print(f"{data}, seed {seed}, {name}, guidance {row.guidance:g}, {row.label}", flush=True)


def summary(row: Row, rows: Sequence[Row], options: argparse.Namespace) -> dict[str, Any]:
    """The row's entry in the result file."""
    reference = next(other for other in rows if other.block == row.block and other.label == "r 1")
    metrics: dict[str, Any] = {}
    for metric in METRICS:
        values, plain = (
            np.array([read(each, seed, options)[metric] for seed in range(options.seeds)], float)
            for each in (row, reference)
        )
        metrics[metric] = {"mean": float(np.nanmean(values))}
        if row != reference:
            metrics[metric] |= intervals(values - plain)
    return {
        **{name: getattr(row, name) for name in ("data", "adapter", "guidance", "control", "passes")},
        "row": row.label,
        "metrics": metrics,
    }


def read(row: Row, seed: int, options: argparse.Namespace) -> dict[str, list[float | None]]:
    return json.loads((job_folder(row.data, seed, options) / "rows" / row.file).read_text())


def intervals(differences: np.ndarray) -> dict[str, Any]:
    """Intervals of the mean of differences, (S,N) of S seeds and N pairs; pairs with a NaN are skipped."""
    defined = differences[:, ~np.isnan(differences).any(axis=0)]
    return {
        "over_pairs": mean_interval(defined.mean(axis=0)).to_json(),
        "over_seeds": mean_interval(defined.mean(axis=1)).to_json() if len(defined) > 1 else None,
    }


def table(entries: Sequence[dict[str, Any]]) -> str:
    """The Markdown table of docs/generate.md: means, and differences from r = 1 with half widths of their intervals."""
    lines = [
        "| data, adapter, guidance | row | passes | IoU | edge F1 | object colour |",
        "|---|---|---|---|---|---|",
    ]
    earlier = ""
    for entry in entries:
        name = f"{entry['data']}, {entry['adapter']}, {entry['guidance']:g}"
        cells = [shown(entry["metrics"][metric], 2 if metric == "object_color" else 3) for metric in METRICS]
        lines.append(
            f"| {name if name != earlier else ''} | {entry['row']} | {entry['passes']} | {' | '.join(cells)} |"
        )
        earlier = name
    return "\n".join(lines)


def shown(metric: dict[str, Any], digits: int) -> str:
    mean = f"{metric['mean']:.{digits}f}"
    if "over_pairs" not in metric:
        return mean
    pairs = Interval.from_json(metric["over_pairs"])
    widths = f"± {pairs.high - pairs.mean:.{digits}f}"
    if metric["over_seeds"]:
        seeds = Interval.from_json(metric["over_seeds"])
        widths += f" / {seeds.high - seeds.mean:.{digits}f}"
    return f"{mean} ({pairs.mean:+.{digits}f} {widths})"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--grid", choices=("main", "all"), default="main", help="rows to measure")
    parser.add_argument("--pairs", type=int, default=128, help="held-out pairs")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind of data")
    parser.add_argument("--sampling_steps", type=int, default=12, help="denoising steps of a picture")
    parser.add_argument(
        "--training", type=float, default=1.0, help="share of the updates and scenes of each training, for trials"
    )
    parser.add_argument("--processes", type=int, default=2, help="jobs at a time, each on one CPU thread")
    parser.add_argument("--device", default="auto", help="device that generates, as of `t2i-adapter generate`")
    parser.add_argument("--work", type=Path, default=Path("runs/control_guidance"))
    options = parser.parse_args()
    rows = MAIN if options.grid == "main" else ALL
    for data in (CIRCLES, LINE_ART):
        scenes(data, options)
    jobs = [(data, seed) for seed in range(options.seeds) for data in (CIRCLES, LINE_ART)]
    began = time.monotonic()
    with ProcessPoolExecutor(options.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        own = [
            pool.submit(run_job, data, seed, [row for row in rows if row.data == data], options) for data, seed in jobs
        ]
        for job in own:
            job.result()
    entries = [summary(row, rows, options) for row in rows]
    settings = {name: getattr(options, name) for name in ("grid", "pairs", "seeds", "sampling_steps", "processes")}
    content = {"settings": settings, "seconds": round(time.monotonic() - began), "rows": entries}
    print(table(entries), flush=True)
    write_result("control_guidance", content, options.out)


if __name__ == "__main__":
    main()
