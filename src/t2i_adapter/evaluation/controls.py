"""What the adapter is compared with: the same picture without it, and with a condition that is not its own."""

from __future__ import annotations

import numpy as np

ADAPTER = "adapter"
OTHER_CONDITION = "other_condition"
NO_ADAPTER = "no_adapter"
TARGET = "target"  # not drawn: the pair's true picture through the same measure, the best a drawn one can reach
DRAWN = (ADAPTER, OTHER_CONDITION, NO_ADAPTER)


def derangement(count: int, seed: int) -> list[int]:
    """For each of `count` pairs another pair's index; each is used once (one random cycle through all)."""
    assert count >= 2, "one pair alone has no other"
    order = np.random.default_rng(seed).permutation(count)
    other = np.empty(count, int)
    other[order] = np.roll(order, 1)
    return other.tolist()


def picture_seeds(count: int, seed: int) -> list[int]:
    """A seed for each pair's pictures: its three pictures start from the same noise."""
    return [int(s.generate_state(1, np.uint64)[0] >> 1) for s in np.random.SeedSequence(seed).spawn(count)]
