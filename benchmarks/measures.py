"""Measures the metrics of `evaluate`: true pictures against themselves, moved, blurred, recompressed, noisy, mirrored,
and against another picture. A metric is good if its value gets worse with the damage and is worst for another picture.

    python benchmarks/measures.py

Three sets of pictures, all at 128 px: drawn scenes of shapes; crops of one photo; emoji. Conditions are made by the
kinds that need no weights. Brightness stands in for a depth map, whose networks are not part of the package. It takes
under 3 minutes on one core and prints the tables of docs/evaluate.md; `--table` prints them from the newest result.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
from common import ROOT, make_parser, newest, write_result
from PIL import Image, ImageOps

from t2i_adapter.annotators.registry import annotate, open_annotator
from t2i_adapter.data.shapes import render, sample_scene, visible_masks
from t2i_adapter.evaluation.headline import METRICS
from t2i_adapter.evaluation.kinds import compare, depth_agreement, family, ms_ssim
from t2i_adapter.evaluation.metrics import Truth, measure, picture_excess
from t2i_adapter.statistics import mean_interval

SIDE, SEED = 128, 15
KINDS = ("canny", "sketch", "lineart", "palette", "mask", "normal", "tile")
ROWS = (
    *("iou", "edge_f1", "clipped", "saturation"),
    *(f"canny: {metric}" for metric in ("condition_f1", "f1_exact", "f1_1px", "f1_4px")),
    *("sketch: condition_f1", "lineart: condition_error", "lineart: ms_ssim"),
    *("palette: condition_error", "palette: condition_color", "tile: condition_error"),
    *("mask: condition_f1", "mask: condition_iou", "normal: normal_angle"),
    *(f"brightness: {metric}" for metric in ("depth_error", "depth_spearman", "depth_rmse_255")),
)
"""Rows of the tables. The result file has more: at 128 px, for example, f1_2px is condition_f1."""

Damage = Callable[[Image.Image, np.random.Generator], Image.Image]


def shift(pixels: int) -> Damage:
    """Moves a picture to the right; the left edge repeats its first column."""

    def apply(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        values = np.asarray(image)
        return Image.fromarray(np.pad(values, ((0, 0), (pixels, 0), (0, 0)), mode="edge")[:, : values.shape[1]])

    return apply


def blur(sigma: float) -> Damage:
    return lambda image, rng: Image.fromarray(cv2.GaussianBlur(np.asarray(image), (0, 0), sigma))


def jpeg(quality: int) -> Damage:
    def apply(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        file = BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file).convert("RGB")

    return apply


def noise(sigma: float) -> Damage:
    def apply(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        values = np.asarray(image) + rng.normal(0, sigma, (image.height, image.width, 3))
        return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))

    return apply


FAMILIES: dict[str, dict[str, Damage]] = {
    "shift": {"shift 1": shift(1), "shift 2": shift(2), "shift 4": shift(4)},
    "blur": {"blur 1": blur(1), "blur 2": blur(2)},
    "JPEG": {"JPEG 90": jpeg(90), "JPEG 50": jpeg(50)},
    "noise": {"noise 8": noise(8), "noise 24": noise(24)},
    "mirrored": {"mirrored": lambda image, rng: ImageOps.mirror(image)},
}
"""Kind of damage -> its grades, least first. Shift: pixels. Blur, noise: sigma in pixels, in grey levels."""
GRADES = [name for grades in FAMILIES.values() for name in grades]
SHUFFLED = "shuffled"
"""Another picture of the set stands in for the generated picture."""
COLUMNS = ("itself", *GRADES, SHUFFLED)


def shapes(count: int) -> Iterator[tuple[Image.Image, Truth]]:
    for number in range(count):
        scene = sample_scene(SEED, number)
        yield render(scene, SIDE), Truth(np.asarray(visible_masks(scene, SIDE).any(axis=0)))


def photo(count: int) -> Iterator[tuple[Image.Image, Truth]]:
    """Crops of the astronaut (NASA, public domain). Neighbours overlap by half, so they are no independent pictures."""
    whole = Image.open(ROOT / "tests" / "assets" / "astronaut.jpg").convert("RGB")
    steps = range(0, whole.width - SIDE + 1, SIDE // 2), range(0, whole.height - SIDE + 1, SIDE // 2)
    places = [(x, y) for y in steps[1] for x in steps[0]]
    for x, y in places[:count]:
        yield whole.crop((x, y, x + SIDE, y + SIDE)), Truth(np.ones((SIDE, SIDE), bool))


def emoji(count: int) -> Iterator[tuple[Image.Image, Truth]]:
    from t2i_adapter.evaluation.foreground import foreground_mask

    rows = sorted((ROOT / "tests" / "assets" / "emoji").rglob("metadata.jsonl"))
    files = [file.parent / json.loads(line)["file_name"] for file in rows for line in file.read_text().splitlines()]
    for file in files[:count]:
        picture = Image.open(file).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        yield picture, Truth(foreground_mask(np.asarray(picture)))


SETS = {"shapes": shapes, "photo": photo, "emoji": emoji}


def measure_set(name: str, count: int, kinds: Sequence[str]) -> dict[str, Any]:
    """Returns "KIND: metric" -> column -> interval over the set's pictures, and what is out of order."""
    pictures = list(SETS[name](count))
    targets = [picture for picture, _ in pictures]
    rng = np.random.default_rng(SEED)
    columns = {"itself": targets, SHUFFLED: targets[1:] + targets[:1]}
    for grades in FAMILIES.values():
        columns |= {grade: [damage(target, rng) for target in targets] for grade, damage in grades.items()}
    found: dict[str, dict[str, list[float]]] = {}

    def add(prefix: str, column: str, values: Mapping[str, float]) -> None:
        for metric, value in values.items():
            found.setdefault(prefix + metric, {}).setdefault(column, []).append(value)

    judges = [open_annotator(kind) for kind in kinds]
    for target, truth, *images in zip(*zip(*pictures, strict=True), *columns.values(), strict=True):
        pixels = np.asarray(target)
        wanted = [np.asarray(annotate(judge, target)) for judge in judges]
        for column, image in zip(columns, images, strict=True):
            values = picture_excess(np.asarray(image), pixels)
            if name != "photo":
                values = measure(np.asarray(image), truth) | values
            add("", column, values)
            for judge, own in zip(judges, wanted, strict=True):
                got = np.asarray(annotate(judge, image))
                add(f"{judge.name}: ", column, compare(family(judge), got, own, judge.facts.levels))
                if family(judge) == "edges":
                    add(f"{judge.name}: ", column, {"ms_ssim": ms_ssim(got, own) or 0.0})
            add("brightness: ", column, depth_agreement(*(np.asarray(each.convert("L")) for each in (image, target))))
    return {"pictures": len(targets), "metrics": {row: _row(row, values) for row, values in found.items()}}


def _row(name: str, values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    intervals = {column: mean_interval(values[column]).to_json() for column in COLUMNS}
    return {**intervals, "exceptions": exceptions(name, values)}


def exceptions(name: str, values: Mapping[str, Sequence[float]]) -> list[str]:
    """Returns what is out of order, in words; [] for a metric that orders as it should.

    A grade is better than a lesser one of its kind of damage, or a damage is worse than another picture: the 95 %
    interval of the paired difference lies on the wrong side of 0.
    """
    sign = 1 if METRICS[name.rpartition(" ")[2]].higher_is_better else -1
    quality = {column: sign * np.asarray(row) for column, row in values.items()}

    def is_better(a: str, b: str) -> bool:
        return mean_interval(quality[a] - quality[b]).low > 0

    wrong = []
    for grades in FAMILIES.values():
        wrong += [f"{b} better than {a}" for a, b in pairwise(["itself", *grades]) if is_better(b, a)]
    return wrong + [f"{grade} worse than {SHUFFLED}" for grade in GRADES if is_better(SHUFFLED, grade)]


def tables(result: Mapping[str, Any]) -> str:
    """Returns the Markdown tables of a result: a mean with half of its 95 % interval for each metric and damage."""
    parts = []
    for name, content in result["sets"].items():
        head = " | ".join(["metric", *GRADES, SHUFFLED, "in order"])
        rows = [f"{name}, {content['pictures']} pictures:", "", f"| {head} |", "|---" * (len(GRADES) + 3) + "|"]
        for metric in (metric for metric in ROWS if metric in content["metrics"]):
            row = content["metrics"][metric]
            cells = [_cell(row[column], metric) for column in (*GRADES, SHUFFLED)]
            rows.append(f"| {metric} | {' | '.join(cells)} | {'; '.join(row['exceptions']) or 'yes'} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def _cell(interval: Mapping[str, float], metric: str) -> str:
    digits = METRICS[metric.rpartition(" ")[2]].digits
    return f"{interval['mean']:.{digits}f} ± {(interval['high'] - interval['low']) / 2:.{digits}f}"


def newest_tables() -> str:
    """Returns the tables of the newest result file."""
    file = newest("measures")
    assert file is not None, "there is no result file"
    return tables(json.loads(file.read_text(encoding="utf-8")))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--num", type=int, default=24, help="most pictures a set")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help="kinds of conditions")
    parser.add_argument(
        "--table", action="store_true", help="print the tables of the newest result and measure nothing"
    )
    options: argparse.Namespace = parser.parse_args()
    if not options.table:
        cv2.setNumThreads(1)
        sets = {name: measure_set(name, options.num, options.kinds) for name in SETS}
        settings = {"side": SIDE, "seed": SEED, "num": options.num, "kinds": options.kinds}
        result = {"settings": settings, "sets": sets}
        write_result("measures", result, options.out)
        print(tables(result))
    else:
        print(newest_tables())


if __name__ == "__main__":
    main()
