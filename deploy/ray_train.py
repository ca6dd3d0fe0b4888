"""Trains an adapter by Ray Train: `python deploy/ray_train.py --workers 4 --gpu RECIPE [OPTION=VALUE ...]`.

Ray starts the workers, makes their process group, and starts them again if one is lost; `t2i_adapter.train` runs inside
and goes on at its newest checkpoint. The recipe's `output_dir` and `data.prepared_dir` must lie on a disk that all
machines of the Ray cluster share. `train.global_batch` keeps the run the same on another number of workers.

It needs `pip install "sdxl-t2i-adapter[ray]"`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t2i_adapter import make_config
from t2i_adapter.exits import guarded
from t2i_adapter.files import show_path


def train_here(options: Mapping[str, Any]) -> None:
    """One worker: trains in the process group that Ray has made. options: "recipe", and "values" by option path."""
    import ray.train

    from t2i_adapter import Event, train

    def report(event: Event) -> None:
        if event.kind == "train":
            losses.append(event.values["loss"])

    losses: list[float] = []
    values = {"checkpoint.resume": "auto", "tracking.report_to": "none", **options["values"]}
    run = train(make_config(values, recipe=options["recipe"]), callbacks=[report])
    if not run.is_finished:
        raise RuntimeError(f"{run.reason} Start the same command again.")  # Ray takes a return for success
    # Ray waits until every worker has reported. The loss is logged by the first worker alone.
    ray.train.report({"loss": losses[-1] if losses else float("nan")})


def launch(recipe: Path, values: Mapping[str, str], *, workers: int, gpu: bool, failures: int, storage: Path) -> None:
    """Trains by `workers` workers. failures: how often Ray starts the workers again. storage:
    where Ray writes its own records."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        train_here,
        train_loop_config={"recipe": str(recipe.resolve()), "values": dict(values)},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu),
        run_config=RunConfig(storage_path=str(storage), failure_config=FailureConfig(max_failures=failures)),
    )
    trainer.fit()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("values", nargs="*", metavar="OPTION=VALUE", help="an option by its path: optim.lr=1e-4")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="one GPU a worker")
    parser.add_argument("--failures", type=int, default=3, help="how often lost workers are started again")
    parser.add_argument("--storage", type=Path, default=Path("ray-results").resolve(), help="for Ray's own records")
    words = parser.parse_intermixed_args()
    if wrong := next((word for word in words.values if "=" not in word), None):
        parser.error(f"{wrong}: write OPTION=VALUE")
    values = dict(word.split("=", 1) for word in words.values)

    def run() -> None:
        folder = make_config(values, recipe=words.recipe).output_dir  # raises UserError before Ray starts
        launch(
            words.recipe, values, workers=words.workers, gpu=words.gpu, failures=words.failures, storage=words.storage
        )
        print(f"Done: the adapter is in {show_path(folder)}.")

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
