"""When a run measures its control, and how much, so that measuring stays within its share of the time.

The costs are counted in forward passes of the UNet for one sample, so that the plan is a function of the options and
not of the machine's speed of the day. Importing this module loads no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

BANDS = 4
"""Noise levels of each pair, as in `gain.BANDS`."""
FORWARDS_A_SAMPLE = 2.7
"""Cost of training on one sample: forward, backward through the frozen UNet, and the adapter."""
FEWEST_PAIRS, WANTED_PAIRS = 8, 16
"""With fewer than the first nothing can be said; with fewer than the second not that something is absent
(`advice.LEAST_PAIRS`)."""
FEWEST_PICTURES, MOST_PICTURES = 4, 16
WANTED_LOOKS, FEWEST_LOOKS = 8, 4
"""A run that can pay for fewer looks measures fewer pairs at each; with fewer than the second, as few as possible."""
EACH, FIRST = 1.5, 2.5
"""Losses of a pair at a look: with its own condition, and half a one for those that not every look measures, with
another's and of pairs of the training. The first look measures these, and what the adapter does not change."""
MOST_LOOKS = 40
"""More looks say no more, and each must be surer of itself the more there are (`statistics.look_alpha`)."""
PICTURE_SHARE = 0.5
"""Part of the budget for pictures; the rest is for losses."""
DECODE_FORWARDS = 6.0
"""Cost of decoding a picture and finding its condition."""


@dataclass(frozen=True)
class LookPlan:
    """What is measured when.

    Attributes:
        steps: updates after which losses are measured, ascending; empty if the budget does not pay for one look.
        pairs: number of held-out pairs at each.
        picture_steps: those of `steps` after which pictures are generated as well.
        pictures: number of held-out pairs that pictures are generated of.
        picture_cost: forward passes that one picture costs, with its decoding.
    """

    steps: tuple[int, ...]
    pairs: int
    picture_steps: frozenset[int]
    pictures: int
    picture_cost: float = 0.0


def plan_looks(
    steps: int, samples: int, budget: float, *, pairs: int, picture_forwards: int, columns: int = 2
) -> LookPlan:
    """Divides the budget.

    Args:
        steps: updates of the run.
        samples: noise samples of each update on the process that measures.
        budget: share of the training time.
        pairs: held-out pairs that there are.
        picture_forwards: forward passes of one picture.
        columns: pictures of each pair at a look: with its own condition, and with another's if they are scored. 0 if
            no pictures are generated.
    """
    total = budget * steps * samples * FORWARDS_A_SAMPLE
    most = min(pairs, MOST_PICTURES)
    enough = WANTED_PAIRS * BANDS * (FIRST + EACH * WANTED_LOOKS)
    pictures, drawings = _plan_pictures(min(total * PICTURE_SHARE, total - enough), most, picture_forwards, columns)
    rest = total - pictures * (1 + columns * drawings) * (picture_forwards + DECODE_FORWARDS)
    measured = min(pairs, max(WANTED_PAIRS, int(rest / BANDS / (FIRST + EACH * WANTED_LOOKS))))
    if _count_looks(rest, measured) < FEWEST_LOOKS:
        measured = min(pairs, FEWEST_PAIRS)
    count = _count_looks(rest, measured)
    if count < 1 or measured < FEWEST_PAIRS:
        return LookPlan((), 0, frozenset(), 0)
    losses = measured * BANDS
    # The first look is paid for by the whole budget so far, those after it by the part that pictures leave.
    first, gap = (math.ceil(losses * n / (part / steps)) for n, part in ((FIRST + EACH, total), (EACH, rest)))
    chosen = _spread(steps, first, gap)
    if losses * (FIRST + EACH * len(chosen)) > rest:
        chosen = (*chosen[:-2], chosen[-1])
    drawings = min(drawings, len(chosen))
    drawn = {chosen[round((index + 1) * len(chosen) / drawings) - 1] for index in range(drawings)} if pictures else ()
    return LookPlan(chosen, measured, frozenset(drawn), pictures, picture_forwards + DECODE_FORWARDS)


def _count_looks(total: float, pairs: int) -> int:
    """How many looks at so many pairs `total` pays for."""
    return min(int((total / (pairs * BANDS) - FIRST) / EACH), MOST_LOOKS) if pairs else 0


def _plan_pictures(total: float, most: int, forwards: int, columns: int) -> tuple[int, int]:
    """(number of pictures of each column at a look, number of such looks), both 0 if they cost more than `total`."""
    each = forwards + DECODE_FORWARDS
    if total <= 0 or not most or not columns:
        return 0, 0
    pictures = min(most, int(total / (each * (1 + columns * 6))))
    pictures = max(pictures, min(FEWEST_PICTURES, most))
    drawings = int((total / (pictures * each) - 1) / columns)
    return (pictures, min(drawings, MOST_LOOKS)) if drawings >= 2 else (0, 0)


def _spread(steps: int, first: int, gap: int) -> tuple[int, ...]:
    """Steps of the looks: the first as early as the budget allows, then at growing distances up to a fortieth of the
    run, and one at the end."""
    found, step = [], min(first, steps)
    while step <= steps:
        found.append(step)
        step += max(gap, min(step, steps // MOST_LOOKS))
    if found[-1] != steps:
        found[-1 if steps - found[-1] < gap else len(found) :] = [steps]
    return tuple(found)
