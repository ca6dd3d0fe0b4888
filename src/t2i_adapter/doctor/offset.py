"""How far a condition lies beside its image, told by where their edges agree."""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import cv2
import numpy as np

REACH = 16
"""Pixels of a scale, up and down, left and right, within which an offset is looked for."""

SCALES = (1, 2, 4)
"""Looked at one after another until one is sure, each this many times smaller: thick lines and soft edges agree at a
smaller one only."""

WINDOW = 512
"""Side of the middle part that is compared, in pixels of a scale; more costs time and tells no more."""

SURE = 4.0
"""Margin from which on an offset is believed. Conditions whose edges are the image's reach 5 to 10, unrelated ones
mostly less than 3."""

_BLUR = 1.0  # pixels: a line's own width must not decide
_WHITENING = 0.8  # 1 is phase correlation; a little less leaves noise behind. Stripes and grids then hardly count
_COARSE = 3  # pixels: the borders of a mosaic's cells are no wider, antialiased or not
_STEP = 8  # grey levels, above what lossy compression leaves of a flat area


class Offset(NamedTuple):
    """How far the condition lies below and to the right of its image, in pixels of the crop.

    `margin` is the height of the best agreement over the next, in standard deviations of all within reach; `scale` how
    many times smaller the pictures were when it was found.
    """

    down: float
    right: float
    margin: float
    scale: int


def find_offset(image: np.ndarray, condition: np.ndarray) -> Offset | None:
    """image (C,H,W) and condition (C',H,W), both uint8; None where there are no edges to tell it by."""
    best: Offset | None = None
    for scale in SCALES:
        found = _offset_at(scale, image, condition)
        if found and (best is None or found.margin > best.margin):
            best = found
        if best and best.margin >= SURE:
            break
    return best


def _offset_at(scale: int, image: np.ndarray, condition: np.ndarray) -> Offset | None:
    image, condition = _middle(image, scale), _middle(condition, scale)
    if min(image.shape[1:]) < 4 * REACH or is_coarse(image) or is_coarse(condition):
        return None
    agreement = _agreement(edges(image), edges(condition))
    top, left = map(int, np.unravel_index(agreement.argmax(), agreement.shape))
    others = agreement.copy()
    others[max(0, top - 3) : top + 4, max(0, left - 3) : left + 4] = -np.inf
    margin = (agreement[top, left] - others.max()) / max(float(agreement.std()), 1e-12)
    down = top - REACH + _between(agreement[:, left], top)
    right = left - REACH + _between(agreement[top], left)
    return Offset(scale * down, scale * right, float(margin), scale)


def _between(values: np.ndarray, place: int) -> float:
    """How far beside `place`, -0.5 to 0.5, a parabola through it and its neighbours is highest; 0 at the border."""
    if not 0 < place < len(values) - 1:
        return 0.0
    before, here, after = (float(value) for value in values[place - 1 : place + 2])
    bend = 2 * here - before - after
    return (after - before) / (2 * bend) if bend > 0 else 0.0


def edges(picture: np.ndarray) -> np.ndarray:
    """(C,H,W) uint8 -> (H,W) float32: the greatest step of any channel within 3 x 3 pixels, softened.

    Symmetric about a line as about the border of an area, so that either may stand for the other.
    """
    square = np.ones((3, 3), np.uint8)
    lines = [cv2.morphologyEx(np.ascontiguousarray(plane), cv2.MORPH_GRADIENT, square) for plane in picture]
    return cv2.GaussianBlur(reduce(cv2.max, lines).astype(np.float32), (0, 0), _BLUR)


def is_coarse(picture: np.ndarray) -> bool:
    """Whether (C,H,W) uint8 is flat, or made of rectangles on a grid: borders of cells are no edges of the image."""
    across = reduce(cv2.max, [_greatest_steps(plane) for plane in picture]) > _STEP  # columns that anything changes at
    down = reduce(cv2.max, [_greatest_steps(plane.T) for plane in picture]) > _STEP
    return max(_longest_run(across), _longest_run(down)) <= _COARSE


def _agreement(image: np.ndarray, condition: np.ndarray) -> np.ndarray:
    """(2 REACH + 1, 2 REACH + 1): how well two edge maps agree when the condition's is moved back by each offset."""
    window = np.outer(*(np.sqrt(np.hanning(side + 2)[1:-1]) for side in image.shape)).astype(np.float32)
    spectra = [np.fft.rfft2((part - part.mean()) * window) for part in (image, condition)]
    cross = np.conj(spectra[0]) * spectra[1]
    size = np.abs(cross)
    whole = np.fft.irfft2(cross / (size + 1e-3 * size.max() + 1e-12) ** _WHITENING, image.shape)
    return np.roll(whole, (REACH, REACH), (0, 1))[: 2 * REACH + 1, : 2 * REACH + 1]


def _middle(picture: np.ndarray, scale: int) -> np.ndarray:
    """(C,H,W) uint8, `scale` times smaller: the middle, whole pixels of the scale."""
    side = WINDOW * scale
    top, left = ((max(0, length - side)) // 2 for length in picture.shape[1:])
    height, width = (min(length, side) // scale for length in picture.shape[1:])
    part = picture[:, top : top + height * scale, left : left + width * scale]
    if scale == 1:
        return part
    planes = [cv2.resize(np.ascontiguousarray(p), (width, height), interpolation=cv2.INTER_AREA) for p in part]
    return np.stack(planes)


def _greatest_steps(plane: np.ndarray) -> np.ndarray:
    """(H,W) uint8 -> (W-1,) uint8: the greatest step from each column to the next."""
    steps = cv2.absdiff(np.ascontiguousarray(plane[:, 1:]), np.ascontiguousarray(plane[:, :-1]))
    return cv2.reduce(steps, 0, cv2.REDUCE_MAX)[0]


def _longest_run(flags: np.ndarray) -> int:
    """How many True stand side by side, at most."""
    ends = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return int((ends[1::2] - ends[::2]).max(initial=0))
