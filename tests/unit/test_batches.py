"""The random choices of a run do not depend on processes, loader workers, or how a global batch is divided."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from t2i_adapter.batches.choices import MAX_BAD_ROWS, choose, choose_view
from t2i_adapter.batches.loader import MicroBatches, make_partial_batches
from t2i_adapter.batches.packing import Packed, unpack
from t2i_adapter.config.read import with_values
from t2i_adapter.config.tree import Config, DataOptions, ObjectiveOptions, TrainOptions
from t2i_adapter.errors import UserError
from t2i_adapter.types import Geometry, ImageRecord, PartialBatch, TextRecord

TENSORS = ("moments", "pixels", "condition", "text", "pooled", "time_ids", "timesteps", "noise", "latent_noise")
SQUARE = (64, 64)


@dataclass(frozen=True)
class Memory:
    """A dataset that lies in memory, each array a function of its number: random, so that no two are alike.

    sizes: each sample's crop. live: captions that are to be encoded. encoded: whether there are moments. bad: rows that
    cannot be read. untold: rows without a caption. grey: conditions whose three channels are one.
    """

    sizes: Sequence[tuple[int, int]] = (SQUARE,) * 7
    views: int = 1
    live: frozenset[str] = frozenset()
    encoded: bool = True
    bad: frozenset[int] = frozenset()
    untold: frozenset[int] = frozenset()
    grey: bool = False
    shards: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "shards", self.shards or (len(self.sizes),))

    @property
    def groups(self) -> tuple[np.ndarray, ...]:
        sizes = np.array([height * 10_000 + width for height, width in self.sizes])
        return tuple(np.flatnonzero(sizes == size) for size in np.unique(sizes))

    def __len__(self) -> int:
        return len(self.sizes)

    def key(self, number: int) -> str:
        return f"row {number}"

    def fetch(self, number: int, view: int, draw: str = "") -> ImageRecord:
        if number in self.bad:
            raise UserError(f"row {number}: damaged picture")
        generator = np.random.default_rng([number, view])
        height, width = self.sizes[number]
        condition = generator.integers(0, 256, (1 if self.grey else 3, height, width), dtype=np.uint8)
        return ImageRecord(
            moments=generator.random((8, height // 8, width // 8)).astype(np.float16) if self.encoded else None,
            condition=np.broadcast_to(condition, (3, height, width)),
            geometry=Geometry((height * 2, width * 3), (height, width + 10), (view, 4), (height, width)),
            pixels=None if self.encoded else generator.integers(0, 256, (3, height, width), dtype=np.uint8),
        )

    def captions(self, number: int) -> tuple[str, ...]:
        if number in self.untold:
            raise UserError(f"row {number}: there is no caption")
        return f"row {number}", "a disc, round, red"

    def text(self, caption: str) -> TextRecord | None:
        if caption in self.live:
            return None
        generator = np.random.default_rng(list(caption.encode()))
        return TextRecord(*(generator.random(shape).astype(np.float16) for shape in ((77, 48), (32,))))


def config(*, workers: int = 0, batch_size: int = 4, accumulate: int = 1, seed: int = 5, **data: Any) -> Config:
    train = TrainOptions(batch_size=batch_size, gradient_accumulation_steps=accumulate, seed=seed)
    return Config(data=DataOptions(resolution=64, num_workers=workers, **data), train=train)


def drafts(
    dataset: Memory, options: Config, *, rank: int = 0, world: int = 1, start: int = 0, stop: int = 3
) -> list[PartialBatch]:
    steps = {"start_step": start, "stop_step": stop}
    return list(make_partial_batches(dataset, options, rank=rank, world=world, num_timesteps=1000, **steps))


def rows(parts: list[PartialBatch]) -> list[dict[str, Any]]:
    """The samples of all batches, one by one."""
    return [
        {name: value[index] for name, value in vars(part).items() if value is not None and name != "bad"}
        for part in parts
        for index in range(len(part.keys))
    ]


def same(a: list[PartialBatch], b: list[PartialBatch]) -> bool:
    def equal(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y

    left, right = rows(a), rows(b)
    return len(left) == len(right) and all(
        x.keys() == y.keys() and all(equal(x[name], y[name]) for name in x) for x, y in zip(left, right, strict=True)
    )


def test_shapes_and_types_are_those_that_are_stored() -> None:
    [draft, *_] = drafts(Memory(), config())
    shapes = {name: (tuple(t.shape), t.dtype) for name in TENSORS if (t := getattr(draft, name)) is not None}
    assert shapes == {
        "moments": ((4, 8, 8, 8), torch.float16),
        "condition": ((4, 3, 64, 64), torch.uint8),
        "text": ((4, 77, 48), torch.float16),
        "pooled": ((4, 32), torch.float16),
        "time_ids": ((4, 6), torch.int64),
        "timesteps": ((4,), torch.int64),
        "noise": ((4, 4, 8, 8), torch.float32),
        "latent_noise": ((4, 4, 8, 8), torch.float32),
    }


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("grey", [False, True])
def test_every_sample_carries_its_own_records(workers: int, grey: bool) -> None:
    facts = Memory(sizes=[(64, 64), (32, 128), (64, 64), (32, 128), (64, 64)], views=2, grey=grey)
    for row in rows(drafts(facts, config(workers=workers), stop=8)):
        number, view = int(row["keys"].split()[-1]), int(row["time_ids"][2])
        record, text = facts.fetch(number, view), facts.text(row["captions"])
        assert record.moments is not None and text is not None
        assert np.array_equal(row["moments"].numpy(), record.moments)
        assert np.array_equal(row["condition"].numpy(), record.condition)
        assert np.array_equal(row["text"].numpy(), text.states)
        assert np.array_equal(row["pooled"].numpy(), text.pooled)
        assert row["captions"] in facts.captions(number)
        assert row["time_ids"].tolist() == list(record.geometry.time_ids())


def test_a_grey_condition_travels_as_one_channel() -> None:
    [draft, *_] = drafts(Memory(grey=True), config())
    assert draft.condition.shape == (4, 3, 64, 64)
    assert draft.condition.stride(1) == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(workers: int) -> None:
    facts = Memory(sizes=[(64, 64), (64, 64), (96, 32), (32, 128)] * 3, views=3, shards=(5, 7))
    options = config(proportion_empty_prompts=0.3, shuffle_tags=True)
    many = replace(options, data=replace(options.data, num_workers=workers))
    assert same(drafts(facts, options, stop=20), drafts(facts, many, stop=20))


@pytest.mark.parametrize(("batch_size", "accumulate", "world"), [(2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 1, 4), (1, 2, 2)])
def test_a_global_batch_holds_the_same_draws_however_it_is_spread(batch_size: int, accumulate: int, world: int) -> None:
    facts = Memory(sizes=[(64, 64)] * 5 + [(32, 128)] * 4, views=2, shards=(4, 5))
    whole = drafts(facts, config(batch_size=4), stop=5)
    spread = config(batch_size=batch_size, accumulate=accumulate)
    ranks = [drafts(facts, spread, rank=rank, world=world, stop=5) for rank in range(world)]
    assert same(whole, [part for micro in zip(*ranks, strict=True) for part in micro])


def test_a_run_that_starts_later_gets_what_the_straight_run_got() -> None:
    facts = Memory(sizes=[(64, 64)] * 5 + [(32, 128)] * 4, views=2, shards=(4, 5))
    options = config(accumulate=2, batch_size=3)
    assert same(drafts(facts, options, stop=6)[8:], drafts(facts, options, start=4, stop=6))


def test_the_batch_builder_can_be_pickled() -> None:
    builder = MicroBatches(Memory(views=2, shards=(3, 4)), config(), 4, 1000, pin=False)
    sent = pickle.loads(pickle.dumps(builder))
    one, other = (part[range(8, 12)] for part in (builder, sent))
    assert isinstance(one, Packed) and isinstance(other, Packed)
    assert same([unpack(one, {}, Memory().key, pin=False)], [unpack(other, {}, Memory().key, pin=False)])


def test_another_seed_is_another_run_and_lr_is_not() -> None:
    options = config()
    assert not same(drafts(Memory(), options), drafts(Memory(), config(seed=6)))
    assert same(drafts(Memory(), options), drafts(Memory(), replace(options, optim=replace(options.optim, lr=1.0))))


def test_torch_s_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    drafts(Memory(), config())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_data_set_smaller_than_the_global_batch_is_enough() -> None:
    [draft] = drafts(Memory(), config(batch_size=20), stop=1)
    counts = Counter(draft.keys)
    assert len(counts) == 7
    assert set(counts.values()) == {2, 3}, "two whole epochs and six of the third"
    assert len({noise.sum().item() for noise in draft.noise}) == 20


def test_a_batch_is_of_one_size_and_every_size_has_its_turns() -> None:
    facts = Memory(sizes=[(64, 64)] * 6 + [(32, 128)] * 3 + [(128, 32)])
    parts = drafts(facts, config(), stop=40)
    shapes = Counter(tuple(part.condition.shape[-2:]) for part in parts)
    assert 22 <= shapes[(64, 64)] <= 26
    assert 10 <= shapes[(32, 128)] <= 14
    assert 2 <= shapes[(128, 32)] <= 6
    for part in parts:
        assert part.moments is not None
        assert (
            part.noise.shape[-2:]
            == part.moments.shape[-2:]
            == (part.condition.shape[-2] // 8, part.time_ids[0, 5] // 8)
        )


def test_choices_are_a_function_of_seed_and_draw_alone() -> None:
    one, again = choose(1, 7, (16, 16)), choose(1, 7, (16, 16))
    assert np.array_equal(one.noise, again.noise)
    assert one.timestep == again.timestep
    for other in (choose(1, 8, (16, 16)), choose(2, 7, (16, 16)), choose(7, 1, (16, 16))):
        assert not np.array_equal(one.noise, other.noise)
        assert one.timestep != other.timestep
    larger = choose(1, 7, (32, 32))
    assert (larger.caption, larger.drop, larger.timestep) == (one.caption, one.drop, one.timestep)
    assert choose_view(1, 7) == choose_view(1, 7) != choose_view(1, 8)


def test_a_run_without_newer_options_draws_the_numbers_of_earlier_releases() -> None:
    """Compares the numbers with the rule of earlier releases."""
    facts = Memory()
    for draw, row in enumerate(rows(drafts(facts, config(), stop=4))):
        generator = np.random.Generator(np.random.PCG64([1, 5, draw]))
        caption, _, timestep = generator.random(3)
        generator.standard_normal((4, 1, 1), dtype=np.float32)
        noise, latent_noise = generator.standard_normal((2, 4, 8, 8), dtype=np.float32)
        number = np.random.default_rng([0, 5, draw // 7]).permutation(7)[draw % 7]
        assert row["keys"] == f"row {number}"
        assert row["captions"] == facts.captions(number)[int(caption * 2)]
        assert row["timesteps"] == int((1 - timestep**3) * 1000)
        assert np.array_equal(row["noise"].numpy(), noise)
        assert np.array_equal(row["latent_noise"].numpy(), latent_noise)


def test_the_newer_options_leave_all_other_choices_as_they_are() -> None:
    plain = rows(drafts(Memory(), config()))
    changed = rows(drafts(Memory(views=4), config(shuffle_tags=True, caption_prefix="sks, ")))
    for name in ("noise", "latent_noise", "timesteps"):
        assert all(torch.equal(a[name], b[name]) for a, b in zip(plain, changed, strict=True))
    rows_drawn = [[row["keys"] for row in part] for part in (plain, changed)]
    assert rows_drawn[0] == rows_drawn[1]


def test_every_view_is_drawn_as_often() -> None:
    views = Counter(int(row["time_ids"][2]) for row in rows(drafts(Memory(views=4), config(batch_size=50), stop=40)))
    assert set(views) == {0, 1, 2, 3}
    assert max(abs(count - 500) for count in views.values()) < 5 * np.sqrt(2000 * 0.25 * 0.75)


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


def test_the_noise_offset_reaches_the_batches() -> None:
    plain, options = config(), replace(config(), objective=ObjectiveOptions(noise_offset=0.5))
    [a], [b] = drafts(Memory(), plain, stop=1), drafts(Memory(), options, stop=1)
    assert (a.noise - b.noise).abs().max() > 0.05
    assert torch.equal(a.latent_noise, b.latent_noise)


def drawing(draws: int, *, stratify: bool = False, timesteps: str = "uniform", **options: Any) -> Config:
    plain = config(**options)
    changes = {"train.noise_draws": draws, "objective.stratify": stratify, "objective.timesteps": timesteps}
    return with_values(plain, changes)


@pytest.mark.parametrize("workers", [0, 1])
def test_several_draws_of_noise_follow_the_first_and_share_its_sample(workers: int) -> None:
    single, several = drafts(Memory(), drawing(1)), drafts(Memory(), drawing(3, workers=workers))
    for one, many in zip(single, several, strict=True):
        assert list(many.keys) == list(one.keys) and many.captions == one.captions
        assert many.moments is not None and many.moments.shape == (4, 8, 8, 8)
        assert many.timesteps.shape == (12,) and many.noise.shape == many.latent_noise.shape == (12, 4, 8, 8)
        for name in ("timesteps", "noise", "latent_noise"):
            assert torch.equal(getattr(many, name)[::3], getattr(one, name)), "the first draw is the one there was"
    noise = torch.cat([part.noise for part in several]).flatten(1)
    correlation = torch.corrcoef(noise) - torch.eye(len(noise))
    assert correlation.abs().max() < 6 / np.sqrt(noise.shape[1]), "every draw has noise of its own"


@pytest.mark.parametrize("draws", [1, 3])
def test_stratified_timesteps_fill_every_part_once_an_update_and_keep_their_distribution(draws: int) -> None:
    steps, count = 200, 8 * draws
    parts = drafts(Memory(), drawing(draws, stratify=True, batch_size=8), stop=steps)
    timesteps = np.stack([part.timesteps.numpy() for part in parts])
    assert timesteps.shape == (steps, count)
    filled = np.sort(timesteps * count // 1000, axis=1)
    # a part's edge may lie within a timestep, whose number then counts for the part before it
    assert (np.abs(filled - np.arange(count)) <= (1000 % count != 0)).all()
    for place in range(count):
        values = timesteps[:, place] / 1000
        # Kolmogorov's bound at 1 in a million: each place alone is as evenly spread as an unstratified draw
        distance = np.abs(np.sort(values) - (np.arange(steps) + 0.5) / steps).max()
        assert distance < np.sqrt(np.log(2e6) / (2 * steps)), place
    assert len(np.unique(timesteps)) > 0.7 * 1000 * (1 - np.exp(-steps * count / 1000))


@pytest.mark.parametrize(("batch", "accumulate", "world"), [(2, 4, 1), (4, 1, 2), (1, 2, 4)])
def test_stratified_timesteps_do_not_depend_on_how_a_global_batch_is_cut(
    batch: int, accumulate: int, world: int
) -> None:
    whole = rows(drafts(Memory(), drawing(1, stratify=True, batch_size=8), stop=2))
    options = drawing(1, stratify=True, batch_size=batch, accumulate=accumulate)
    ranks = [drafts(Memory(), options, rank=rank, world=world, stop=2) for rank in range(world)]
    parts = rows([ranks[rank][micro] for micro in range(2 * accumulate) for rank in range(world)])
    assert [row["timesteps"] for row in parts] == [row["timesteps"] for row in whole]
    later = rows(drafts(Memory(), drawing(1, stratify=True, batch_size=8), start=1, stop=2))
    assert [row["timesteps"] for row in later] == [row["timesteps"] for row in whole[8:]]
    assert [row["timesteps"] for row in whole[:8]] != [row["timesteps"] for row in whole[8:]]


def test_stratifying_changes_no_other_choice() -> None:
    plain, spread = (rows(drafts(Memory(), drawing(1, stratify=stratify))) for stratify in (False, True))
    for name in ("noise", "latent_noise", "moments"):
        assert all(torch.equal(a[name], b[name]) for a, b in zip(plain, spread, strict=True))
    assert [row["timesteps"] for row in plain] != [row["timesteps"] for row in spread]


def test_captions_are_drawn_and_dropped_draw_by_draw() -> None:
    told = [row["captions"] for row in rows(drafts(Memory(), config(proportion_empty_prompts=0.25), stop=100))]
    assert abs(told.count("") / 400 - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 400)
    assert abs(told.count("a disc, round, red") / 400 - 0.375) < 5 * np.sqrt(0.375 * 0.625 / 400)
    kept = [row["captions"] for row in rows(drafts(Memory(), config(), stop=100))]
    assert all(a in ("", b) for a, b in zip(told, kept, strict=True)), "dropping changes no other choice"


def test_a_field_that_one_sample_does_not_have_is_encoded_for_all() -> None:
    options = config(batch_size=14)
    [draft] = drafts(Memory(live=frozenset(["row 3"])), options, stop=1)
    assert "row 3" in draft.captions
    assert draft.text is draft.pooled is None
    assert draft.moments is not None
    [draft] = drafts(Memory(encoded=False), options, stop=1)
    assert draft.moments is None
    assert draft.pixels is not None
    assert (draft.pixels.shape, draft.pixels.dtype) == ((14, 3, 64, 64), torch.uint8)
    assert draft.noise.shape == (14, 4, 8, 8)


def test_the_crop_s_offset_is_added_to_the_true_corner() -> None:
    [plain], [moved] = (
        drafts(Memory(), config(**extra), stop=1)
        for extra in ({}, {"crops_coords_top_left_h": 3, "crops_coords_top_left_w": -5})
    )
    assert (moved.time_ids - plain.time_ids).tolist() == [[0, 0, 3, -5, 0, 0]] * 4
    assert plain.time_ids[0].tolist() == [128, 192, 0, 4, 64, 64]


SKIP = {"on_bad_sample": "skip", "cache": "none"}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_row_s_place_is_taken_by_the_next_of_its_group_and_it_is_reported(workers: int) -> None:
    sizes = [(64, 64), (32, 128), (64, 64), (32, 128), (64, 64)]
    good, bad = Memory(sizes), Memory(sizes, bad=frozenset([2]), untold=frozenset([3]))
    options = config(workers=workers, **SKIP)
    expected, got = drafts(good, options, stop=10), drafts(bad, options, stop=10)
    reported = []
    for a, b in zip(rows(expected), rows(got), strict=True):
        row, taken = (int(part["keys"].split()[1]) for part in (a, b))
        assert taken == {2: 4, 3: 1}.get(row, row)
        assert torch.equal(a["noise"], b["noise"])
        if row in (2, 3):
            reported.append((row, f"row {row}: {'damaged picture' if row == 2 else 'there is no caption'}"))
    assert [entry for draft in got for entry in draft.bad] == reported
    assert {row for row, _ in reported} == {2, 3}
    assert all(draft.bad == () for draft in expected)


@pytest.mark.parametrize("options", [{}, {"on_bad_sample": "skip"}, {"cache": "none"}])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_cannot_be_read_ends_the_run_if_it_may_not_be_skipped(options: dict[str, Any], workers: int) -> None:
    with pytest.raises(UserError, match="^row 2: damaged picture$"):
        drafts(Memory(bad=frozenset([2])), config(workers=workers, **options))


def test_a_source_that_is_gone_is_not_searched_to_its_end() -> None:
    facts = Memory(sizes=(SQUARE,) * 1000, bad=frozenset(range(1000)))
    with pytest.raises(UserError, match=f"{MAX_BAD_ROWS} rows one after another cannot be read. The last of them: row"):
        drafts(facts, config(**SKIP))
