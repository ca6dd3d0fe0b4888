"""Trains an adapter for each of five condition kinds on the embedded base and measures it on unseen conditions.

    python benchmarks/five_adapters.py
    python benchmarks/five_adapters.py --arms palette depth

Each arm makes its scenes, trains with its recipe, and is evaluated as `t2i-adapter evaluate` does: for every held-out
condition, one picture by the adapter, one with another scene's condition and one without the adapter, all from the same
noise. An arm that is finished in --work is not run again while base, recipe and settings are unchanged. A stopped run
resumes; its seconds then count from its last start. Each of the last three arms is the palette with one option of its
recipe changed.

After each arm it writes the numbers of all finished arms to the result file, with the digest of the base, and their
pictures to docs/images/five_adapters.png: condition, no adapter, adapter, another pair's condition, target.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from common import make_parser, write_result
from PIL import Image

from t2i_adapter.cli import main as command
from t2i_adapter.evaluation.report import picture_sheet
from t2i_adapter.models import nano
from t2i_adapter.verbs.evaluate import EvaluateOptions, run
from t2i_adapter.verbs.make_data import ShapesOptions, make_shapes

RECIPES = Path(__file__).parents[1] / "recipes"
SIZE, GUIDANCE, SHOWN = 128, 3.0, 2
KINDS = ("circle", "square", "triangle", "star")
RESULT, PICTURES = "result.json", "pictures.png"
KINDS_SHOWN = ("canny", "lineart", "depth", "segmentation", "palette")


@dataclass(frozen=True)
class Arm:
    """What an adapter is trained on and measured by.

    Attributes:
        condition: the map that the scene generator draws for the data.
        metric: the measure to report beside the IoU of the objects.
        judge: annotator whose maps of the generated pictures are compared with the true ones.
        annotator: computes the condition from the pictures, if the generator draws no such map.
        recipe: name of a file in recipes/.
        flags: flags beside the recipe.
        prompts: column of the captions that pictures are generated from.
    """

    condition: Literal["outline", "canny", "depth", "segmentation", "palette"]
    metric: str
    judge: str = "none"
    annotator: str | None = None
    recipe: str = "nano-conditions"
    flags: tuple[str, ...] = ()
    prompts: str = "text"


def palette(*flags: str) -> Arm:
    """An arm whose prompts name no colours, so that the colours must come from the map."""
    return Arm("palette", "condition_error", "palette", recipe="nano-palette", flags=flags, prompts="shapes")


ARMS = {
    "canny": Arm("canny", "condition_f1", judge="canny"),
    "lineart": Arm("outline", "condition_error", judge="lineart", annotator="lineart"),
    "depth": Arm("depth", "edge_f1"),
    "segmentation": Arm("segmentation", "edge_f1"),
    "palette": palette(),
    "palette, no noise offset": palette("--objective.noise_offset", "0"),
    "palette, captions with colours": palette("--data.caption_column", "text"),
    "palette, rate 1e-5": palette("--optim.lr", "1e-5"),
}


def folder_of(name: str, options: argparse.Namespace) -> Path:
    """The arm's folder, with a digest of base, recipe and settings in its name."""
    arm, settings = ARMS[name], (options.steps, options.scenes, options.pairs, options.sampling_steps)
    recipe = recipe_of(arm).read_bytes()
    digest = hashlib.sha256(repr((arm, settings, base_digest())).encode() + recipe).hexdigest()
    return options.work / f"{name.replace(', ', '-').replace(' ', '-')}-{digest[:8]}"


def recipe_of(arm: Arm) -> Path:
    return RECIPES / f"{arm.recipe}.yaml"


def measure(name: str, options: argparse.Namespace) -> None:
    """Makes the data, trains and evaluates, if the arm's folder has no result yet; writes result and pictures there."""
    arm, folder = ARMS[name], folder_of(name, options)
    if (folder / RESULT).is_file():
        return
    adapter, data = folder / "adapter", make_scenes(arm, options)
    words = [
        *("train", "--recipe", str(recipe_of(arm)), "--data", str(data), "--output_dir", str(adapter)),
        *("--train.max_steps", str(options.steps), "--tracking.report_to", "none", "--checkpoint.resume", "latest"),
        *("--data.prepared_dir", str(options.work / "cache"), *arm.flags),
        *(("--data.condition", arm.annotator) if arm.annotator else ()),
    ]
    training = clocked(lambda: succeed(words))
    (evaluation,) = run(
        EvaluateOptions(
            adapter=(str(adapter),),
            data=str(data),
            num=options.pairs,
            caption_column=arm.prompts,
            judge=arm.judge,
            guidance=GUIDANCE,
            steps=options.sampling_steps,
            out=str(folder / "evaluation"),
        )
    )
    picture_sheet(evaluation, SHOWN).save(folder / PICTURES)
    row = {"training": training, "metric": arm.metric, "metrics": evaluation.to_json()["metrics"]}
    (folder / RESULT).write_text(json.dumps(row, indent=1) + "\n")


def make_scenes(arm: Arm, options: argparse.Namespace) -> Path:
    """Writes one or two plain shapes on a plain ground with the arm's maps. The scenes are equal in all arms."""
    out = options.work / f"scenes-{arm.condition}-{options.scenes}-{options.pairs}"
    scenes = ShapesOptions(
        out=out,
        num=options.scenes,
        num_test=options.pairs,
        size=SIZE,
        condition=arm.condition,
        max_shapes=2,
        kinds=KINDS,
        patterns=("plain",),
    )
    make_shapes(scenes)
    return out


def succeed(words: list[str]) -> None:
    assert command(words) == 0, " ".join(words)


def clocked(work: Callable[[], None]) -> dict[str, float]:
    """Seconds of wall time and of CPU time. CPU time hardly depends on other work on the machine."""
    wall, core = time.perf_counter(), time.process_time()
    work()
    return {"seconds": round(time.perf_counter() - wall, 1), "core_seconds": round(time.process_time() - core, 1)}


def base_digest() -> str:
    files = (nano.path() / part / "diffusion_pytorch_model.safetensors" for part in ("unet", "vae"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def shown(columns: dict[str, Any], column: str, digits: int) -> str:
    low, high = columns[column]["ci95"]
    return f"{columns[column]['mean']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The Markdown table of the documentation."""
    lines = [
        "| adapter | measure | adapter | other condition | no adapter | target | core seconds of training |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        for metric in dict.fromkeys((row["metric"], "iou")):
            columns = row["metrics"][metric]
            digits = 3 if metric == "condition_error" else 2
            cells = [shown(columns, column, digits) for column in ("adapter", "other_condition", "no_adapter")]
            target = f"{columns['target']['mean']:.{digits}f}"
            spent = f"{row['training']['core_seconds']:.0f}" if metric == row["metric"] else ""
            lines.append(f"| {name} | {metric} | {' | '.join(cells)} | {target} | {spent} |")
            name = ""
    return "\n".join(lines)


def stack(strips: list[Image.Image]) -> Image.Image:
    """One picture with the strips below each other."""
    whole = Image.new("RGB", (max(strip.width for strip in strips), sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        whole.paste(strip, (0, top))
        top += strip.height
    return whole


def write(rows: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    content = {
        "base": base_digest(),
        "settings": {
            name: getattr(options, name) for name in ("steps", "scenes", "pairs", "sampling_steps", "threads")
        },
        "adapters": rows,
    }
    write_result("five_adapters", content, options.out)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--steps", type=int, default=150, help="updates of each adapter")
    parser.add_argument("--scenes", type=int, default=400, help="scenes to train on")
    parser.add_argument("--pairs", type=int, default=48, help="unseen scenes to measure")
    parser.add_argument("--sampling_steps", type=int, default=10, help="denoising steps of a measured picture")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--work", type=Path, default=Path("runs/five_adapters"))
    parser.add_argument("--sheet", type=Path, default=Path("docs/images/five_adapters.png"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.arms:
        measure(name, options)
        finished = [name for name in ARMS if (folder_of(name, options) / RESULT).is_file()]
        rows = {name: json.loads((folder_of(name, options) / RESULT).read_text()) for name in finished}
        write(rows, options)
        pictures = [folder_of(name, options) / PICTURES for name in finished if name in KINDS_SHOWN]
        if pictures:
            options.sheet.parent.mkdir(parents=True, exist_ok=True)
            stack([Image.open(picture) for picture in pictures]).save(options.sheet, optimize=True)
        print(table(rows), flush=True)


if __name__ == "__main__":
    main()
