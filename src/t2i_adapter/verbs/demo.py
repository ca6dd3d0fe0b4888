"""The verb `demo`: every other verb in turn, as a person would call them."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from t2i_adapter.errors import UserError
from t2i_adapter.training.lock import lock
from t2i_adapter.verbs import evaluate as evaluation
from t2i_adapter.verbs import generate as generation
from t2i_adapter.verbs import train as trainer
from t2i_adapter.verbs.demo_options import GUIDANCE, SIZE, DemoOptions, training
from t2i_adapter.verbs.evaluate_options import EvaluateOptions
from t2i_adapter.verbs.generate import GenerateOptions
from t2i_adapter.verbs.make_data import ShapesOptions, make_shapes

PICTURES = 4


def run(options: DemoOptions) -> None:
    """Makes data, trains, generates, evaluates, and tells where the results are."""
    out = Path(options.out)
    started = time.monotonic()
    with lock(out):
        data, adapter, pictures = out / "data", out / "adapter", out / "pictures"
        for old in (adapter, pictures):
            shutil.rmtree(old, ignore_errors=True)
        with _part("1/4  making data"):
            _make_data(options, data)
        with _part("2/4  training"):
            trainer.run(training(str(data), str(adapter), steps=options.steps, seed=options.seed))
        with _part("3/4  generating"):
            generation.run(_generate_options(data, adapter, pictures, options.seed))
        with _part("4/4  evaluating on conditions it has not seen"):
            evaluation.run(
                EvaluateOptions(
                    adapter=str(adapter),
                    data=str(data),
                    num=options.num_test,
                    guidance=GUIDANCE,
                    seed=options.seed,
                    out=str(out),
                )
            )
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes. {_verdict(out)}")
    print(f"  look at   {out / 'sheet.png'}  and  {out / 'report.html'}")
    print(f"  adapter   {adapter}")


def _make_data(options: DemoOptions, data: Path) -> None:
    wanted = ShapesOptions(
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
        make_shapes(wanted)
    except UserError:  # an earlier demo with other options left its data here
        shutil.rmtree(data, ignore_errors=True)
        make_shapes(wanted)


def _generate_options(data: Path, adapter: Path, out: Path, seed: int) -> GenerateOptions:
    """The first few unseen conditions, each with its caption."""
    lines = (data / "test" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[:PICTURES]
    rows = [json.loads(line) for line in lines]
    return GenerateOptions(
        adapter=str(adapter),
        prompt=tuple(row["text"] for row in rows),
        image=tuple(str(data / "test" / row["conditioning_image_file_name"]) for row in rows),
        guidance=GUIDANCE,
        seed=seed,
        out=str(out),
    )


def _verdict(out: Path) -> str:
    """The one number, with its interval and its control, as measured."""
    iou = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))["metrics"]["iou"]
    ours, other = iou["adapter"], iou["other_condition"]
    low, high = ours["ci95"]
    return (
        f"The shapes' IoU with their condition is {ours['mean']:.2f} (95 % interval {low:.2f} to {high:.2f}); "
        f"with another pair's condition it is {other['mean']:.2f}."
    )


@contextmanager
def _part(title: str) -> Iterator[None]:
    print(f"\n=== {title}", flush=True)
    began = time.monotonic()
    yield
    print(f"=== {title}: {time.monotonic() - began:.0f} s", flush=True)
