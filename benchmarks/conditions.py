"""Measures how long a condition map takes: seconds a picture on one core, pictures a second with several processes.

    python benchmarks/conditions.py
    python benchmarks/conditions.py --kinds canny lineart --workers 1 2 4

The pictures are drawn scenes of shapes on patterned grounds. The first picture of each process is not counted, because
it may load weights. Kinds that cannot run here are printed and skipped. No kind takes longer than about half a minute.
The result file `conditions_*.json` has a Markdown table with the same numbers beside it, `conditions_*.md`.
"""

from __future__ import annotations

import os

# Libraries read these when they are imported, here and in every process that is started.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle, islice
from multiprocessing import get_context
from statistics import median
from typing import Any

import cv2
from common import hardware, make_parser, today, write_result
from PIL import Image

from t2i_adapter.annotators.registry import annotate, open_annotator
from t2i_adapter.data.shapes import render, sample_scene
from t2i_adapter.errors import UserError
from t2i_adapter.verbs.conditions import local_kinds

SEED = 5
LEAST_S, MOST_S = 1.0, 8.0
"""A kind is measured for at least LEAST_S seconds, and no picture is begun after MOST_S seconds."""
LEAST_PICTURES = 3


def pictures(count: int, size: int) -> list[Image.Image]:
    return [render(sample_scene(SEED, number), size) for number in range(count)]


def seconds(name: str, photos: Sequence[Image.Image]) -> float:
    """Median seconds a picture, in this process."""
    annotator = open_annotator(name)
    annotate(annotator, photos[0])  # loads the weights
    times: list[float] = []
    for photo in cycle(photos):
        start = time.perf_counter()
        annotate(annotator, photo)
        times.append(time.perf_counter() - start)
        if sum(times) > MOST_S or (sum(times) > LEAST_S and len(times) >= LEAST_PICTURES):
            return median(times)
    raise AssertionError("a cycle never ends")


def pictures_a_second(name: str, workers: int, photos: Sequence[Image.Image], each: float) -> float:
    """Pictures a second of `workers` processes; `each` is the seconds that one picture takes."""
    count = max(1, round(LEAST_S / each))
    with ProcessPoolExecutor(workers, get_context("spawn"), _start, (name, list(photos))) as pool:
        list(pool.map(_annotate, [1] * workers * 2))  # every process has started and loaded its weights
        start = time.perf_counter()
        num_maps = sum(pool.map(_annotate, [count] * workers))
        return num_maps / (time.perf_counter() - start)


_annotator: Any = None
_photos: list[Image.Image] = []


def _start(name: str, photos: list[Image.Image]) -> None:
    global _annotator, _photos
    cv2.setNumThreads(1)
    _annotator, _photos = open_annotator(name), photos


def _annotate(count: int) -> int:
    for photo in islice(cycle(_photos), count):
        annotate(_annotator, photo)
    return count


def write(kinds: dict[str, Any], lines: Sequence[str], options: argparse.Namespace) -> None:
    """Writes both files, with the kinds measured so far."""
    settings = {"size": options.size, "pictures": options.pictures, "seed": SEED}
    out = write_result("conditions", {"settings": settings, "kinds": kinds}, options.out)
    head = f"# How long a condition map takes\n\nPictures of {options.size} x {options.size} px, measured on "
    head += f"{today()} on hardware `{hardware()}` by `python benchmarks/conditions.py`.\n\n"
    out.with_suffix(".md").write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--kinds", nargs="+", default=local_kinds(), help="default: all kinds that download nothing")
    parser.add_argument("--size", type=int, default=1024, help="side of the pictures in pixels")
    parser.add_argument("--pictures", type=int, default=4, help="number of different pictures")
    parser.add_argument("--workers", type=int, nargs="*", default=[os.cpu_count() or 1], help="numbers of processes")
    options = parser.parse_args()

    cv2.setNumThreads(1)
    photos = pictures(options.pictures, options.size)
    kinds: dict[str, Any] = {}
    lines = [
        f"| kind | s a picture, one core | {' | '.join(f'pictures/s, {n} processes' for n in options.workers)} |",
        "|---|---|" + "---|" * len(options.workers),
    ]
    print("\n".join(lines), flush=True)
    for name in options.kinds:
        try:
            each = seconds(name, photos)
            rates = {str(n): round(pictures_a_second(name, n, photos, each), 2) for n in options.workers}
        except UserError as fault:
            print(f"skipped {name}: {fault}", flush=True)
            continue
        kinds[name] = {"seconds": float(f"{each:.3g}"), "pictures_a_second": rates}
        lines.append(f"| {name} | {each:.3g} | {' | '.join(f'{rate:g}' for rate in rates.values())} |")
        print(lines[-1], flush=True)
        write(kinds, lines, options)


if __name__ == "__main__":
    main()
