"""A run's choices belong to its draws: not to processes, loader workers, or the cutting of a global batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import write_circles

from t2i_adapter.batches.item import choose
from t2i_adapter.batches.loader import make_batches
from t2i_adapter.batches.order import draws_of, sample_of
from t2i_adapter.cache.prepare import Prepared, prepare
from t2i_adapter.config import BaseOptions, Config, DataOptions, ObjectiveOptions, TrainOptions
from t2i_adapter.errors import UserError
from t2i_adapter.models.base import open_base
from t2i_adapter.sources.table import open_source
from t2i_adapter.types import Batch

FIELDS = ("moments", "condition", "text", "pooled", "time_ids", "timesteps", "noise", "latent_noise")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pairs, wider than high, two captions each."""
    folder = write_circles(tmp_path_factory.mktemp("batches"), num=7, size=64)
    metadata = folder / "train" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace('"text": "', '"text": ["a disc", "').replace('"}', '"]}'))
    return folder


@pytest.fixture(scope="module")
def prepared(data: Path, tiny_base: Path) -> Prepared:
    return prepare_at(data, tiny_base, data / "root")


def prepare_at(data: Path, base: Path, root: Path) -> Prepared:
    return prepare(
        open_source(DataOptions(train_data_dir=str(data)), 0),
        resolution=64,
        in_channels=3,
        base=open_base(BaseOptions(name=str(base))),
        device="cpu",
        dtype=torch.float32,
        root=root,
        progress=False,
    )


def config(*, workers: int = 0, batch_size: int = 4, accumulate: int = 1, seed: int = 5, **data: Any) -> Config:
    train = TrainOptions(batch_size=batch_size, gradient_accumulation_steps=accumulate, seed=seed)
    return Config(data=DataOptions(resolution=64, num_workers=workers, **data), train=train)


def batches(
    prepared: Prepared, options: Config, *, rank: int = 0, world: int = 1, start: int = 0, stop: int = 3
) -> Any:
    steps = {"start_step": start, "stop_step": stop}
    return list(make_batches(prepared, options, rank=rank, world=world, num_timesteps=1000, **steps))


def joined(parts: list[Batch]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([getattr(part, name) for part in parts]) for name in FIELDS}


def same(a: list[Batch], b: list[Batch]) -> bool:
    left, right = joined(a), joined(b)
    keys = [key for part in a for key in part.keys], [key for part in b for key in part.keys]
    return keys[0] == keys[1] and all(torch.equal(left[name], right[name]) for name in FIELDS)


def test_shapes_ranges_and_types(prepared: Prepared) -> None:
    [batch, *_] = batches(prepared, config())
    shapes = {name: tuple(getattr(batch, name).shape) for name in FIELDS}
    assert shapes == {
        "moments": (4, 8, 8, 8),
        "condition": (4, 3, 64, 64),
        "text": (4, 77, 48),
        "pooled": (4, 32),
        "time_ids": (4, 6),
        "timesteps": (4,),
        "noise": (4, 4, 8, 8),
        "latent_noise": (4, 4, 8, 8),
    }
    assert {getattr(batch, name).dtype for name in FIELDS if name not in ("time_ids", "timesteps")} == {torch.float32}
    assert batch.time_ids.dtype == batch.timesteps.dtype == torch.int64
    assert batch.condition.min() == 0
    assert batch.condition.max() == 1
    assert len(batch) == 4


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_batches(prepared: Prepared, workers: int) -> None:
    options = config(proportion_empty_prompts=0.3)
    many = replace(options, data=replace(options.data, num_workers=workers))
    assert same(batches(prepared, options, stop=6), batches(prepared, many, stop=6))


@pytest.mark.parametrize(("batch_size", "accumulate", "world"), [(2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 1, 4), (1, 2, 2)])
def test_a_global_batch_holds_the_same_draws_however_it_is_spread(
    prepared: Prepared, batch_size: int, accumulate: int, world: int
) -> None:
    whole = batches(prepared, config(batch_size=4), stop=5)
    spread = config(batch_size=batch_size, accumulate=accumulate)
    ranks = [batches(prepared, spread, rank=rank, world=world, stop=5) for rank in range(world)]
    assert same(whole, [part for micro in zip(*ranks, strict=True) for part in micro])


def test_a_run_that_starts_later_gets_what_the_straight_run_got(prepared: Prepared) -> None:
    options = config(accumulate=2, batch_size=3)
    straight = batches(prepared, options, stop=6)
    assert same(straight[8:], batches(prepared, options, start=4, stop=6))


def test_another_seed_is_another_run_and_lr_is_not(prepared: Prepared) -> None:
    options = config()
    assert not same(batches(prepared, options), batches(prepared, config(seed=6)))
    assert same(batches(prepared, options), batches(prepared, replace(options, optim=replace(options.optim, lr=1.0))))


def test_torch_s_global_generator_is_left_alone(prepared: Prepared) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(prepared, config())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_data_set_smaller_than_the_global_batch_is_enough(prepared: Prepared) -> None:
    [batch] = batches(prepared, config(batch_size=20), stop=1)
    counts = Counter(batch.keys)
    assert len(counts) == 7
    assert set(counts.values()) == {2, 3}, "two whole epochs and six of the third"
    assert len({noise.sum().item() for noise in batch.noise}) == 20


def test_every_epoch_is_another_permutation() -> None:
    epochs = [[sample_of(epoch * 50 + place, 50, seed=1) for place in range(50)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [sample_of(place, 50, seed=2) for place in range(50)] != epochs[0]


def test_draws_cover_every_step_once() -> None:
    def step(number: int, batch_size: int, accumulate: int, world: int) -> list[int]:
        return [
            draw
            for micro in range(accumulate)
            for rank in range(world)
            for draw in draws_of(number, micro, rank, batch_size=batch_size, accumulate=accumulate, world=world)
        ]

    for cut in ((8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)):
        assert step(3, *cut) == list(range(24, 32))


def test_choices_are_a_function_of_seed_and_draw_alone() -> None:
    one, again = choose(1, 7, (16, 16)), choose(1, 7, (16, 16))
    assert np.array_equal(one.noise, again.noise)
    assert one.timestep == again.timestep
    for other in (choose(1, 8, (16, 16)), choose(2, 7, (16, 16)), choose(7, 1, (16, 16))):
        assert not np.array_equal(one.noise, other.noise)
        assert one.timestep != other.timestep
    larger = choose(1, 7, (32, 32))
    assert (larger.caption, larger.drop, larger.timestep) == (one.caption, one.drop, one.timestep)


def test_the_noise_is_standard_normal_and_the_two_are_independent() -> None:
    draws = [choose(3, draw, (32, 32)) for draw in range(64)]
    noise, latent = (np.stack([getattr(draw, name) for draw in draws]) for name in ("noise", "latent_noise"))
    for values in (noise, latent):
        assert values.dtype == np.float32
        assert abs(values.mean()) < 5 / np.sqrt(values.size)  # five standard errors
        assert abs(values.var() - 1) < 5 * np.sqrt(2 / values.size)
    assert abs((noise * latent).mean()) < 5 / np.sqrt(noise.size)
    uniform = np.array([draw.timestep for draw in draws])
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 5 / np.sqrt(12 * 64)


def test_the_noise_offset_is_a_constant_a_channel_and_changes_nothing_else() -> None:
    plain, offset = choose(1, 7, (16, 16)), choose(1, 7, (16, 16), noise_offset=0.1)
    difference = offset.noise - plain.noise
    assert np.ptp(difference, axis=(1, 2)).max() < 1e-6
    assert np.abs(difference).max() > 0
    assert np.array_equal(plain.latent_noise, offset.latent_noise)


def test_captions_are_drawn_and_dropped_batch_by_batch(prepared: Prepared) -> None:
    empty = prepared.text(prepared.text_key("")).pooled
    disc = prepared.text(prepared.text_key("a disc")).pooled

    def share(options: Config, pooled: np.ndarray) -> float:
        parts = joined(batches(prepared, options, stop=50))["pooled"]
        return (parts == torch.from_numpy(pooled.astype(np.float32))).all(dim=1).float().mean().item()

    spread = 5 / np.sqrt(4 * 200)  # five standard errors of a share near a half, 200 draws
    assert share(config(), empty) == 0
    assert share(config(proportion_empty_prompts=1.0), empty) == 1
    assert abs(share(config(proportion_empty_prompts=0.4), empty) - 0.4) < spread
    assert abs(share(config(), disc) - 0.5) < spread
    drawn = [set(), set()]
    for batch in batches(prepared, config(), stop=14):
        for key, pooled in zip(batch.keys, batch.pooled, strict=True):
            drawn[key == "train/00000.png"].add(pooled.sum().item())
    assert len(drawn[1]) == 2, "one pair shows both of its captions in the course of a run"


def test_timesteps_follow_the_sampler_of_the_options(prepared: Prepared) -> None:
    def mean(name: Any) -> float:
        options = replace(config(), objective=ObjectiveOptions(timesteps=name))
        return joined(batches(prepared, options, stop=100))["timesteps"].double().mean().item()

    assert abs(mean("cubic") - 750) < 5 * 230 / 20  # five standard errors of 400 draws
    assert abs(mean("uniform") - 500) < 5 * 289 / 20


def test_time_ids_are_each_picture_s_own_plus_the_stated_crop(tiny_base: Path, tmp_path: Path) -> None:
    from PIL import Image

    data = write_circles(tmp_path / "data", num=2, size=64)
    for name in ("00001.png", "00001_outline.png"):
        path = data / "train" / name
        Image.open(path).resize((192, 96)).save(path)
    prepared = prepare_at(data, tiny_base, tmp_path / "root")
    options = config(batch_size=2, crops_coords_top_left_h=3, crops_coords_top_left_w=5)
    [batch] = batches(prepared, options, stop=1)
    ids = dict(zip(batch.keys, batch.time_ids.tolist(), strict=True))
    assert ids == {"train/00000.png": [64, 64, 3, 5, 64, 64], "train/00001.png": [96, 192, 3, 32 + 5, 64, 64]}


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_one_line_whichever_process_meets_it(
    data: Path, tiny_base: Path, tmp_path: Path, workers: int
) -> None:
    prepared = prepare_at(data, tiny_base, tmp_path)
    [shard] = tmp_path.glob("images/*/*.shard")
    shard.write_bytes(b"\0" * 4000 + shard.read_bytes()[4000:])
    with pytest.raises(UserError, match="cannot be read") as fault:
        batches(prepared, config(workers=workers))
    assert "Traceback" not in str(fault.value)
    assert str(shard) in str(fault.value)
