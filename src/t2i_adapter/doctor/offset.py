"""Measures how far a condition is shifted against its image, by a phase correlation of their edges."""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import cv2
import numpy as np

MAX_SHIFT = 16
"""Pixels of a scale, up, down, left and right, within which an offset is searched."""

SCALES = (1, 2, 4)
"""The pictures are compared at these reductions, one after another, until an offset is sure: thick lines and soft edges
agree at a smaller size only."""

WINDOW = 512
"""Side of the central part that is compared, in pixels of a scale; a larger one is slower and finds no more."""

SURE_MARGIN = 4.0
"""Margin from which an offset counts as sure. Conditions with the edges of their image reach 5 to 10, unrelated ones
mostly less than 3."""

_BLUR = 1.0  # pixels of sigma, so that the width of a line does not decide
_WHITENING = (
    0.8  # exponent; 1 is phase correlation, a little less suppresses noise. Periodic patterns hardly count then
)
_MAX_GRID_LINE = 3  # pixels: the borders of a mosaic's cells are at most so wide, with antialiasing
_MIN_STEP = 8  # grey levels, more than lossy compression adds in a flat area


class Offset(NamedTuple):
    """How far the condition lies below and to the right of its image, in pixels of the crop.

    `margin` is the height of the correlation's peak over the next one, in standard deviations of the correlation;
    `scale` is the reduction at which the offset was found.
    """

    down: float
    right: float
    margin: float
    scale: int


def find_offset(image: np.ndarray, condition: np.ndarray) -> Offset | None:
    """image (C,H,W) and condition (C',H,W), both uint8. Returns None if one of them has no edges to compare."""
    best: Offset | None = None
    for scale in SCALES:
        found = _offset_at(scale, image, condition)
        if found and (best is None or found.margin > best.margin):
            best = found
        if best and best.margin >= SURE_MARGIN:
            break
    return best


def _offset_at(scale: int, image: np.ndarray, condition: np.ndarray) -> Offset | None:
    image, condition = _center(image, scale), _center(condition, scale)
    if min(image.shape[1:]) < 4 * MAX_SHIFT or is_mosaic(image) or is_mosaic(condition):
        return None
    correlation = _correlation(edge_map(image), edge_map(condition))
    top, left = map(int, np.unravel_index(correlation.argmax(), correlation.shape))
    others = correlation.copy()
    others[max(0, top - 3) : top + 4, max(0, left - 3) : left + 4] = -np.inf
    margin = (correlation[top, left] - others.max()) / max(float(correlation.std()), 1e-12)
    down = top - MAX_SHIFT + _subpixel(correlation[:, left], top)
    right = left - MAX_SHIFT + _subpixel(correlation[top], left)
    return Offset(scale * down, scale * right, float(margin), scale)


def _subpixel(values: np.ndarray, peak: int) -> float:
    """The vertex, -0.5 to 0.5 beside `peak`, of the parabola through the peak and its neighbours; 0 at the border."""
    if not 0 < peak < len(values) - 1:
        return 0.0
    before, here, after = (float(value) for value in values[peak - 1 : peak + 2])
    bend = 2 * here - before - after
    return (after - before) / (2 * bend) if bend > 0 else 0.0


def edge_map(picture: np.ndarray) -> np.ndarray:
    """(C,H,W) uint8 -> (H,W) float32: the largest step of any channel within 3 x 3 pixels, blurred.

    It is symmetric about a line and about the border of an area, so that either may correspond to the other.
    """
    square = np.ones((3, 3), np.uint8)
    lines = [cv2.morphologyEx(np.ascontiguousarray(plane), cv2.MORPH_GRADIENT, square) for plane in picture]
    return cv2.GaussianBlur(reduce(cv2.max, lines).astype(np.float32), (0, 0), _BLUR)


def is_mosaic(picture: np.ndarray) -> bool:
    """Whether (C,H,W) uint8 is flat or consists of rectangles on a grid, whose borders are not edges of the image."""
    columns = reduce(np.maximum, [_largest_steps(plane) for plane in picture]) > _MIN_STEP  # where any row changes
    rows = reduce(np.maximum, [_largest_steps(plane.T) for plane in picture]) > _MIN_STEP
    return max(_longest_run(columns), _longest_run(rows)) <= _MAX_GRID_LINE


def _correlation(image: np.ndarray, condition: np.ndarray) -> np.ndarray:
    """(2 MAX_SHIFT + 1, 2 MAX_SHIFT + 1): the correlation of two edge maps (H,W) at every offset of the condition."""
    window = np.outer(*(np.sqrt(np.hanning(side + 2)[1:-1]) for side in image.shape)).astype(np.float32)
    spectra = [np.fft.rfft2((part - part.mean()) * window) for part in (image, condition)]
    cross = np.conj(spectra[0]) * spectra[1]
    size = np.abs(cross)
    whole = np.fft.irfft2(cross / (size + 1e-3 * size.max() + 1e-12) ** _WHITENING, image.shape)
    return np.roll(whole, (MAX_SHIFT, MAX_SHIFT), (0, 1))[: 2 * MAX_SHIFT + 1, : 2 * MAX_SHIFT + 1]


def _center(picture: np.ndarray, scale: int) -> np.ndarray:
    """(C,H,W) uint8 -> the central part, reduced `scale` times."""
    side = WINDOW * scale
    top, left = ((max(0, length - side)) // 2 for length in picture.shape[1:])
    height, width = (min(length, side) // scale for length in picture.shape[1:])
    part = picture[:, top : top + height * scale, left : left + width * scale]
    if scale == 1:
        return part
    planes = [cv2.resize(np.ascontiguousarray(p), (width, height), interpolation=cv2.INTER_AREA) for p in part]
    return np.stack(planes)


def _largest_steps(plane: np.ndarray) -> np.ndarray:
    """(H,W) uint8 -> (W-1,) uint8: the largest step from each column to the next."""
    steps = cv2.absdiff(np.ascontiguousarray(plane[:, 1:]), np.ascontiguousarray(plane[:, :-1]))
    return cv2.reduce(steps, 0, cv2.REDUCE_MAX)[0]


def _longest_run(flags: np.ndarray) -> int:
    """Length of the longest run of True."""
    ends = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return int((ends[1::2] - ends[::2]).max(initial=0))
