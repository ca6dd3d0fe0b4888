"""Measures how a run grows with the number of rows, and computes what 3 million and 300 million pairs take.

    python benchmarks/scale.py [--rows 100000,1000000,10000000] [--folder SCRATCH] [--rounds 3]   all that is measured
    python benchmarks/scale.py --paper [--card_tflops 989 --efficiency 0.4 --price 2.5]           prints the tables
    python benchmarks/scale.py --only live,order                                                  these parts
    python benchmarks/scale.py --write_page      puts the tables into docs/scale.md

Parts, each with files of its own below SCRATCH that are deleted after it:

    live    parquet shards, `--data.cache none`: a new process opens the data, leaves pairs out for the measurement of
            control, makes its data record, and builds the first batch, at row 0 and at nine tenths of the rows
    cached  the same rows with all records in the cache
    table   one .jsonl of paths, no cache
    tar     tar shards, at most a million rows, no cache
    order   statistics of the shuffle at a million rows
    missing bytes of the list of pairs that the first `prepare` has to encode
    flops   operations of SDXL's networks

Each row of `live`, `cached`, `table` and `tar` is measured in a process of its own, --rounds times, of which the file
has the medians. `*_s` are seconds of the CPU, which a busy machine changes less than those of a clock, except
`first_batch_wall_s`: both are over the sum of open, held_out, prepare, record and batch. Files are in the page cache.
`rss_mib` is what the process holds when the first batch is there, `imports_mib` what it held before it opened the data,
`peak_mib` its peak. `worker_mib` is the memory that one loader process has alone (Private of smaps_rollup).
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import scale_order
import scale_paper
from common import make_parser, read_earlier, write_result

MIB = 2**20
BATCH = 4
ROWS = (100_000, 1_000_000, 10_000_000)
MOST_TAR_ROWS = 1_000_000  # a row takes 2 KiB
PARTS = ("live", "cached", "table", "tar", "order", "missing", "flops")
LATER = 0.9


def memory() -> dict[str, int]:
    """Bytes that this process holds, and its peak."""
    # Not getrusage: a child process inherits its parent's peak there.
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return {"rss": found["VmRSS"], "peak": found["VmHWM"]}


def private_of(process: int) -> int:
    """Bytes that a process shares with no other."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024


def options_of(part: str, place: Path) -> Any:
    from t2i_adapter.config.tree import DataOptions

    location = f"{place}/*.parquet" if part in ("live", "cached") else str(place)
    return DataOptions(
        location=location,
        condition="canny",
        resolution=32,
        cache="disk" if part == "cached" else "none",
        text_cache="live",
        num_workers=0,
    )


def start(part: str, place: Path, root: Path) -> list[dict[str, Any]]:
    """What a run does before its first step, from the data to the first batch: at row 0, and at nine tenths."""
    import torch

    from t2i_adapter.batches.loader import make_partial_batches
    from t2i_adapter.cache.context import PrepareContext
    from t2i_adapter.cache.prepare import prepare
    from t2i_adapter.config.tree import BaseOptions, Config, TrainOptions
    from t2i_adapter.data.source import open_source
    from t2i_adapter.models.open import open_base
    from t2i_adapter.training.data_record import DataRecord
    from t2i_adapter.training.held_out import choose_held_out

    torch.set_num_threads(1)
    data = replace(options_of(part, place), prepared_dir=str(root))
    config = Config(data=data, train=TrainOptions(batch_size=BATCH, seed=0))
    context = PrepareContext(open_base(BaseOptions()), "cpu", torch.float32, root, progress=False, quiet=True)
    seconds: dict[str, float] = {}
    imports = memory()["rss"]

    def timed(name: str, step: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = step()
        seconds[name] = time.process_time() - began
        return result

    began = time.perf_counter()

    source = timed("open", lambda: open_source(data, 0))
    held_out = timed("held_out", lambda: choose_held_out(config, source))
    dataset = timed("prepare", lambda: prepare(held_out.training, data, context, in_channels=3))
    timed("record", lambda: DataRecord.of(dataset))

    def batches(at: float, workers: int = 0) -> Iterator[Any]:
        few = replace(config, data=replace(data, num_workers=workers))
        first = int(len(dataset) * at) // BATCH
        return make_partial_batches(
            dataset, few, rank=0, world=1, start_step=first, stop_step=first + 1000, num_timesteps=1000
        )

    wall = time.perf_counter() - began
    timed("later", lambda: next(batches(LATER)))  # first, so that what the first batch loads is not missing in it
    began = time.perf_counter()
    timed("batch", lambda: next(batches(0.0)))
    wall, held = wall + time.perf_counter() - began, memory()
    with_worker = batches(0.0, workers=1)
    for _ in range(8):
        next(with_worker)
    [worker] = [int(child) for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()][-1:]
    mib = {"imports": imports, **held, "worker": private_of(worker)}
    later = seconds.pop("later")
    both = seconds, {**seconds, "batch": later}
    return [
        {
            "rows": len(dataset),
            **{f"{name}_s": round(value, 3) for name, value in one.items()},
            "first_batch_s": round(sum(one.values()), 2),
            "first_batch_wall_s": round(wall, 2),
            **{f"{name}_mib": round(value / MIB, 1) for name, value in mib.items()},
        }
        for one in both
    ]


def write(part: str, folder: Path, rows: int) -> tuple[Path, Path]:
    """Writes a part's data, and its cache; returns both places."""
    import scale_data

    place, root = folder / "rows", folder / "cache"
    if part in ("live", "cached"):
        scale_data.write_parquet(place, rows)
    elif part == "table":
        place = scale_data.write_jsonl(place, rows)
    else:
        scale_data.write_tar(place, rows)
    if part == "cached":
        _write_cache(place, root)
    return place, root


def _write_cache(place: Path, root: Path) -> None:
    import scale_data

    from t2i_adapter.cache.context import STAMPS
    from t2i_adapter.config.tree import BaseOptions
    from t2i_adapter.data.pair import PairTransform
    from t2i_adapter.data.source import open_source
    from t2i_adapter.models.open import open_base

    data = options_of("cached", place)
    source = open_source(data, 0)
    made_by = PairTransform.of(data, 3, source.annotate).fingerprint(open_base(BaseOptions()).vae_fingerprint)
    scale_data.write_cache(source, root / "images" / made_by, root / STAMPS)


def measure(part: str, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """A part at a number of rows, --rounds times."""
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        began = time.perf_counter()
        place, root = _in_process(write, part, Path(temporary), rows)
        print(f"{part} {rows:,}: written in {time.perf_counter() - began:.0f} s", flush=True)
        found: dict[str, Any] = {"bytes": sum(path.stat().st_size for path in Path(temporary).rglob("*"))}
        if part == "tar":
            found["index_s"] = _in_process(start, part, place, root)[0]["open_s"]  # later it is read from the disk
        runs = [_in_process(start, part, place, root) for _ in range(options.rounds)]
        for at, some in zip((0.0, LATER), zip(*runs, strict=True), strict=True):
            found[f"row {round(rows * at)}"] = medians(list(some))
        print(part, rows, json.dumps(found), flush=True)
    return found


def _in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a fork of this process, which has imported everything and done nothing: so its memory is its
    own, and the imports are not repeated."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *arguments).result()


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return {**middle, "first_batch_s_of_each": [run["first_batch_s"] for run in runs]}  # the spread


def missing(count: int = 100_000) -> dict[str, float]:
    """Bytes a pair of the list of the missing records, if all are missing."""
    import tracemalloc

    import numpy as np

    from t2i_adapter.cache.images import find_missing

    digests = np.random.default_rng(0).integers(0, 256, (count, 32), np.uint8)
    tracemalloc.start()
    found = find_missing(np.full((1, count), -1, np.int32), np.arange(count, dtype=np.int32), digests)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == count
    return {"pairs": count, "bytes_a_pair": round(held / count), "peak_bytes_a_pair": round(peak / count)}


def growth(part: dict[str, Any]) -> dict[str, float]:
    """Bytes a row, and microseconds a row, between the smallest and the largest number of rows."""
    few, many = (part[key] for key in sorted(part, key=int)[:: len(part) - 1])
    low, high = (next(value for key, value in one.items() if key == "row 0") for one in (few, many))
    more = high["rows"] - low["rows"]
    return {
        **{f"{name}_bytes_a_row": round((high[f"{name}_mib"] - low[f"{name}_mib"]) * MIB / more, 1)
           for name in ("rss", "peak", "worker")},
        "start_us_a_row": round((high["first_batch_s"] - low["first_batch_s"]) / more * 1e6, 2),
    }  # fmt: skip


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--folder", type=Path, help="where the data is written; default: the temporary folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--paper", action="store_true", help="print the tables that are computed, measure nothing")
    parser.add_argument("--write_page", action="store_true", help="put all tables into docs/scale.md")
    scale_paper.add_options(parser)
    options = parser.parse_args()
    if options.paper or options.write_page:
        text = scale_paper.tables(scale_paper.Assumptions.of(options))
        print(text) if options.paper else scale_paper.update_page(scale_paper.PAGE, text)
        return
    for module in ("t2i_adapter.training.setup", "t2i_adapter.batches.loader", "scale_data"):
        importlib.import_module(module)  # so that no measurement includes it
    result = read_earlier("scale", options.out)
    others = {"order": scale_order.measure, "missing": missing, "flops": scale_paper.count_flops}
    counts = [int(rows) for rows in options.rows.split(",")]
    for part in options.only.split(","):
        if part not in PARTS:
            parser.error(f"{part}: --only takes {', '.join(PARTS)}")
        if part in others:
            result[part] = others[part]()
        else:
            sizes = [rows for rows in counts if part != "tar" or rows <= MOST_TAR_ROWS]
            result[part] = {str(rows): measure(part, rows, options) for rows in sizes}
            if len(sizes) > 1:
                result[part] |= {"growth": growth(result[part])}
        write_result("scale", result, options.out, threads=1)


if __name__ == "__main__":
    main()
