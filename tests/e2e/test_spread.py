"""The same run however it is spread: over 1, 2 or 4 processes, 0 or 4 loader workers, a batch whole or accumulated.

Each micro-batch is written down as it goes into a step, by the process that takes it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.processes import Run, ranks
from support.runs import losses
from support.tiny import write_circles

from t2i_adapter.training import nonfinite, setup
from t2i_adapter.types import Batch

STEPS, SAVED = 6, 3
SPREADS = [(1, 4, 4, 1), (1, 0, 2, 2), (2, 4, 2, 1), (2, 0, 1, 2), (4, 4, 1, 1)]
"""Processes, loader workers of each, batch size, micro-steps. The resumed runs below have the other combinations."""


pytestmark = pytest.mark.usefixtures("nothing_is_left_running")


@pytest.fixture(scope="module")
def work(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run.yaml, its data, whose rows have two captions each, and straight/, in one process without
    workers."""
    folder = tmp_path_factory.mktemp("spread")
    write_circles(folder / "data", num=7)
    for picture in (folder / "data" / "train").glob("*.png"):  # wider, so that there is something to crop
        Image.open(picture).resize((112, 80)).save(picture)
    rows = folder / "data" / "train" / "metadata.jsonl"
    told = [json.loads(line) for line in rows.read_text().splitlines()]
    rows.write_text("".join(json.dumps({**row, "text": [row["text"], "a circle"]}) + "\n" for row in told))
    (folder / "run.yaml").write_text(f"""
base: {{name: {tiny_base}}}
data: {{location: data, resolution: 64, crop: random, views: 3, flip: true, proportion_empty_prompts: 0.3}}
train: {{max_steps: {STEPS}, seed: 5, cpu_threads: 1}}
optim: {{lr: 1.0e-3, schedule: cosine, warmup_steps: 2}}
checkpoint: {{every: {SAVED}}}
tracking: {{report_to: none, log_every: 1}}
""")
    spread(folder, "straight", 1, 0, 4, 1)
    return folder


def spread(work: Path, name: str, world: int, workers: int, batch: int, accumulate: int, *more: str) -> None:
    """A run of that name, to its end, and its batches in NAME.batches."""
    words = ("train", "--recipe", "run.yaml", "--output_dir", name, "--data.prepared_dir", "kept", *more)
    sizes = {"train.batch_size": batch, "train.gradient_accumulation_steps": accumulate, "data.num_workers": workers}
    flags = [word for flag, value in sizes.items() for word in (f"--{flag}", str(value))]
    written = work / f"{name}.batches"
    alone: list[dict[str, str]] = [{}]
    runs = [
        Run(work, *words, *flags, env=env, before=lambda env=env: write_down(written, env.get("RANK", "0")))
        for env in (alone if world == 1 else ranks(world))
    ]
    for run in runs:
        assert run.wait() == 0, run.said()


def write_down(folder: Path, rank: str) -> None:
    """From now on every micro-batch of this process is kept, by its step, its place in the step and the process."""
    made = setup.make_batches

    def kept(facts: Any, config: Any, *rest: Any, start_step: int, **more: Any) -> Iterator[Batch]:
        accumulate = config.train.gradient_accumulation_steps
        for number, batch in enumerate(made(facts, config, *rest, start_step=start_step, **more)):
            step, micro = divmod(number, accumulate)
            nonfinite.write(folder / f"{start_step + step:03d}-{micro}-{rank}.safetensors", step, [batch], {})
            yield batch

    setup.make_batches = kept


def samples(folder: Path) -> dict[str, list[Any]]:
    """All that the steps were made of, sample by sample in the run's order."""
    found: dict[str, list[Any]] = {"step": []}
    for file in sorted(folder.iterdir()):
        (batch,), _ = nonfinite.read(file)
        found["step"] += [int(file.name.partition("-")[0])] * len(batch)
        given = {name: value for name, value in vars(batch).items() if value is not None}
        for name, value in given.items():
            found.setdefault(name, []).extend(value)
    return found


def assert_same_samples(one: dict[str, list[Any]], other: dict[str, list[Any]]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert len(one[name]) == len(other[name])
        for ours, theirs in zip(one[name], other[name], strict=True):
            assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs, name


def assert_same_run(work: Path, name: str) -> None:
    """A run's samples are those of straight/ in their order, and its losses are equal."""
    assert_same_samples(samples(work / f"{name}.batches"), samples(work / "straight.batches"))
    # Sums of float32 in another order, grown by a few updates
    assert losses(work / name) == pytest.approx(losses(work / "straight"), rel=1e-4)


def test_the_run_has_what_could_differ(work: Path):
    """Else the others would show nothing."""
    found = samples(work / "straight.batches")
    assert len(found["keys"]) == 4 * STEPS and len(losses(work / "straight")) == STEPS
    assert len(set(found["keys"])) == 7
    assert len({tuple(ids.tolist()) for ids in found["time_ids"]}) > 2, "several crops"
    texts = {text.sum().item() for text in found["text"]}
    assert len(texts) > 3, "captions, a common second one, and none"
    assert len({int(t) for t in found["timesteps"]}) > STEPS


@pytest.mark.parametrize("sizes", SPREADS, ids=str)
def test_the_same_samples_in_the_same_order_and_the_same_losses(work: Path, sizes: tuple[int, int, int, int]):
    name = "-".join(map(str, sizes))
    spread(work, name, *sizes)
    assert_same_run(work, name)


@pytest.mark.parametrize(("before", "after"), [((2, 4, 1, 2), (4, 0, 1, 1)), ((4, 0, 1, 1), (1, 4, 2, 2))])
def test_another_number_of_processes_goes_on_at_the_same_sample(
    work: Path, before: tuple[int, int, int, int], after: tuple[int, int, int, int]
):
    name = f"from-{before[0]}-to-{after[0]}"
    spread(work, name, *before)
    assert_same_run(work, name)
    shutil.rmtree(work / f"{name}.batches")
    spread(work, name, *after, "--checkpoint.resume", f"checkpoint-{SAVED}")
    straight = samples(work / "straight.batches")
    rest = {key: values[4 * SAVED :] for key, values in straight.items()}
    assert rest["step"][0] == SAVED
    assert_same_samples(samples(work / f"{name}.batches"), rest)
    assert losses(work / name) == pytest.approx(losses(work / "straight"), rel=1e-4)
