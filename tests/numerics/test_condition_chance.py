"""A condition that chance has a part in is drawn anew each time, as a function of the seed and the draw alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from t2i_adapter.annotators.registry import annotate, open_annotator
from t2i_adapter.batches.loader import make_partial_batches
from t2i_adapter.batches.order import Order
from t2i_adapter.cache.context import PrepareContext
from t2i_adapter.cache.dataset import CachedDataset, LiveDataset
from t2i_adapter.cache.prepare import prepare
from t2i_adapter.config.tree import BaseOptions, Config, DataOptions, TrainOptions
from t2i_adapter.data.source import open_source
from t2i_adapter.models.open import open_base
from t2i_adapter.types import PartialBatch

PICTURES, BATCH, STEPS = 2, 2, 4
SPEC = "canny,low=200,high=400,vary=1"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Soft clouds, whose edges depend on the threshold."""
    folder = tmp_path_factory.mktemp("clouds") / "train"
    folder.mkdir()
    rng, rows = np.random.default_rng(0), []
    for number in range(PICTURES):
        small = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(cv2.resize(small, (80, 64), interpolation=cv2.INTER_CUBIC)).save(folder / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": f"clouds {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder.parent


def options_of(base: Path, data: Path, root: Path, *, seed: int = 5, spec: str = SPEC, **options: Any) -> Config:
    return Config(
        base=BaseOptions(name=str(base)),
        data=DataOptions(
            **{"num_workers": 0, **options},
            location=str(data),
            resolution=64,
            condition=spec,
            prepared_dir=str(root / "cache"),
        ),
        train=TrainOptions(batch_size=BATCH, seed=seed),
    )


def facts_of(config: Config) -> CachedDataset | LiveDataset:
    assert config.data.prepared_dir
    root = Path(config.data.prepared_dir)
    context = PrepareContext(open_base(config.base), "cpu", torch.float32, root, progress=False)
    return prepare(open_source(config.data, 0), config.data, context, in_channels=3)


def drafts(config: Config, *, start: int = 0) -> list[PartialBatch]:
    facts = facts_of(config)
    return [
        *make_partial_batches(facts, config, rank=0, world=1, start_step=start, stop_step=STEPS, num_timesteps=1000)
    ]


def conditions(config: Config, *, start: int = 0) -> list[torch.Tensor]:
    return [draft.condition for draft in drafts(config, start=start)]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_each_draw_of_a_picture_has_another_condition(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    by_key: dict[str, set[bytes]] = {}
    for draft in drafts(options_of(tiny_base, data, tmp_path)):
        for key, condition in zip(draft.keys, draft.condition, strict=True):
            by_key.setdefault(key, set()).add(condition.numpy().tobytes())
    assert [len(maps) for maps in by_key.values()] == [STEPS] * PICTURES, "an epoch is a step here"


def test_it_is_the_kinds_map_of_the_crop_for_seed_and_draw(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    config = options_of(tiny_base, data, tmp_path)
    facts, annotator = facts_of(config), open_annotator(SPEC)
    order = Order(facts.groups, facts.shards, 5, BATCH)
    for step, condition in enumerate(conditions(config)):
        for within in range(BATCH):
            draw = step * BATCH + within
            image = open_source(config.data, 0)[order.number(draw)].image.crop((8, 0, 72, 64))
            expected = torch.from_numpy(np.array(annotate(annotator, image, f"5/{draw}")))
            assert all(torch.equal(plane, expected) for plane in condition[within])


def test_a_run_is_the_same_each_time_and_another_for_another_seed(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    first, again, other = (conditions(options_of(tiny_base, data, tmp_path, seed=seed)) for seed in (5, 5, 6))
    assert equal(first, again) and not equal(first, other)


@pytest.mark.parametrize("change", [{"num_workers": 1}, {"num_workers": 2}, {"cache": "none"}], ids=str)
def test_neither_workers_nor_the_cache_change_it(
    tiny_base: Path, data: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    plain = conditions(options_of(tiny_base, data, tmp_path))
    assert equal(conditions(options_of(tiny_base, data, tmp_path, **change)), plain)


def test_a_run_that_goes_on_draws_what_it_would_have_drawn(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    straight = conditions(options_of(tiny_base, data, tmp_path))
    assert equal(conditions(options_of(tiny_base, data, tmp_path), start=2), straight[2:])


def test_the_crop_is_kept_and_shared_by_all_kinds_that_draw(
    tiny_base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts_of(options_of(tiny_base, data, tmp_path))
    assert f"prepared: {PICTURES} pairs ({PICTURES} new)" in capsys.readouterr().out
    facts_of(options_of(tiny_base, data, tmp_path, spec="sketch,random_threshold=true"))
    assert f"prepared: {PICTURES} pairs (0 new)" in capsys.readouterr().out
    facts_of(options_of(tiny_base, data, tmp_path, spec="sketch"))
    assert f"prepared: {PICTURES} pairs ({PICTURES} new)" in capsys.readouterr().out
