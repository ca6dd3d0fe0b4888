"""The order of a run: every row once an epoch, few shards at a time, and any draw found in constant time."""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from t2i_adapter.batches.order import BLOCK_ROWS, BLOCK_STEPS, WINDOW_SHARDS, Order, draws_of, turn_of


def split(count: int, shares: list[float]) -> tuple[np.ndarray, ...]:
    """Sample numbers in groups of about these shares."""
    which = np.random.default_rng(0).choice(len(shares), count, p=shares)
    return tuple(np.flatnonzero(which == group) for group in range(len(shares)))


def whole(count: int) -> tuple[np.ndarray, ...]:
    return (np.arange(count),)


def numbers(order: Order, draws: range) -> list[int]:
    return [order.number(draw) for draw in draws]


@pytest.mark.parametrize("seed", [0, 5, 2**62])
def test_one_group_of_one_shard_keeps_the_order_that_runs_have_always_had(seed: int) -> None:
    order = Order(whole(50), (50,), seed, global_batch=4)
    expected = np.concatenate([np.random.default_rng([0, seed, epoch]).permutation(50) for epoch in range(4)])
    assert numbers(order, range(200)) == expected.tolist()


SHARDS = {
    "one": (5000,),
    "two": (2400, 2600),
    "of a block and a row": (BLOCK_ROWS + 1, BLOCK_ROWS, 1, BLOCK_ROWS - 1, 5000 - 3 * BLOCK_ROWS - 1),
    "many": (100,) * 50,
    "uneven": (1, 2, 3, 4000, 5, 6, 7, 8, 9, 900, 59),
}


@pytest.mark.parametrize("shards", SHARDS.values(), ids=SHARDS)
def test_every_epoch_has_every_row_once_in_another_order(shards: tuple[int, ...]) -> None:
    assert sum(shards) == 5000
    order = Order(whole(5000), shards, seed=1, global_batch=8)
    epochs = [numbers(order, range(epoch * 5000, (epoch + 1) * 5000)) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(5000)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert numbers(Order(whole(5000), shards, seed=2, global_batch=8), range(5000)) not in epochs


def test_within_a_group_every_epoch_has_every_row_once_and_a_step_is_of_one_group() -> None:
    groups = split(2000, [0.5, 0.3, 0.15, 0.05])
    order = Order(groups, (700, 600, 700), seed=3, global_batch=16)
    draws: dict[int, list[int]] = {group: [] for group in range(4)}
    for step in range(600):
        places = [order.place(draw) for draw in range(step * 16, (step + 1) * 16)]
        [group] = {group for group, _ in places}
        draws[group] += [int(groups[group][index]) for _, index in places]
    for group, members in enumerate(groups):
        size = len(members)
        epochs = len(draws[group]) // size
        assert epochs >= 4
        for epoch in range(epochs):
            assert sorted(draws[group][epoch * size : (epoch + 1) * size]) == members.tolist()


def test_groups_take_turns_in_proportion_to_their_size_everywhere_in_a_run() -> None:
    sizes = (10_070, 5810, 3110, 990, 10)
    counts = Counter[int]()
    for step in range(100 * BLOCK_STEPS):
        group, turn = turn_of(step, sizes, seed=4)
        assert turn == counts[group], "a group's turns are numbered without a gap"
        counts[group] += 1
        if (step + 1) % BLOCK_STEPS == 0:
            for g, size in enumerate(sizes):
                assert abs(counts[g] - (step + 1) * size / sum(sizes)) < 2
    assert counts[4] >= 2, "the smallest group has its turns too"


def test_the_groups_turns_are_shuffled_and_another_seed_is_another_order() -> None:
    sizes = (50, 50)
    turns = [[turn_of(step, sizes, seed)[0] for step in range(4 * BLOCK_STEPS)] for seed in (1, 2)]
    assert turns[0] != turns[1]
    for row in turns:
        changes = sum(a != b for a, b in pairwise(row))
        assert 0.3 < changes / len(row) < 0.7, "neither in long runs nor strictly to and fro"


def test_draws_are_the_same_for_any_cut_of_a_global_batch_and_any_start() -> None:
    groups, shards = split(3000, [0.6, 0.4]), (1000,) * 3

    def drawn(batch_size: int, accumulate: int, world: int, steps: list[int]) -> list[int]:
        order = Order(groups, shards, 7, batch_size * accumulate * world)
        cut = {"batch_size": batch_size, "accumulate": accumulate, "world": world}
        return [
            order.number(draw)
            for step in steps
            for micro in range(accumulate)
            for rank in range(world)
            for draw in draws_of(step, micro, rank, **cut)
        ]

    steps = list(range(150))
    expected = drawn(8, 1, 1, steps)
    for cut in ((2, 4, 1), (2, 2, 2), (1, 1, 8)):
        assert drawn(*cut, steps) == expected
    assert drawn(8, 1, 1, [140, 20, 141]) == [*expected[1120:1128], *expected[160:168], *expected[1128:1136]]


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


def test_with_shards_few_are_read_from_at_a_time_and_each_block_as_a_whole() -> None:
    rows, shards = 4 * BLOCK_ROWS, 40
    order = Order(whole(rows * shards), (rows,) * shards, seed=1, global_batch=8)
    drawn = np.array(numbers(order, range(rows * shards)))
    for first in range(0, len(drawn), rows * WINDOW_SHARDS):
        assert len(set(drawn[first : first + rows * WINDOW_SHARDS] // rows)) == WINDOW_SHARDS
    for first in range(0, len(drawn), BLOCK_ROWS):
        block = drawn[first : first + BLOCK_ROWS]
        assert len(set(block // BLOCK_ROWS)) == 1
        assert np.abs(np.corrcoef(block, np.arange(BLOCK_ROWS))[0, 1]) < 0.2, "and its rows are shuffled"
    blocks = drawn[::BLOCK_ROWS] // BLOCK_ROWS
    assert np.mean(np.diff(blocks) == 1) < 0.1, "blocks of a window are mixed"


MILLION = 1_000_000
LARGE: dict[str, Callable[[], tuple[tuple[np.ndarray, ...], tuple[int, ...]]]] = {
    "one shard": lambda: (whole(MILLION), (MILLION,)),
    "a thousand shards": lambda: (whole(MILLION), (1000,) * 1000),
    "shards and buckets": lambda: (split(MILLION, [0.025] * 40), (1000,) * 1000),
}


@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE)
def test_any_draw_of_a_million_rows_is_found_in_well_under_a_second(
    make: Callable[[], tuple[tuple[np.ndarray, ...], tuple[int, ...]]],
) -> None:
    groups, shards = make()
    start = time.process_time()
    order = Order(groups, shards, 1, global_batch=64)
    numbers(order, range(14_400_000, 14_400_064))  # in the fifteenth epoch
    first = time.process_time() - start
    start = time.process_time()
    numbers(order, range(14_400_064, 14_410_064))
    each = (time.process_time() - start) / 10_000
    print(f"first 64 draws {first * 1e3:.1f} ms, then {each * 1e6:.1f} us a draw")
    assert first < 0.5
    assert each < 2e-4


def test_shards_need_no_array_of_all_rows() -> None:
    groups, shards = LARGE["a thousand shards"]()
    tracemalloc.start()
    numbers(Order(groups, shards, 1, global_batch=64), range(900_000, 900_064))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
