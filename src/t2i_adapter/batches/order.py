"""Which sample each draw of a run takes, and which draws form a micro-batch.

A run is one endless row of draws, numbered from 0. Draw d belongs to epoch d // N, and every epoch is a permutation
of the N samples. Nothing here depends on processes, loader workers or how a global batch is cut up.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

EPOCH_STREAM, DRAW_STREAM = 0, 1
"""First word of every generator's key, so that no epoch's and no draw's numbers are ever the same row."""


def sample_of(draw: int, count: int, seed: int) -> int:
    """Number of the sample, in [0, count), that draw `draw` takes."""
    epoch, place = divmod(draw, count)
    return int(_order(count, seed, epoch)[place])


def draws_of(step: int, micro: int, rank: int, *, batch_size: int, accumulate: int, world: int) -> range:
    """Draws of one process's micro-batch. A step takes the `accumulate * world * batch_size` draws after those of the
    step before, so a global batch holds the same draws however it is spread."""
    device_batches = (step * accumulate + micro) * world + rank
    return range(device_batches * batch_size, (device_batches + 1) * batch_size)


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([EPOCH_STREAM, seed, epoch]).permutation(count)
