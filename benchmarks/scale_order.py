"""Statistics of the order of a run at a million rows: how far the shuffle over shards is from any permutation.

For each layout, over one epoch:

    every_row_once         whether it is a permutation
    shards_a_batch         distinct shards that a batch of BATCH draws touches, mean; `any` is what a uniform order has
    neighbours_a_batch     pairs of rows of one batch that are stored side by side, mean; and for a uniform order
    between_batches        share of the variance of the rows' storage places that lies between batches: 1 / BATCH for a
                           uniform order, 1 if a batch is one place
    neighbours_apart       median number of draws between two rows that are stored side by side, as a share of the
                           epoch: 0.29 for a uniform order
    next_epoch             correlation of a row's places in this epoch and the next, and what chance makes (95 %)

`chi_square`: counts of a table against equal ones, its degrees of freedom, and the interval that holds 95 % of such
values by chance. `rows` is over the place that a row of a block gets in it, `shards` over the window that a shard gets
in an epoch, `large` over the place that a row of a very large table gets (`LargePermutation`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from t2i_adapter.batches.order import BLOCK_ROWS, LARGE_ROWS, WINDOW_SHARDS, LargePermutation, Order

ROWS, BATCH = 1_000_000, 64
LAYOUTS = {"one table": (ROWS,), "100 shards": (ROWS // 100,) * 100, "1,000 shards": (ROWS // 1000,) * 1000}
CELLS = 16
EPOCHS = 400


def epoch(order: Order, number: int, rows: int) -> np.ndarray:
    """(rows,): the rows of an epoch, in the order of their draws."""
    return np.array([order.number(draw) for draw in range(number * rows, (number + 1) * rows)])


def of_layout(shards: tuple[int, ...]) -> dict[str, Any]:
    order = Order((np.arange(ROWS),), shards, 0, BATCH)
    drawn, later = epoch(order, 0, ROWS), epoch(order, 1, ROWS)
    places, later_places = np.argsort(drawn), np.argsort(later)
    batches = drawn[: ROWS // BATCH * BATCH].reshape(-1, BATCH)
    stored_in = np.searchsorted(np.cumsum(shards), batches, side="right")
    count = len(shards)
    side_by_side = (np.diff(np.sort(batches, axis=1), axis=1) == 1).sum(axis=1)
    return {
        "every_row_once": bool((np.bincount(drawn, minlength=ROWS) == 1).all()),
        "shards_a_batch": round(float(np.mean([len(set(row)) for row in stored_in.tolist()])), 2),
        "shards_a_batch_any": round(count * (1 - (1 - 1 / count) ** BATCH), 2),
        "neighbours_a_batch": round(float(side_by_side.mean()), 3),
        "neighbours_a_batch_any": round(BATCH * (BATCH - 1) / ROWS, 3),
        "between_batches": round(float(batches.mean(axis=1).var() / drawn.var()), 3),
        "neighbours_apart": round(float(np.median(np.abs(np.diff(places)))) / ROWS, 4),
        "next_epoch": round(float(np.corrcoef(places, later_places)[0, 1]), 4),
        "next_epoch_chance": round(1.96 / math.sqrt(max(1, count if count > 1 else ROWS)), 4),
    }


def chi_square(counts: np.ndarray, *, all_places: bool) -> dict[str, Any]:
    """Of a table of rows by places. all_places: every place was taken as often as any other, as by whole permutations;
    then the sums of the columns are fixed like those of the rows."""
    expected = counts.sum() / counts.size
    value = float(((counts - expected) ** 2 / expected).sum())
    free = (counts.shape[0] - all_places) * (counts.shape[1] - 1)
    low, high = (free * (1 - 2 / (9 * free) + z * math.sqrt(2 / (9 * free))) ** 3 for z in (-1.96, 1.96))
    return {"value": round(value, 1), "freedom": free, "chance": [round(low, 1), round(high, 1)]}


def rows_of_blocks() -> np.ndarray:
    """How often a row of the CELLS-th of its block got a place of the CELLS-th: (CELLS,CELLS)."""
    shards = (BLOCK_ROWS,) * 64
    order, counts = Order((np.arange(sum(shards)),), shards, 0, BATCH), np.zeros((CELLS, CELLS))
    for number in range(8):
        drawn = epoch(order, number, sum(shards)).reshape(-1, BLOCK_ROWS) % BLOCK_ROWS
        cell, place = drawn * CELLS // BLOCK_ROWS, np.arange(BLOCK_ROWS) * CELLS // BLOCK_ROWS
        np.add.at(counts, (cell, np.broadcast_to(place, cell.shape)), 1)
    return _of_draws(counts, BLOCK_ROWS)


def windows_of_shards() -> np.ndarray:
    """How often each of 64 shards was in each of the 8 windows of an epoch: (64,8)."""
    shards, windows = (4,) * 64, 64 // WINDOW_SHARDS
    order, counts = Order((np.arange(sum(shards)),), shards, 0, 4), np.zeros((64, windows))
    for number in range(EPOCHS):
        drawn = epoch(order, number, sum(shards)) // 4
        for window, row in enumerate(drawn.reshape(windows, -1)):
            counts[np.unique(row), window] += 1
    return _of_draws(counts, 64)


def places_of_large() -> np.ndarray:
    """How often one of the first rows, by CELLS-ths of 4,096, got a place in the CELLS-ths of a very large table."""
    rows, size = 4096, LARGE_ROWS + 1
    counts = np.zeros((CELLS, CELLS))
    for seed in range(16):
        permutation = LargePermutation(size, [0, seed])
        found = np.array([permutation[place] for place in range(rows)])
        np.add.at(counts, (np.arange(rows) * CELLS // rows, found * CELLS // size), 1)
    return counts


def _of_draws(counts: np.ndarray, size: int) -> np.ndarray:
    """A table of permutations of `size` varies more than one of independent draws: by size / (size - 1)."""
    expected = counts.sum() / counts.size
    return expected + (counts - expected) * math.sqrt((size - 1) / size)


def measure() -> dict[str, Any]:
    found: dict[str, Any] = {name: of_layout(shards) for name, shards in LAYOUTS.items()}
    tables = {"rows": rows_of_blocks(), "shards": windows_of_shards(), "large": places_of_large()}
    found["chi_square"] = {name: chi_square(table, all_places=name != "large") for name, table in tables.items()}
    return found
