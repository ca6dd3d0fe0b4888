"""Compares people by their joints: OKS and PCK of the skeletons in a generated picture and in its target."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from t2i_adapter.annotators.skeleton import Skeleton

NECK, SHOULDERS, HIPS = 1, (2, 5), (8, 11)
SIGMAS = np.array(
    [0.026, np.nan, 0.079, 0.072, 0.062, 0.079, 0.072, 0.062, 0.107, 0.087, 0.089, 0.107, 0.087, 0.089, 0.025, 0.025,
     0.035, 0.035]
)  # fmt: skip
"""COCO's standard deviations of people who mark the joints, over the root of the person's area, in OpenPose's order.
COCO has no neck, so OKS leaves it out."""
PLACE = 0.1
"""A joint is in its place within this share of the torso's length (PCK@0.1)."""
MATCHED = 0.5
"""OKS from which a person counts as found."""


def people_agreement(got: Sequence[Skeleton], wanted: Sequence[Skeleton]) -> dict[str, float]:
    """Compares the people of a picture with those of its target; {} if the target has none. All values are 0 to 1.

    Each person of the target has one counterpart at most: pairs are made by OKS, highest first. `pose_oks`: mean over
    the target's people; 0 for one without a counterpart. `pose_pck`: share of all visible joints of the target that the
    counterpart has in their place. `people_matched`: share of the people whose OKS is 0.5 or more. People of the
    picture without a counterpart change nothing.
    """
    if not wanted:
        return {}
    scores = np.array([[similarity(a.body, b.body) for a in got] for b in wanted]).reshape(len(wanted), len(got))
    found, oks = match(scores), np.zeros(len(wanted))
    placed = joints = 0
    for number, person in enumerate(wanted):
        counterpart = found.get(number)
        if counterpart is not None:
            oks[number] = scores[number, counterpart]
        if reach := PLACE * _torso(person.body):
            joints += np.count_nonzero(_visible(person.body))
            if counterpart is not None:
                placed += np.count_nonzero(_distances(got[counterpart].body, person.body) <= reach)
    values = {"pose_oks": float(oks.mean()), "people_matched": float(np.mean(oks >= MATCHED))}
    return values | ({"pose_pck": placed / joints} if joints else {})


def similarity(got: np.ndarray, wanted: np.ndarray) -> float:
    """OKS of two bodies, (18,2) in px with NaN for hidden joints: the mean of exp(-d^2 / (2 s^2 k^2)).

    The mean is over the joints that are visible in `wanted`; a joint that `got` lacks counts 0. d: distance in px. s^2:
    area of the box around the visible joints, in px (COCO takes the area of the person's outline). k: twice `SIGMAS`.
    """
    counted = _visible(wanted) & ~np.isnan(SIGMAS)
    if not counted.any():
        return 0.0
    seen = wanted[_visible(wanted)]
    area = max(1.0, float(np.prod(np.maximum(np.ptp(seen, axis=0), 1.0))))
    distances, k = _distances(got, wanted)[counted], 2 * SIGMAS[counted]
    return float(np.mean(np.nan_to_num(np.exp(-(distances**2) / (2 * area * k**2)))))


def match(scores: np.ndarray) -> dict[int, int]:
    """Returns row -> column of a matrix of scores: the highest score above 0 first, each row and column once."""
    found: dict[int, int] = {}
    for flat in np.argsort(-scores, axis=None, kind="stable"):
        row, column = divmod(int(flat), scores.shape[1])
        if scores[row, column] > 0 and row not in found and column not in found.values():
            found[row] = column
    return found


def _torso(body: np.ndarray) -> float:
    """Length in px from the neck to the middle of the hips; the shoulders' distance if the hips are hidden, else 0."""
    lengths = (
        np.linalg.norm(body[NECK] - body[list(HIPS)].mean(axis=0)),
        np.linalg.norm(body[SHOULDERS[0]] - body[SHOULDERS[1]]),
    )
    return next((float(length) for length in lengths if not np.isnan(length)), 0.0)


def _visible(body: np.ndarray) -> np.ndarray:
    return np.asarray(~np.isnan(body).any(axis=1))


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(18,2) and (18,2) -> (18,): NaN if one of the two joints is hidden."""
    return np.linalg.norm(a - b, axis=1)
