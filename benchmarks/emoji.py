"""The main job on pictures drawn by others: Fluent Emoji, outlines by OpenCV, a tenth of the names held out.

    npm pack @iconify-json/fluent-emoji-flat@1.2.6
    python benchmarks/emoji.py --package iconify-json-fluent-emoji-flat-1.2.6.tgz

Runs the verbs that a person would (make-data emoji, train, evaluate) in runs/emoji and keeps the result file beside
this one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

from t2i_adapter.verbs import evaluate as evaluation
from t2i_adapter.verbs import train as trainer
from t2i_adapter.verbs.demo import GUIDANCE, SIZE, demo_config
from t2i_adapter.verbs.evaluate import EvaluateOptions
from t2i_adapter.verbs.make_data import EmojiOptions, make_emoji

OUT = Path("runs/emoji")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True, help="the .tgz that npm pack leaves, or its folder")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--num", type=int, default=64, help="held-out names that are measured")
    options = parser.parse_args()
    adapter = OUT / "adapter"
    shutil.rmtree(adapter, ignore_errors=True)
    make_emoji(EmojiOptions(out=OUT / "data", package=options.package, size=SIZE))
    began = time.monotonic()
    trainer.run(demo_config(str(OUT / "data"), str(adapter), steps=options.steps, seed=0))
    seconds = time.monotonic() - began
    measured = EvaluateOptions(
        adapter=str(adapter), data=str(OUT / "data"), num=options.num, guidance=GUIDANCE, out=str(OUT)
    )
    evaluation.run(measured)
    result = json.loads((OUT / "evaluation.json").read_text(encoding="utf-8"))
    result["training_seconds"] = round(seconds)
    del result["pairs"]
    Path("benchmarks/emoji.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
