"""The order of a run: which sample each draw takes, and which draws form a micro-batch.

A run is one endless sequence of draws, numbered from 0. Step s takes the `global_batch` draws from s * global_batch on.
All samples of a step have one crop size, so each step belongs to one group of samples. The draws of a group's steps,
one step after another, form epochs, and each epoch is a permutation of the group:

    draws     0 1 2 3 | 4 5 6 7 | 8 9 ...      global_batch = 4
    step      0       | 1       | 2            each step belongs to one group (`turn_of`)
    group A   0 1 2 3           | 4 5 ...      its places: the turn times global_batch, plus the place in the step
    epoch     0 0 0 0           | 0 1 ...      five samples: place 5 is the first of epoch 1

Everything is a function of (seed, draw). Nothing depends on the number of processes or loader workers, or on how a
global batch is divided between them, and a resumed run needs only its step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

EPOCH_STREAM, DRAW_STREAM, VIEW_STREAM, GROUP_STREAM, SHARD_STREAM = range(5)
AGAIN_STREAM, STRATA_STREAM, LOOK_STREAM, WEIGHTS_STREAM = range(5, 9)
"""First word of every generator's key, so that no two purposes share random numbers."""

BLOCK_ROWS = 1024
"""Consecutive rows of a shard that are permuted among themselves and read together."""
WINDOW_SHARDS = 8
"""Number of shards that are read from at a time: their blocks are mixed."""
LARGE_ROWS = 2**24
"""A group of one shard with more rows than this is permuted by a formula instead of an array."""
BLOCK_STEPS = 64
"""Number of steps within which the groups' turns are shuffled. During the run no group is more than about one such
block of steps ahead of its share."""


class Permutation(Protocol):
    """The rows of an epoch by their position in it."""

    def __getitem__(self, position: int, /) -> int | np.integer: ...


class Order:
    """The order of a run's samples.

    Args:
        groups: sample numbers by crop size, each ascending, as in `PairDataset`.
        shards: numbers of samples that are stored together, in storage order. With one shard an epoch is any
            permutation of its group; with several it goes from block to block, so that few shards are read at a time.
        seed: of all random numbers.
        global_batch: number of draws of a step.
    """

    def __init__(self, groups: Sequence[np.ndarray], shards: Sequence[int], seed: int, global_batch: int) -> None:
        self._sizes = tuple(len(group) for group in groups)
        ends = np.cumsum(shards)
        assert sum(self._sizes) == ends[-1] > 0
        self._groups = groups
        self._shards = [_shares(group, ends) for group in groups]
        self._seed = seed
        self._global_batch = global_batch
        self._epochs: OrderedDict[tuple[int, int], Permutation] = OrderedDict()

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
        """The draw's numbers in [0,1), each moved into its own interval.

        [0,1) is divided into as many equal intervals as a step has numbers, and a random permutation assigns them. So
        each number alone is still uniform in [0,1).
        """
        step, within = divmod(draw, self._global_batch)
        count = len(quantiles)
        parts = strata(step, self._global_batch * count, self._seed)
        mine = parts[within * count : (within + 1) * count]
        return [(int(part) + quantile) / len(parts) for part, quantile in zip(mine, quantiles, strict=True)]

    def _epoch(self, group: int, epoch: int) -> Permutation:
        """The permutation of an epoch. The last few are kept: a step may span two epochs, and groups take turns."""
        key = group, epoch
        if key not in self._epochs:
            self._epochs[key] = self._permutation(group, epoch)
            if len(self._epochs) > 2 * len(self._sizes):
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(key)
        return self._epochs[key]

    def _permutation(self, group: int, epoch: int) -> Permutation:
        if len(self._shards[group]) > 1:
            return ShardwisePermutation(self._shards[group], [SHARD_STREAM, self._seed, epoch, group])
        key, size = [EPOCH_STREAM, self._seed, epoch] + ([group] if group else []), self._sizes[group]
        if size > LARGE_ROWS:
            return LargePermutation(size, key)
        rows = np.arange(size, dtype=np.int32)
        np.random.default_rng(key).shuffle(rows)
        return rows


class ShardwisePermutation:
    """A permutation that reads few shards at a time.

    The shards are permuted and divided into blocks. The blocks of a window of WINDOW_SHARDS shards are permuted, and so
    are the rows of each block. Memory: arrays over the shards, the blocks of one window, and the rows of one block.
    """

    def __init__(self, sizes: np.ndarray, key: list[int]) -> None:
        """sizes: number of rows of each shard, in storage order. key: start of the generators' keys."""
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
        """The blocks of a window, permuted."""
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
        """The rows of a block, permuted."""
        if self._kept_rows is None or self._kept_rows[0] != (window, block):
            ends = self._blocks(window).ends
            length = ends[block] - (ends[block - 1] if block else 0)
            order = np.random.default_rng([*self._key, 2, window, block]).permutation(length)
            self._kept_rows = (window, block), order
        return self._kept_rows[1]


class LargePermutation:
    """A permutation of any number of rows that needs no array.

    It is a Feistel network (Luby and Rackoff, 1988): a number's bits are divided in two halves, and each round XORs
    one half with a keyed hash of the other, which can be undone. It permutes the numbers below the next power of two;
    a number that is no row is permuted again until it is one, less than twice on average ("cycle walking").
    """

    ROUNDS = 8  # even, so that both halves end with their own number of bits

    def __init__(self, size: int, key: list[int]) -> None:
        """size: number of rows, at least 4. key: of the generator that draws the rounds' keys."""
        self._size = size
        bits = (size - 1).bit_length()
        self._low_bits = bits // 2
        self._masks = (1 << (bits - self._low_bits)) - 1, (1 << self._low_bits) - 1
        self._keys = np.random.default_rng(key).integers(0, 2**64, self.ROUNDS, np.uint64).tolist()

    def __getitem__(self, position: int) -> int:
        assert 0 <= position < self._size
        row = self._permute(position)
        while row >= self._size:
            row = self._permute(row)
        return row

    def _permute(self, number: int) -> int:
        high, low = number >> self._low_bits, number & self._masks[1]
        for place, key in enumerate(self._keys):
            # `high` and `low` change places, so each round needs the other half's mask.
            high, low = low, high ^ (_mix(low + key) & self._masks[place % 2])
        return high << self._low_bits | low


def _mix(number: int) -> int:
    """A hash of 64 bits: the finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return number ^ (number >> 31)


class Blocks(NamedTuple):
    """The blocks of a window in order: the first row of each in the group, and its end, counted from the window's
    start."""

    starts: np.ndarray
    ends: np.ndarray


def turn_of(step: int, sizes: tuple[int, ...], seed: int) -> tuple[int, int]:
    """The group of step `step`, and the number of earlier steps of that group.

    Group g has a share p of all samples, so its turns are due at the times (k + offset) / p for k = 0, 1, ... The
    turns of all groups, sorted by time, are the steps; they are shuffled within blocks of BLOCK_STEPS.
    """
    if len(sizes) == 1:
        return 0, step
    block, place = divmod(step, BLOCK_STEPS)
    groups, turns = _turns(block, sizes, seed)
    return int(groups[place]), int(turns[place])


@lru_cache(maxsize=4)
def _turns(block: int, sizes: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Group and turn of each step of a block: (BLOCK_STEPS,) each. The cost does not depend on the block."""
    shares = np.array(sizes) / sum(sizes)
    offsets = np.random.default_rng([GROUP_STREAM, seed]).random(len(sizes))
    first, count = block * BLOCK_STEPS, len(sizes)
    # Between t - count and t + count turns lie before time t. So all turns of this block lie between `begin` and `end`;
    # one more turn on each side covers rounding.
    begin = np.floor((first - count - 1) * shares - offsets).astype(int).clip(min=1) - 1
    end = np.ceil((first + BLOCK_STEPS + count + 1) * shares - offsets).astype(int).clip(min=0) + 1
    group = np.repeat(np.arange(count), end - begin)
    turn = np.concatenate([np.arange(b, e) for b, e in zip(begin, end, strict=True)])
    due = np.lexsort((group, (turn + offsets[group]) / shares[group]))
    mine = due[first - begin.sum() :][:BLOCK_STEPS]
    # The groups are shuffled; the turns of a group stay in order.
    mixed = np.random.default_rng([GROUP_STREAM, seed, block]).permutation(group[mine])
    turns = np.empty_like(mixed)
    for g in np.unique(mixed):
        turns[mixed == g] = np.sort(turn[mine][group[mine] == g])
    return mixed, turns


@lru_cache(maxsize=4)
def strata(step: int, count: int, seed: int) -> np.ndarray:
    """(count,): a permutation of the intervals 0 to count - 1, one for each number of a step."""
    return np.random.default_rng([STRATA_STREAM, seed, step]).permutation(count)


def draws_of(step: int, micro: int, rank: int, *, batch_size: int, accumulate: int, world: int) -> range:
    """Draws of one process's micro-batch. A step takes the next `accumulate * world * batch_size` draws, so a global
    batch holds the same draws however it is divided."""
    device_batches = (step * accumulate + micro) * world + rank
    return range(device_batches * batch_size, (device_batches + 1) * batch_size)


def _shares(numbers: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """How many of the ascending `numbers` lie in each shard; empty shards are skipped."""
    ends = ends.astype(numbers.dtype)  # otherwise `searchsorted` copies the numbers to another dtype
    counts = np.diff(np.searchsorted(numbers, ends), prepend=0)
    return counts[counts > 0]
