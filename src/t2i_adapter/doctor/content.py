"""What kind of map a condition is: its channels, and whether lines are white on black or the reverse."""

from __future__ import annotations

from functools import reduce

import cv2
import numpy as np

CONTENTS = ("unknown", "constant", "two-valued", "grey", "colour")
"""What `content` tells, by number. All but the last hold R = G = B."""

WHITE_ON_BLACK, BLACK_ON_WHITE = 1, -1

_SAME = 2  # grey levels: what lossy compression leaves between equal channels or pixels
_COLOURED = 0.001  # share of pixels: a few may be damaged by compression
_CONTRAST = 64  # grey levels between lines and ground
_MOST_INK = 0.4  # more than this, and it is not told which is line and which is ground
_THICK = 32  # lines are thinner than this part of the side
_LEFT = 0.2  # share of an area that may outlast the removal of all that is thin, if it is to count as lines


def content(picture: np.ndarray) -> int:
    """(H,W,3) uint8 -> a number of CONTENTS."""
    planes = cv2.split(picture)
    low, high = reduce(cv2.min, planes), reduce(cv2.max, planes)
    if float(np.mean(high - low > _SAME)) > _COLOURED:
        return CONTENTS.index("colour")
    if int(high.max()) - int(low.min()) <= _SAME:
        return CONTENTS.index("constant")
    levels = np.count_nonzero(np.bincount(planes[1].ravel(), minlength=256))
    return CONTENTS.index("two-valued" if levels == 2 else "grey")


def polarity(picture: np.ndarray) -> int:
    """(H,W,3) uint8 -> WHITE_ON_BLACK, BLACK_ON_WHITE, or 0 where it is no drawing of thin lines."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    low, high = int(grey.min()), int(grey.max())
    if high - low < _CONTRAST:
        return 0
    bright = grey > (low + high) / 2
    is_white_ink = bright.mean() <= 0.5
    ink = (bright if is_white_ink else ~bright).astype(np.uint8)
    if ink.mean() > _MOST_INK:
        return 0
    side = max(3, min(ink.shape) // _THICK | 1)
    blobs = cv2.morphologyEx(ink, cv2.MORPH_OPEN, np.ones((side, side), np.uint8))
    if blobs.sum() > _LEFT * ink.sum():
        return 0
    return WHITE_ON_BLACK if is_white_ink else BLACK_ON_WHITE
