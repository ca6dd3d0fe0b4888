"""Trains and evaluates on pictures by other people: Fluent Emoji with OpenCV outlines, a tenth of the names held out.

    npm pack @iconify-json/fluent-emoji-flat@1.2.6
    python benchmarks/emoji.py --package iconify-json-fluent-emoji-flat-1.2.6.tgz

It runs the verbs make-data emoji, train and evaluate in runs/emoji. The result file is the evaluation with the seconds
of training, without the numbers of single pairs.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from common import make_parser, write_result

from t2i_adapter.verbs import evaluate as evaluation
from t2i_adapter.verbs import train as trainer
from t2i_adapter.verbs.demo import GUIDANCE, SIZE, demo_config
from t2i_adapter.verbs.evaluate import EvaluateOptions
from t2i_adapter.verbs.make_data import EmojiOptions, make_emoji

OUT = Path("runs/emoji")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--package", type=Path, required=True, help="the .tgz that npm pack writes, or its folder")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--num", type=int, default=64, help="held-out names to measure")
    options = parser.parse_args()
    adapter = OUT / "adapter"
    shutil.rmtree(adapter, ignore_errors=True)
    make_emoji(EmojiOptions(out=OUT / "data", package=options.package, size=SIZE))
    began = time.monotonic()
    trainer.run(demo_config(str(OUT / "data"), str(adapter), steps=options.steps, seed=0))
    seconds = time.monotonic() - began
    evaluation.run(
        EvaluateOptions(adapter=str(adapter), data=str(OUT / "data"), num=options.num, guidance=GUIDANCE, out=str(OUT))
    )
    result = json.loads((OUT / "evaluation.json").read_text(encoding="utf-8"))
    result["training_seconds"] = round(seconds)
    del result["pairs"]
    write_result("emoji", result, options.out)


if __name__ == "__main__":
    main()
