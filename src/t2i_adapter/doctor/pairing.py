"""Checks on a few pairs whether the conditions belong to their pictures, and whether they are inverted.

An adapter cannot learn from pairs that do not belong together, and an adapter that learnt white lines on black does not
follow black lines on white. Both look like an adapter that does not control.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from PIL import Image

from t2i_adapter.annotators.registry import Annotator, annotate
from t2i_adapter.doctor.content import BLACK_ON_WHITE, WHITE_ON_BLACK, find_polarity
from t2i_adapter.doctor.offset import edge_map
from t2i_adapter.evaluation.metrics import condition_agreement
from t2i_adapter.statistics import lower_bound

ALPHA = 0.01
"""Probability with which each statement may be wrong."""
_POLARITIES = {WHITE_ON_BLACK: "white on black", BLACK_ON_WHITE: "black on white"}

Fault = Literal["equal", "unpaired", "inverted"]


def check_pairs(
    conditions: Sequence[Image.Image],
    targets: Sequence[Image.Image],
    judge: Annotator | None = None,
    polarity: str | None = None,
) -> dict[Fault, str]:
    """What is wrong with N pairs, 4 or more, of one size each: fault -> a sentence; empty if nothing is found.

    Args:
        judge: the annotator whose maps the conditions should equal. Without it, edges of a condition and of its picture
            are compared.
        polarity: what the conditions should be, as `Facts.polarity`; for lines only.
    """
    arrays = [np.asarray(condition.convert("RGB")) for condition in conditions]
    if all(np.array_equal(arrays[0], other) for other in arrays[1:]):
        return {"equal": f"All {len(arrays)} conditions are the same picture."}
    found: dict[Fault, str] = {}
    fit = _fit(targets, judge)
    own = np.array([fit(index, array) for index, array in enumerate(arrays)])
    lent = np.array([fit(index, arrays[index - 1]) for index in range(len(arrays))])
    inverted = None if judge is None else np.array([fit(index, 255 - array) for index, array in enumerate(arrays)])
    if inverted is not None and lower_bound(inverted - own, ALPHA) > 0:
        found["inverted"] = (
            f"The conditions look inverted: what {judge.name if judge else ''} makes of the pictures agrees with them "
            f"to {own.mean():.2f}, and to {inverted.mean():.2f} if black and white are exchanged."
        )
    elif line := _other_polarity(arrays, polarity):
        found["inverted"] = line
    if not found and lower_bound(own - lent, ALPHA) <= 0:
        found["unpaired"] = (
            f"The conditions do not belong to their pictures: they agree with them to {own.mean():.2f}, and the "
            f"conditions of other pairs to {lent.mean():.2f}."
            if judge
            else "The edges of the conditions do not match those of their own pictures better than those of others. If "
            "the conditions show edges, they belong to other pictures."
        )
    return found


def _fit(targets: Sequence[Image.Image], judge: Annotator | None) -> Callable[[int, np.ndarray], float]:
    """A function of (number of a pair, condition (H,W,3)) that is larger the better the condition fits the picture."""
    if judge is None:
        edges = [edge_map(np.moveaxis(np.asarray(target.convert("RGB")), 2, 0)) for target in targets]
        return lambda index, array: _correlation(edges[index], edge_map(np.moveaxis(array, 2, 0)))
    maps = [np.asarray(annotate(judge, target.convert("RGB")).convert("RGB")) for target in targets]

    def agreement(index: int, array: np.ndarray) -> float:
        values = condition_agreement(maps[index], array, judge.facts.levels)
        return values["condition_f1"] if "condition_f1" in values else 1 - values["condition_error"]

    return agreement


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of two maps (H,W), 0 if one of them is flat."""
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / size if size else 0.0


def _other_polarity(arrays: Sequence[np.ndarray], wanted: str | None) -> str:
    """A sentence if most conditions are lines of the other polarity than `wanted`."""
    if wanted not in _POLARITIES.values():
        return ""
    found = [_POLARITIES.get(find_polarity(array)) for array in arrays]
    other = next(name for name in _POLARITIES.values() if name != wanted)
    if found.count(other) <= len(found) / 2:
        return ""
    return (
        f"The conditions are inverted: {found.count(other)} of {len(found)} are {other}, and the adapter was trained "
        f"on {wanted}."
    )
