"""Which sample each draw of a run takes, and which draws form a micro-batch.

A run is one endless row of draws, numbered from 0; step s takes the `global_batch` draws from s * global_batch on. All
samples of a step have one crop size, so a step belongs to one group of samples. The draws of a group's steps, one step
after another, form endless epochs, each a permutation of the group. Everything is a function of (seed, draw): nothing
depends on processes, loader workers or how a global batch is cut up, and a run that goes on needs its step alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

EPOCH_STREAM, DRAW_STREAM, VIEW_STREAM, GROUP_STREAM, SHARD_STREAM, AGAIN_STREAM, STRATA_STREAM = range(7)
"""First word of every generator's key, so that no two purposes ever share a row of numbers."""

BLOCK_ROWS = 1024
"""Rows of a shard that are read one after another, in an order of their own."""
WINDOW_SHARDS = 8
"""Shards whose blocks are mixed: so many are read from at a time."""
BLOCK_STEPS = 64
"""Steps among which the groups' turns are shuffled; over the run no group is ever more than about one such block's
worth of steps ahead of its share."""


class Order:
    """The order of a run's samples.

    Args:
        groups: sample numbers by crop size, each ascending, as in `PairDataset`.
        shards: rows that lie together in storage, in order. With one, an epoch permutes its group freely; with
            several it goes from block to block, so that few shards are read at a time.
        seed: draws everything.
        global_batch: draws a step.
    """

    def __init__(self, groups: Sequence[np.ndarray], shards: Sequence[int], seed: int, global_batch: int) -> None:
        self._sizes = tuple(len(group) for group in groups)
        ends = np.cumsum(shards)
        assert sum(self._sizes) == ends[-1] > 0
        self._groups = groups
        self._shards = [_shares(group, ends) for group in groups]
        self._seed = seed
        self._global_batch = global_batch
        self._epochs: OrderedDict[tuple[int, int], np.ndarray | ShardwisePermutation] = OrderedDict()

    def place(self, draw: int) -> tuple[int, int]:
        """Group of draw `draw`'s sample, and the sample's index in `groups[group]`."""
        step, within = divmod(draw, self._global_batch)
        group, turn = turn_of(step, self._sizes, self._seed)
        epoch, position = divmod(turn * self._global_batch + within, self._sizes[group])
        return group, int(self._epoch(group, epoch)[position])

    def number(self, draw: int) -> int:
        """Number of the sample that draw `draw` takes."""
        group, index = self.place(draw)
        return int(self._groups[group][index])

    def stratified(self, draw: int, quantiles: Sequence[float]) -> list[float]:
        """The draw's numbers in [0,1), each moved into a part of [0,1) of its own: a step has as many equal parts as
        numbers, and gives them out by chance, so that each number alone is as evenly spread as before."""
        step, within = divmod(draw, self._global_batch)
        count = len(quantiles)
        parts = strata(step, self._global_batch * count, self._seed)
        mine = parts[within * count : (within + 1) * count]
        return [(int(part) + quantile) / len(parts) for part, quantile in zip(mine, quantiles, strict=True)]

    def _epoch(self, group: int, epoch: int) -> np.ndarray | ShardwisePermutation:
        """The last few are kept: a step may reach over an epoch's end, and groups take turns."""
        key = group, epoch
        if key not in self._epochs:
            self._epochs[key] = self._permutation(group, epoch)
            if len(self._epochs) > 2 * len(self._sizes):
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(key)
        return self._epochs[key]

    def _permutation(self, group: int, epoch: int) -> np.ndarray | ShardwisePermutation:
        if len(self._shards[group]) > 1:
            return ShardwisePermutation(self._shards[group], [SHARD_STREAM, self._seed, epoch, group])
        key = [EPOCH_STREAM, self._seed, epoch] + ([group] if group else [])
        return np.random.default_rng(key).permutation(self._sizes[group])


class ShardwisePermutation:
    """Shards permuted, each cut into blocks, the blocks of a window of shards permuted, and the rows of each block.

    Keeps arrays as long as the shards are many, one window's blocks, and one block's rows.
    """

    def __init__(self, sizes: np.ndarray, key: list[int]) -> None:
        """sizes: rows of each shard, in storage order. key: of the generators."""
        self._key = key
        self._order = np.random.default_rng([*key, 0]).permutation(len(sizes))
        self._sizes = sizes[self._order]
        self._starts = (np.cumsum(sizes) - sizes)[self._order]
        last = np.arange(WINDOW_SHARDS, len(sizes) + WINDOW_SHARDS, WINDOW_SHARDS).clip(max=len(sizes)) - 1
        self._window_ends = np.cumsum(self._sizes)[last]
        self._kept_window: tuple[int, Blocks] | None = None
        self._kept_rows: tuple[tuple[int, int], np.ndarray] | None = None

    def __getitem__(self, position: int) -> int:
        window = int(np.searchsorted(self._window_ends, position, side="right"))
        within = position - (int(self._window_ends[window - 1]) if window else 0)
        blocks = self._blocks(window)
        block = int(np.searchsorted(blocks.ends, within, side="right"))
        row = self._rows(window, block)[within - (blocks.ends[block - 1] if block else 0)]
        return int(blocks.starts[block] + row)

    def _blocks(self, window: int) -> Blocks:
        """A window's blocks in their order."""
        if self._kept_window is None or self._kept_window[0] != window:
            shards = range(len(self._order))[window * WINDOW_SHARDS : (window + 1) * WINDOW_SHARDS]
            cuts = [np.arange(0, self._sizes[shard], BLOCK_ROWS) for shard in shards]
            starts = np.concatenate([self._starts[shard] + cut for shard, cut in zip(shards, cuts, strict=True)])
            lengths = np.concatenate(
                [np.diff(cut, append=self._sizes[shard]) for shard, cut in zip(shards, cuts, strict=True)]
            )
            order = np.random.default_rng([*self._key, 1, window]).permutation(len(starts))
            self._kept_window = window, Blocks(starts[order], np.cumsum(lengths[order]))
        return self._kept_window[1]

    def _rows(self, window: int, block: int) -> np.ndarray:
        """Order of a block's rows."""
        if self._kept_rows is None or self._kept_rows[0] != (window, block):
            ends = self._blocks(window).ends
            length = ends[block] - (ends[block - 1] if block else 0)
            order = np.random.default_rng([*self._key, 2, window, block]).permutation(length)
            self._kept_rows = (window, block), order
        return self._kept_rows[1]


class Blocks(NamedTuple):
    """Blocks one after another: each one's first row in its group, and its end counted from the first one's start."""

    starts: np.ndarray
    ends: np.ndarray


def turn_of(step: int, sizes: tuple[int, ...], seed: int) -> tuple[int, int]:
    """Group that step `step` belongs to, and how many steps before it were that group's.

    Group g has a share p of all samples, so its turns are due at the times (k + offset) / p for k = 0, 1, ...; in
    the order of all groups' times they make the steps, shuffled within blocks of BLOCK_STEPS.
    """
    if len(sizes) == 1:
        return 0, step
    block, place = divmod(step, BLOCK_STEPS)
    groups, turns = _turns(block, sizes, seed)
    return int(groups[place]), int(turns[place])


@lru_cache(maxsize=4)
def _turns(block: int, sizes: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Group and turn of each step of a block: (BLOCK_STEPS,) each. Costs the same for any block."""
    shares = np.array(sizes) / sum(sizes)
    offsets = np.random.default_rng([GROUP_STREAM, seed]).random(len(sizes))
    first, count = block * BLOCK_STEPS, len(sizes)
    # Before time t there are between t - count and t + count turns: none before `begin` is of this block, none after
    # `end`. One turn more on either side covers rounding.
    begin = np.floor((first - count - 1) * shares - offsets).astype(int).clip(min=1) - 1
    end = np.ceil((first + BLOCK_STEPS + count + 1) * shares - offsets).astype(int).clip(min=0) + 1
    group = np.repeat(np.arange(count), end - begin)
    turn = np.concatenate([np.arange(b, e) for b, e in zip(begin, end, strict=True)])
    due = np.lexsort((group, (turn + offsets[group]) / shares[group]))
    mine = due[first - begin.sum() :][:BLOCK_STEPS]
    # Shuffled are the groups; a group's turns stay in order.
    mixed = np.random.default_rng([GROUP_STREAM, seed, block]).permutation(group[mine])
    turns = np.empty_like(mixed)
    for g in np.unique(mixed):
        turns[mixed == g] = np.sort(turn[mine][group[mine] == g])
    return mixed, turns


@lru_cache(maxsize=4)
def strata(step: int, count: int, seed: int) -> np.ndarray:
    """The parts, 0 to count - 1, in the order in which a step's numbers take them, (count,)."""
    return np.random.default_rng([STRATA_STREAM, seed, step]).permutation(count)


def draws_of(step: int, micro: int, rank: int, *, batch_size: int, accumulate: int, world: int) -> range:
    """Draws of one process's micro-batch. A step takes the `accumulate * world * batch_size` draws after those of the
    step before, so a global batch holds the same draws however it is spread."""
    device_batches = (step * accumulate + micro) * world + rank
    return range(device_batches * batch_size, (device_batches + 1) * batch_size)


def _shares(numbers: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """How many of the ascending `numbers` lie in each shard, empty ones left out."""
    counts = np.diff(np.searchsorted(numbers, ends), prepend=0)
    return counts[counts > 0]
