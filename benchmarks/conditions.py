"""What a condition map takes: seconds a picture on one core, and pictures a second with several processes, each kind.

    python benchmarks/conditions.py
    python benchmarks/conditions.py --kinds canny lineart --workers 1 2 4

Pictures are scenes of shapes on patterned grounds. The first picture of each process, which may load weights, is not
counted. Kinds that cannot run here are told and left out. The result goes to benchmarks/conditions.json, from which
`t2i-adapter conditions` shows it, and the table to the screen.
"""

from __future__ import annotations

import os

# read by the libraries as they load, here and in every process that is started
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

import argparse
import json
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import cv2
from PIL import Image

from t2i_adapter.annotation.listing import local_kinds
from t2i_adapter.conditions.table import annotate, open_annotator
from t2i_adapter.errors import UserError
from t2i_adapter.sources.shapes import render, sample_scene

SEED = 5
LEAST_S = 1.0
"""Seconds that one process is measured for at least: a quick kind is drawn many times over."""
ROUNDS = 5


def pictures(count: int, size: int) -> list[Image.Image]:
    return [render(sample_scene(SEED, number), size) for number in range(count)]


def seconds(name: str, photos: Sequence[Image.Image]) -> float:
    """Median over rounds of the mean time of a picture, in this process."""
    annotator = open_annotator(name)
    start = time.perf_counter()
    annotate(annotator, photos[0])  # loads what it needs
    annotate(annotator, photos[0])
    once = time.perf_counter() - start
    repeats = max(1, round(LEAST_S / ROUNDS / max(once, 1e-4) / len(photos)))
    found = []
    for _ in range(1 if once > LEAST_S else ROUNDS):
        start = time.perf_counter()
        for _ in range(repeats):
            for photo in photos:
                annotate(annotator, photo)
        found.append((time.perf_counter() - start) / (repeats * len(photos)))
    return median(found)


def pictures_a_second(name: str, workers: int, photos: Sequence[Image.Image], each: float) -> float:
    """With so many processes, each of which draws the pictures again and again; `each` is what one takes."""
    repeats = max(1, round(LEAST_S / each / len(photos)))
    with ProcessPoolExecutor(workers, get_context("spawn"), _start, (name, list(photos))) as pool:
        list(pool.map(_draw, [1] * workers * 4))  # all are up, and have loaded what they need
        start = time.perf_counter()
        drawn = sum(pool.map(_draw, [repeats] * workers))
        return drawn / (time.perf_counter() - start)


_here: Any = None


def _start(name: str, photos: list[Image.Image]) -> None:
    global _here
    cv2.setNumThreads(1)
    _here = open_annotator(name), photos


def _draw(repeats: int) -> int:
    annotator, photos = _here
    for _ in range(repeats):
        for photo in photos:
            annotate(annotator, photo)
    return repeats * len(photos)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=local_kinds(), help="default: all that fetch nothing")
    parser.add_argument("--size", type=int, default=1024, help="side of the pictures in pixels")
    parser.add_argument("--pictures", type=int, default=4, help="how many different ones")
    parser.add_argument("--workers", type=int, nargs="*", default=[os.cpu_count() or 1], help="numbers of processes")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/conditions.json"))
    options = parser.parse_args()

    cv2.setNumThreads(1)
    photos = pictures(options.pictures, options.size)
    kinds: dict[str, Any] = {}
    print(f"| kind | s a picture, one core | {' | '.join(f'pictures/s, {n} processes' for n in options.workers)} |")
    print("|---|---|" + "---|" * len(options.workers), flush=True)
    for name in options.kinds:
        try:
            each = seconds(name, photos)
            rates = {str(n): round(pictures_a_second(name, n, photos, each), 2) for n in options.workers}
        except UserError as fault:
            print(f"left out: {name}: {fault}", flush=True)
            continue
        kinds[name] = {"seconds": float(f"{each:.3g}"), "pictures_a_second": rates}
        print(f"| {name} | {each:.3g} | {' | '.join(f'{rate:g}' for rate in rates.values())} |", flush=True)
    settings = {"size": options.size, "pictures": options.pictures, "seed": SEED, "cores": os.cpu_count()}
    content = {"settings": {**settings, "machine": platform.machine(), "opencv": cv2.__version__}, "kinds": kinds}
    options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
