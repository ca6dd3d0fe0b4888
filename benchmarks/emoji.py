"""Trains and evaluates on pictures by other people: Fluent Emoji with OpenCV outlines, a tenth of the names held out.

    npm pack @iconify-json/fluent-emoji-flat@1.2.6
    python benchmarks/emoji.py --package iconify-json-fluent-emoji-flat-1.2.6.tgz

It runs the verbs make-data emoji, train and evaluate in runs/emoji. The result file is the evaluation with the seconds
of training, without the numbers of single pairs. Then it writes --picture: the first held-out names in sorted order,
each with its condition, what the base alone and the base with the adapter generate from the same noise, and the target.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from common import ROOT, make_parser, write_result
from PIL import Image, ImageDraw, ImageFont

from t2i_adapter.data.emoji import Icon
from t2i_adapter.verbs import evaluate as evaluation
from t2i_adapter.verbs import train as trainer
from t2i_adapter.verbs.demo import GUIDANCE, SIZE, demo_config
from t2i_adapter.verbs.evaluate import EvaluateOptions
from t2i_adapter.verbs.make_data import EmojiOptions, make_emoji

OUT = Path("runs/emoji")
NAMES = 6
"""Columns of the picture."""
GAP = 6
"""Pixels between the cells of the picture."""
FONT = 13
"""Size in pixels of the picture's text."""


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--package", type=Path, required=True, help="the .tgz that npm pack writes, or its folder")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--num", type=int, default=64, help="held-out names to measure")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / "emoji.png")
    options = parser.parse_args()
    adapter = OUT / "adapter"
    shutil.rmtree(adapter, ignore_errors=True)
    make_emoji(EmojiOptions(out=OUT / "data", package=options.package, size=SIZE))
    began = time.monotonic()
    trainer.run(demo_config(str(OUT / "data"), str(adapter), steps=options.steps, seed=0))
    seconds = time.monotonic() - began
    evaluation.run(
        EvaluateOptions(
            adapter=(str(adapter),), data=str(OUT / "data"), num=options.num, guidance=GUIDANCE, out=str(OUT)
        )
    )
    result = json.loads((OUT / "evaluation.json").read_text(encoding="utf-8"))
    result["training_seconds"] = round(seconds)
    del result["pairs"]
    write_result("emoji", result, options.out)
    make_picture(*generate_rows(OUT / "data" / "test", adapter)).save(options.picture, optimize=True)
    print(options.picture)


def generate_rows(test: Path, adapter: Path) -> tuple[list[str], dict[str, list[Image.Image]]]:
    """Returns names of held-out emoji, and the rows of the picture: heading -> one picture a name.

    The names are the first NAMES of the folder `test` in sorted order, without those that repeat an emoji in another
    skin tone. Their pictures are generated from the seeds 0, 1, ..., with the options of `evaluate`.
    """
    from t2i_adapter.generation.generate import generate
    from t2i_adapter.generation.options import ModelOptions
    from t2i_adapter.generation.pipeline import open_models

    chosen = first_names(test)
    prompts = [row["text"] for row in chosen]
    conditions = [Image.open(test / row["conditioning_image_file_name"]).convert("RGB") for row in chosen]
    pipeline = open_models(ModelOptions(adapter=str(adapter))).pipeline()
    options = EvaluateOptions(adapter=(str(adapter),), data=str(test.parent), guidance=GUIDANCE)
    sampling = options.settle({})
    alone, controlled = (
        generate(pipeline, prompts, given, range(len(chosen)), size=(SIZE, SIZE), sampling=sampling)
        for given in (None, conditions)
    )
    targets = [Image.open(test / row["file_name"]).convert("RGB") for row in chosen]
    rows = {"condition": conditions, "base alone": alone, "with adapter": controlled, "target": targets}
    return [row["name"].replace("-", " ") for row in chosen], rows


def first_names(test: Path) -> list[dict[str, str]]:
    """Returns the rows of the first NAMES emoji in sorted order, without those in a skin tone."""
    lines = (test / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = sorted(map(json.loads, lines), key=lambda row: row["name"])
    return [row for row in rows if not Icon(row["name"], svg="").is_toned][:NAMES]


def make_picture(names: Sequence[str], rows: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """Lays equal pictures out in a table: a row for each heading, a column for each name, none of them scaled."""
    width, height = next(iter(rows.values()))[0].size
    font = ImageFont.load_default(FONT)
    left = GAP + int(max(font.getlength(heading) for heading in rows)) + GAP
    top = 2 * GAP + FONT
    sheet = Image.new("RGB", (left + len(names) * (width + GAP), top + len(rows) * (height + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(names):
        draw.text((left + column * (width + GAP), GAP), name, "black", font)
    for row, (heading, pictures) in enumerate(rows.items()):
        y = top + row * (height + GAP)
        draw.text((GAP, y + height // 2 - FONT // 2), heading, "black", font)
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (left + column * (width + GAP), y))
    return sheet


if __name__ == "__main__":
    main()
