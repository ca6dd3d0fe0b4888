"""The verb `demo`: makes a dataset, trains an adapter, generates and evaluates, each through its own verb.

Importing this module loads no torch.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from t2i_adapter.config.tree import (
    CheckpointOptions,
    Config,
    DataOptions,
    ObjectiveOptions,
    OptimOptions,
    TrackingOptions,
    TrainOptions,
)
from t2i_adapter.errors import UserError
from t2i_adapter.files import show_path
from t2i_adapter.verbs.evaluate import EvaluateOptions
from t2i_adapter.verbs.generate import GenerateOptions
from t2i_adapter.verbs.make_data import Kind, ShapesOptions, make_shapes

SIZE = 128
"""Side of the demo's pictures in pixels."""
GUIDANCE = 3.0
"""Guidance scale for `nano` (see its card); SDXL's usual 5 to 7.5 oversaturates flat colours."""
MIN_SNR_GAMMA = 0.05
PICTURES = 4
"""Pictures that the demo generates."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The whole workflow on the embedded base: dataset, training, pictures, and a measurement of the control."""

    out: str = "runs/demo"
    """Folder of the results: adapter/, sheet.png, report.html, evaluation.json. An earlier demo in it is replaced."""
    num_train: int = 2000
    """Pairs to train on."""
    num_test: int = 64
    """Held-out pairs to measure on."""
    steps: int = 400
    """Training steps."""
    kinds: tuple[Kind, ...] = ("circle",)
    """Shapes in the scenes: circles, as in the dataset of the diffusers guide, or any of the others too."""
    max_shapes: int = 1
    """Most shapes in a scene, 1 to 3."""
    seed: int = 0
    """Decides scenes, training and pictures."""


def demo_config(data_dir: str, output_dir: str, *, steps: int, seed: int) -> Config:
    """Returns the options of the demo's training. recipes/nano-shapes.yaml holds the same options."""
    return Config(
        output_dir=output_dir,
        data=DataOptions(location=data_dir, resolution=SIZE, num_workers=0),
        train=TrainOptions(batch_size=16, max_steps=steps, seed=seed, ema_decay=0.9),
        # On so small a base the noisiest timesteps decide the layout, so the loss is weighted towards them.
        objective=ObjectiveOptions(min_snr_gamma=MIN_SNR_GAMMA, stratify=True),
        optim=OptimOptions(name="muon", lr=1e-2, schedule="cosine", warmup_steps=0),
        checkpoint=CheckpointOptions(every=steps, keep=1),
        tracking=TrackingOptions(log_every=10),
    )


def run(options: DemoOptions) -> None:
    """Makes the dataset, trains, generates, evaluates, and prints where the results are."""
    from t2i_adapter.runs.lock import lock
    from t2i_adapter.verbs import evaluate, generate, train

    out = Path(options.out)
    started = time.monotonic()
    with lock(out):
        data, adapter, pictures = out / "data", out / "adapter", out / "pictures"
        for old in (adapter, pictures):
            shutil.rmtree(old, ignore_errors=True)
        with _part("1/4  making data"):
            _make_data(options, data)
        with _part("2/4  training"):
            train.run(demo_config(str(data), str(adapter), steps=options.steps, seed=options.seed))
        with _part("3/4  generating"):
            generate.run(_generate_options(data, adapter, pictures, options.seed))
        with _part("4/4  evaluating on conditions it has not seen"):
            evaluate.run(
                EvaluateOptions(
                    adapter=(str(adapter),),
                    data=str(data),
                    num=options.num_test,
                    guidance=GUIDANCE,
                    seed=options.seed,
                    out=str(out),
                )
            )
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes.")
    print(f"  look at   {show_path(out / 'report.html')}  and  {show_path(out / 'sheet.png')}")
    print(f"  adapter   {show_path(adapter)}")


def _make_data(options: DemoOptions, data: Path) -> None:
    shapes = ShapesOptions(
        out=data,
        num=options.num_train,
        num_test=options.num_test,
        size=SIZE,
        seed=options.seed,
        kinds=options.kinds,
        max_shapes=options.max_shapes,
        patterns=("plain",),
    )
    try:
        make_shapes(shapes)
    except UserError:  # the folder holds the dataset of an earlier demo with other options
        shutil.rmtree(data, ignore_errors=True)
        make_shapes(shapes)


def _generate_options(data: Path, adapter: Path, out: Path, seed: int) -> GenerateOptions:
    """The first PICTURES held-out conditions, each with its caption."""
    lines = (data / "test" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[:PICTURES]
    rows = [json.loads(line) for line in lines]
    return GenerateOptions(
        adapter=(str(adapter),),
        prompt=tuple(row["text"] for row in rows),
        image=tuple(str(data / "test" / row["conditioning_image_file_name"]) for row in rows),
        guidance=GUIDANCE,
        seed=seed,
        out=str(out),
    )


@contextmanager
def _part(title: str) -> Iterator[None]:
    print(f"\n=== {title}", flush=True)
    began = time.monotonic()
    yield
    print(f"=== {title}: {time.monotonic() - began:.0f} s", flush=True)
