"""Sweeps the sampling options of a finished and of an early adapter of the demo's recipe, as `evaluate --sweep` does.

    python benchmarks/sweep_result.py

The adapters are those of benchmarks/control_guidance.py with seed 0: after 400 updates, and after 60. With the same
--work they are not trained again. What is measured in --work is not measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from common import make_parser, write_result
from control_guidance import CIRCLES, early_update, job_folder, scenes, train

from t2i_adapter.cli import main as command

KEPT = ("metric", "answer", "recommended", "rungs", "confirmation", "pictures", "seconds")
"""Keys of sweep.json that the result keeps."""


def prepare(options: argparse.Namespace) -> dict[str, Path]:
    """Trains the adapters, if they are missing. Copies them, because a sweep writes into their records."""
    out = job_folder(CIRCLES, 0, options)
    if not (out / "adapter" / "t2i_adapter.json").is_file():
        train(CIRCLES, 0, out / "adapter", options)
    sources = {
        "full": out / "adapter",
        "early": out / "adapter" / f"checkpoint-{early_update(CIRCLES, options)}" / "t2iadapter",
    }
    found = {}
    for name, source in sources.items():
        found[name] = options.work / f"swept-{name}-{options.num}"
        found[name].mkdir(exist_ok=True)
        for file in (source / "config.json", *source.glob("*.safetensors"), out / "adapter" / "t2i_adapter.json"):
            shutil.copy(file, found[name])
    return found


def sweep(adapter: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What `t2i-adapter evaluate --sweep` wrote about the adapter."""
    out = adapter.with_name(f"{adapter.name}-sweep")
    words = ["evaluate", "--sweep", "--adapter", str(adapter), "--data", str(scenes(CIRCLES, options))]
    words += ["--num", str(options.num), "--steps", str(options.sampling_steps), "--guidance", "3"]
    words += ["--sweep_metric", "edge_f1", "--out", str(out)]
    assert command(words) == 0, " ".join(words)
    content = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    return {key: content[key] for key in KEPT}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--num", type=int, default=32, help="pairs of the last rung; as many more confirm")
    parser.add_argument("--pairs", type=int, default=128, help="held-out scenes that there are")
    parser.add_argument("--sampling_steps", type=int, default=12)
    parser.add_argument("--training", type=float, default=1.0, help="share of the training's size")
    parser.add_argument("--work", type=Path, default=Path("runs/control_guidance"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: sweep(adapter, options) for name, adapter in prepare(options).items()}
    for name, row in found.items():
        print(f"{name}: {row['answer']}")
    write_result("sweep_result", {"num": options.num, "steps": options.sampling_steps, "sweeps": found}, options.out)


if __name__ == "__main__":
    main()
