"""What a condition map takes: seconds a picture on one core, and pictures a second with several processes, each kind.

    python benchmarks/conditions.py
    python benchmarks/conditions.py --kinds canny lineart --workers 1 2 4

Pictures are scenes of shapes on patterned grounds. The first picture of each process, which may load weights, is not
counted. Kinds that cannot run here are told and left out; none takes longer than some half a minute. The numbers go to
benchmarks/conditions.json, from which `t2i-adapter conditions` shows them, and as a table to benchmarks/conditions.md.
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
from datetime import date
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import cv2
from PIL import Image

from t2i_adapter.annotators.registry import annotate, open_annotator
from t2i_adapter.data.shapes import render, sample_scene
from t2i_adapter.errors import UserError
from t2i_adapter.verbs.conditions import local_kinds

SEED = 5
LEAST_S, MOST_S = 1.0, 8.0
"""A quick kind is drawn for at least so long, over and over; a slow one for no longer than a picture after so long."""
LEAST_PICTURES = 3


def pictures(count: int, size: int) -> list[Image.Image]:
    return [render(sample_scene(SEED, number), size) for number in range(count)]


def seconds(name: str, photos: Sequence[Image.Image]) -> float:
    """Median time of a picture, in this process."""
    annotator = open_annotator(name)
    annotate(annotator, photos[0])  # loads what it needs
    times: list[float] = []
    for photo in cycle(photos):
        start = time.perf_counter()
        annotate(annotator, photo)
        times.append(time.perf_counter() - start)
        if sum(times) > MOST_S or (sum(times) > LEAST_S and len(times) >= LEAST_PICTURES):
            return median(times)
    raise AssertionError("a cycle has no end")


def pictures_a_second(name: str, workers: int, photos: Sequence[Image.Image], each: float) -> float:
    """With so many processes, each of which draws the pictures again and again; `each` is what one takes."""
    count = max(1, round(LEAST_S / each))
    with ProcessPoolExecutor(workers, get_context("spawn"), _start, (name, list(photos))) as pool:
        list(pool.map(_draw, [1] * workers * 2))  # all are up, and have loaded what they need
        start = time.perf_counter()
        drawn = sum(pool.map(_draw, [count] * workers))
        return drawn / (time.perf_counter() - start)


_here: Any = None


def _start(name: str, photos: list[Image.Image]) -> None:
    global _here
    cv2.setNumThreads(1)
    _here = open_annotator(name), photos


def _draw(count: int) -> int:
    annotator, photos = _here
    for photo in islice(cycle(photos), count):
        annotate(annotator, photo)
    return count


def write(kinds: dict[str, Any], lines: Sequence[str], options: argparse.Namespace) -> None:
    """Both files, with what is measured so far."""
    settings = {"size": options.size, "pictures": options.pictures, "seed": SEED, "cores": os.cpu_count()}
    settings |= {"date": date.today().isoformat(), "machine": platform.machine(), "opencv": cv2.__version__}
    options.out.write_text(json.dumps({"settings": settings, "kinds": kinds}, indent=1) + "\n", encoding="utf-8")
    told = f"# What a condition map takes\n\nPictures of {options.size} x {options.size}, {settings['date']}, "
    told += f"{settings['cores']} cores ({settings['machine']}), by `python benchmarks/conditions.py`.\n\n"
    options.out.with_suffix(".md").write_text(told + "\n".join(lines) + "\n", encoding="utf-8")


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
            print(f"left out: {name}: {fault}", flush=True)
            continue
        kinds[name] = {"seconds": float(f"{each:.3g}"), "pictures_a_second": rates}
        lines.append(f"| {name} | {each:.3g} | {' | '.join(f'{rate:g}' for rate in rates.values())} |")
        print(lines[-1], flush=True)
        write(kinds, lines, options)


if __name__ == "__main__":
    main()
