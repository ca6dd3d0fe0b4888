"""Measures the loading of training data: samples a second on one core, and what a million rows cost.

It compares with the data path of the diffusers script, imported from its unmodified file: `datasets`, its transforms,
its cached caption states and its collate function. Both sides read the same files, in this process, in turn, several
rounds each. The script's file is not part of this repository.

    python benchmarks/data.py --script PATH/train_t2i_adapter_sdxl.py [--rounds 5]

Measured:
  cached     SDXL's sizes. Ours has moments, conditions and caption states in the cache; the script has caption states,
             and decodes and transforms the pictures for each sample
  uncached   decode, resize, crop to 1024 px and Canny edges, without a cache
  million    a million rows in parquet shards: seconds to the first batch in a new process, from the first line of our
             code, at row 0 and at row 900,000, and the peak memory of the process
  flat       microseconds a sample for 1,000 to 1,000,000 rows, plotted in an .svg beside the result file
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import torchvision_stand_in
from common import make_parser, write_result
from PIL import Image

from t2i_adapter.batches.loader import make_partial_batches
from t2i_adapter.batches.order import Order
from t2i_adapter.cache.context import PrepareContext
from t2i_adapter.cache.dataset import CachedDataset, LiveDataset
from t2i_adapter.cache.prepare import prepare
from t2i_adapter.cache.records import pack_image, pack_text, view_keys
from t2i_adapter.cache.shards import Shards, ShardWriter
from t2i_adapter.cache.texts import Texts
from t2i_adapter.config.tree import BaseOptions, Config, DataOptions, TrainOptions
from t2i_adapter.data import shapes
from t2i_adapter.data.geometry import Framing
from t2i_adapter.data.pair import PairTransform
from t2i_adapter.data.source import open_source
from t2i_adapter.models.open import open_base

SIDE, PAIRS, BATCH = 1024, 48, 4
STATES, POOLED = (77, 2048), (1280,)  # of SDXL's text encoders
ROWS, SHARDS = 1_000_000, 10
RESUME_AT = 900_000
COUNTS = (1_000, 10_000, 100_000, 1_000_000)
TIMED = 400  # samples a point of the curve


def write_pairs(folder: Path) -> Path:
    """Writes PAIRS pairs of 1280 x 1152 px: JPEG scenes with grain, as many bytes as photographs, and PNG outlines."""
    split, rng, rows = folder / "train", np.random.default_rng(0), []
    split.mkdir(parents=True)
    for i in range(PAIRS):
        scene = shapes.sample_scene(0, i)
        picture = np.asarray(shapes.render(scene, SIDE).resize((1280, 1152)), np.float32)
        grain = cv2.GaussianBlur(rng.normal(0, 30, picture.shape).astype(np.float32), (0, 0), 1.5)
        Image.fromarray((picture + grain).clip(0, 255).astype(np.uint8)).save(split / f"{i:03d}.jpg", quality=92)
        shapes.condition(scene, SIDE, "outline").resize((1280, 1152)).save(split / f"{i:03d}_cond.png")
        row = {"file_name": f"{i:03d}.jpg", "conditioning_image_file_name": f"{i:03d}_cond.png", "text": scene.caption}
        rows.append(json.dumps(row))
    (split / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def cached_dataset(data: DataOptions, root: Path) -> CachedDataset:
    """A cache with records of SDXL's sizes: true conditions, random moments and text states, which cost the same."""
    source, rng, framing = open_source(data, 0), np.random.default_rng(1), Framing.of(data)
    images, texts, keys = root / "images", Texts(Shards(root / "texts"), "benchmark"), []
    with ShardWriter(images) as image_writer, ShardWriter(root / "texts") as text_writer:
        for i in range(len(source)):
            sample = source[i]
            condition = np.asarray(sample.condition.resize((SIDE, SIDE)), np.uint8).transpose(2, 0, 1)
            geometry = framing.plan((sample.image.height, sample.image.width), sample.digest, 0)
            moments = rng.normal(size=(8, SIDE // 8, SIDE // 8)).astype(np.float32)
            key = view_keys(np.frombuffer(bytes.fromhex(sample.digest), np.uint8)[None], 0)
            keys.append(key)
            image_writer.add(key.tobytes(), pack_image(moments, condition, geometry, name=sample.key))
            states, pooled = rng.normal(size=STATES), rng.normal(size=POOLED)
            text_writer.add(texts.keys(sample.captions).tobytes(), pack_text(states, pooled, tokens=9, name="caption"))
    texts.shards.refresh()
    found = Shards(images)
    rows = found.find(np.concatenate(keys)).astype(np.int32)[None]
    numbers = np.arange(len(source), dtype=np.int32)
    return CachedDataset(
        source, PairTransform.of(data, 3, None), numbers, (numbers,), (len(source),), texts, rows, found
    )


def live_dataset(data: DataOptions, root: Path, *, channels: int = 3) -> LiveDataset:
    base = open_base(BaseOptions())
    dataset = prepare(
        open_source(data, 0),
        replace(data, cache="none"),
        PrepareContext(base, "cpu", torch.float32, root, progress=False),
        in_channels=channels,
    )
    assert isinstance(dataset, LiveDataset)
    return dataset


def partial_batches(
    dataset: Any, data: DataOptions, *, start: int = 0, steps: int = 10**6, batch: int = BATCH
) -> Iterator[Any]:
    config = Config(data=replace(data, num_workers=0), train=TrainOptions(batch_size=batch, seed=0))
    return make_partial_batches(
        dataset, config, rank=0, world=1, start_step=start, stop_step=start + steps, num_timesteps=1000
    )


def script_module(path: Path) -> ModuleType:
    """The diffusers script as a module. A stand-in replaces torchvision's transforms if it is not installed."""
    if importlib.util.find_spec("torchvision") is None:
        torchvision_stand_in.install()
    found = importlib.util.spec_from_file_location("diffusers_script", path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def script_batches(script: ModuleType, folder: Path, *, canny: bool) -> Iterator[Any]:
    """The script's loader over the same folder. `map` caches its caption states, random ones of SDXL's size."""
    import datasets
    from accelerate import Accelerator

    columns = {"image_column": "image", "conditioning_image_column": "conditioning_image", "caption_column": "text"}
    script.args = argparse.Namespace(resolution=SIDE, **columns)  # the script's functions read this global
    rng = np.random.default_rng(1)

    def embed(batch: dict[str, list[Any]]) -> dict[str, Any]:
        count = len(batch["text"])
        return {
            "prompt_embeds": torch.from_numpy(rng.normal(size=(count, *STATES)).astype(np.float32)),
            "text_embeds": torch.from_numpy(rng.normal(size=(count, *POOLED)).astype(np.float32)),
            "time_ids": torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * count),
        }

    data = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    data = data.map(embed, batched=True, batch_size=16)
    if canny:
        data = data.cast_column("conditioning_image", datasets.Image(decode=False))
    data = script.prepare_train_dataset(data, Accelerator(cpu=True))
    if canny:
        transform = data.format["format_kwargs"]["transform"]

        def annotated(examples: dict[str, Any]) -> dict[str, Any]:
            edges = [Image.fromarray(cv2.Canny(np.asarray(i.convert("RGB")), 100, 200)) for i in examples["image"]]
            return transform({**examples, "conditioning_image": edges})

        data = data.with_transform(annotated)
    while True:
        yield from torch.utils.data.DataLoader(data, shuffle=True, collate_fn=script.collate_fn, batch_size=BATCH)


def rate(batches: Iterator[Any], seconds: float) -> float:
    """Samples a second over at least `seconds`, after two batches of warm-up."""
    for _ in islice(batches, 2):
        pass
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        next(batches)
        count += BATCH
    return count / (time.perf_counter() - began)


def side_by_side(
    ours: Callable[[], Iterator[Any]], theirs: Callable[[], Iterator[Any]], options: Any
) -> dict[str, Any]:
    found: dict[str, list[float]] = {"ours": [], "script": []}
    sides = {"ours": ours(), "script": theirs()}
    for _ in range(options.rounds):
        for name, batches in sides.items():
            found[name].append(round(rate(batches, options.seconds), 1))
    medians = {name: statistics.median(values) for name, values in found.items()}
    ratios = sorted(a / b for a, b in zip(found["ours"], found["script"], strict=True))
    return {
        "samples_per_s": found,
        "median": medians,
        "ratio": round(medians["ours"] / medians["script"], 2),
        "ratio_range": [round(ratios[0], 2), round(ratios[-1], 2)],
    }


def write_rows(folder: Path, count: int) -> Path:
    """Writes `count` rows in parquet shards. A thousand pictures of 64 px repeat; every row has its own caption."""
    folder.mkdir(parents=True)
    pictures, conditions = [], []
    for i in range(min(count, 1000)):
        scene = shapes.sample_scene(0, i)
        pair = shapes.render(scene, 64), shapes.condition(scene, 64, "outline")
        for files, picture in zip((pictures, conditions), pair, strict=True):
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            files.append(buffer.getvalue())
    shards = min(SHARDS, max(1, count // 1000))
    for shard in range(shards):
        rows = range(shard * count // shards, (shard + 1) * count // shards)
        table = pyarrow.table(
            {
                "image": [pictures[i % len(pictures)] for i in rows],
                "conditioning_image": [conditions[i % len(conditions)] for i in rows],
                "text": [f"picture number {i}" for i in rows],
            }
        )
        pyarrow.parquet.write_table(table, folder / f"train-{shard:05d}.parquet", row_group_size=2000)
    return folder


def rows_options(folder: Path) -> DataOptions:
    return DataOptions(location=f"{folder}/*.parquet", resolution=64, cache="none", num_workers=0)


def first_batch(folder: Path, start: int) -> None:
    """Prints the seconds to the first batch at row `start` and the peak memory. Runs in its own process."""
    began = time.perf_counter()
    data = rows_options(folder)
    with tempfile.TemporaryDirectory() as root:
        next(partial_batches(live_dataset(data, Path(root)), data, start=start // BATCH))
    # Not getrusage: a child process inherits its parent's peak there.
    status = Path("/proc/self/status").read_text().splitlines()
    kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    print(json.dumps({"seconds": round(time.perf_counter() - began, 2), "peak_mib": round(kib / 1024)}))


def measure_first_batch(folder: Path, start: int, rounds: int) -> dict[str, Any]:
    line = [sys.executable, __file__, "--first_batch", str(folder), "--start", str(start)]
    runs = []
    for _ in range(rounds):
        began = time.perf_counter()
        done = subprocess.run(line, check=True, capture_output=True, text=True, timeout=300)
        runs.append(json.loads(done.stdout.splitlines()[-1]) | {"process_s": round(time.perf_counter() - began, 2)})
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]} | {"runs": runs}


def million(folder: Path, rows: int) -> dict[str, Any]:
    later = RESUME_AT * rows // ROWS
    return {"row 0": measure_first_batch(folder, 0, 3), f"row {later}": measure_first_batch(folder, later, 3)}


def cost_of_a_sample(folder: Path) -> float:
    """Microseconds a sample, at rows far apart in the order."""
    data = rows_options(folder)
    with tempfile.TemporaryDirectory() as root:
        dataset = live_dataset(data, Path(root))
        batches = partial_batches(dataset, data)
        for _ in islice(batches, 20):
            pass
        began = time.perf_counter()
        for _ in islice(batches, TIMED // BATCH):
            pass
        taken = time.perf_counter() - began
        assert isinstance(Order(dataset.groups, dataset.shards, 0, BATCH).number(0), int)
    return round(taken / TIMED * 1e6, 1)


def plot(costs: dict[str, float]) -> str:
    """An SVG of microseconds a sample against rows, both on logarithmic axes."""
    xs, ys = [np.log10(float(count)) for count in costs], [np.log10(cost) for cost in costs.values()]
    low, high = int(np.floor(min(ys))), int(np.ceil(max(ys)))

    def place(x: float, y: float) -> tuple[float, float]:
        return 60 + 380 * (x - xs[0]) / (xs[-1] - xs[0]), 220 - 190 * (y - low) / max(1, high - low)

    points = [place(x, y) for x, y in zip(xs, ys, strict=True)]
    marks = "".join(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="3"/>' for x, y in points)
    labels = [(x, y - 8, f"{cost:.0f}") for (x, y), cost in zip(points, costs.values(), strict=True)]
    labels += [(x, 238, f"{int(count):,}") for (x, _), count in zip(points, costs, strict=True)]
    labels += [(30, place(xs[0], y)[1] + 4, f"{10**y:,}") for y in range(low, high + 1)]
    labels += [(250, 255, "rows"), (110, 14, "microseconds a sample")]
    words = "".join(f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="middle">{word}</text>' for x, y, word in labels)
    line = " ".join(f"{x:.0f},{y:.0f}" for x, y in points)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 500 260" font-family="sans-serif" font-size="11">'
        '<rect width="500" height="260" fill="white"/><path d="M60 20V220H460" fill="none" stroke="#888"/>'
        f'<polyline points="{line}" fill="none" stroke="#06c" stroke-width="2"/>{marks}{words}</svg>\n'
    )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--script", type=Path, help="train_t2i_adapter_sdxl.py of diffusers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="time that a rate is measured for")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of the large dataset")
    parser.add_argument(
        "--only_million", action="store_true", help="measure `million` alone; result file data_million_*.json"
    )
    parser.add_argument("--first_batch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    if options.first_batch:
        first_batch(options.first_batch, options.start)
        return
    if options.only_million:
        with tempfile.TemporaryDirectory() as temporary:
            found = million(write_rows(Path(temporary) / "large", options.rows), options.rows)
        write_result("data_million", {"settings": {"rows": options.rows}, "million": found}, options.out, threads=1)
        return
    if options.script is None:
        parser.error("--script is missing: name the file of the diffusers script")
    measure(options)


def measure(options: argparse.Namespace) -> None:
    script = script_module(options.script)
    with tempfile.TemporaryDirectory() as temporary:
        folder, root = write_pairs(Path(temporary) / "pairs"), Path(temporary)
        data = DataOptions(location=str(folder), resolution=SIDE, num_workers=0)
        edges = replace(data, condition="canny", cache="none")
        dataset, live = cached_dataset(data, root / "cached"), live_dataset(edges, root / "live")
        result: dict[str, Any] = {
            "settings": {"side": SIDE, "pairs": PAIRS, "batch": BATCH, "rounds": options.rounds, "rows": options.rows},
            "cached": side_by_side(
                lambda: partial_batches(dataset, data), lambda: script_batches(script, folder, canny=False), options
            ),
            "uncached": side_by_side(
                lambda: partial_batches(live, edges), lambda: script_batches(script, folder, canny=True), options
            ),
        }
        print(json.dumps({name: result[name]["median"] for name in ("cached", "uncached")}), flush=True)
        large = write_rows(root / "large", options.rows)
        result["million"] = million(large, options.rows)
        counts = [count for count in COUNTS if count < options.rows]
        folders = {count: write_rows(root / f"rows-{count}", count) for count in counts} | {options.rows: large}
        result["flat"] = {str(count): cost_of_a_sample(where) for count, where in folders.items()}
    out = write_result("data", result, options.out, threads=1)
    out.with_suffix(".svg").write_text(plot(result["flat"]), encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
