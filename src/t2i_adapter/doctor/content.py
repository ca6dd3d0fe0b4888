"""Classifies a condition picture: how many colours it has, and whether its lines are white on black or the reverse."""

from __future__ import annotations

from functools import reduce

import cv2
import numpy as np

CONTENTS = ("unknown", "constant", "two-valued", "grey", "colour")
"""Classes of a condition; `find_content` returns an index into them. In all but the last R = G = B."""

WHITE_ON_BLACK, BLACK_ON_WHITE = 1, -1

_SAME_LEVELS = 2  # grey levels that lossy compression adds between equal channels or pixels
_COLOURED_SHARE = 0.001  # of the pixels; compression may give a few of them a colour
_MIN_CONTRAST = 64  # grey levels between lines and background
_MAX_INK_SHARE = 0.4  # above it, lines and background cannot be told apart
_MAX_WIDTH_SHARE = 1 / 32  # of the shorter side: lines are thinner
_MAX_AREA_SHARE = 0.2  # of the ink, that may remain after an opening with that width


def find_content(picture: np.ndarray) -> int:
    """(H,W,3) uint8 -> index into CONTENTS."""
    planes = cv2.split(picture)
    low, high = reduce(cv2.min, planes), reduce(cv2.max, planes)
    if float(np.mean(high - low > _SAME_LEVELS)) > _COLOURED_SHARE:
        return CONTENTS.index("colour")
    if int(high.max()) - int(low.min()) <= _SAME_LEVELS:
        return CONTENTS.index("constant")
    levels = np.count_nonzero(np.bincount(planes[1].ravel(), minlength=256))
    return CONTENTS.index("two-valued" if levels == 2 else "grey")


def find_polarity(picture: np.ndarray) -> int:
    """(H,W,3) uint8 -> WHITE_ON_BLACK, BLACK_ON_WHITE, or 0 if it is not a drawing of thin lines."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    low, high = int(grey.min()), int(grey.max())
    if high - low < _MIN_CONTRAST:
        return 0
    bright = grey > (low + high) / 2
    is_white_ink = bright.mean() <= 0.5
    ink = (bright if is_white_ink else ~bright).astype(np.uint8)
    if ink.mean() > _MAX_INK_SHARE:
        return 0
    side = max(3, int(min(ink.shape) * _MAX_WIDTH_SHARE) | 1)
    areas = cv2.morphologyEx(ink, cv2.MORPH_OPEN, np.ones((side, side), np.uint8))
    if areas.sum() > _MAX_AREA_SHARE * ink.sum():
        return 0
    return WHITE_ON_BLACK if is_white_ink else BLACK_ON_WHITE
