"""Finds the background colour, the object, its colour and its kind in a generated picture, without its prompt."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from t2i_adapter.data import shapes
from t2i_adapter.evaluation.color import srgb_to_lab

_FRAME = 16  # pixels: width of the picture's border, mostly background
_MIN_DIFFERENCE = 12.0  # CIE76: colours with a smaller difference count as equal
_MIN_DISTANCE = 24.0  # RGB, 0 to 255: a colour this far from all mixtures of two colours is a third colour
_MIN_AREA = 0.01  # share of the picture: a smaller region is not an object
_SIDE = 64  # pixels of the canvas on which outlines are compared
_ANGLES = 5  # angles compared for each kind, over the generator's range


@dataclass(frozen=True)
class Content:
    """The content of a picture. If it has no object, `color` is that of the picture's middle and `kind` is None."""

    background: np.ndarray  # (3,) RGB, 0 to 255
    color: np.ndarray  # (3,) RGB, 0 to 255
    kind: str | None
    mask: np.ndarray  # (H,W) bool


def judge(image: np.ndarray) -> Content:
    """Returns the content of a picture, (H,W,3) uint8, of one shape on a plain or patterned background."""
    lab = srgb_to_lab(image)
    frame = np.ones(image.shape[:2], bool)
    frame[_FRAME:-_FRAME, _FRAME:-_FRAME] = False
    ground_lab = np.median(lab[frame], axis=0)
    foreign = _differs(lab, ground_lab)
    background = np.median(image[frame & ~foreign], axis=0)
    sides = (foreign[:_FRAME], foreign[-_FRAME:], foreign[:, :_FRAME], foreign[:, -_FRAME:])
    if all(side.mean() > 0.04 for side in sides):  # a pattern: its accent and its edges are not objects
        foreign &= _off_mixtures(image, background, np.median(image[foreign & frame], axis=0))
    mask = _largest_part(foreign)
    if mask.mean() < _MIN_AREA:
        H, W = mask.shape
        middle = image[H // 3 : -(H // 3), W // 3 : -(W // 3)].reshape(-1, 3)
        return Content(background, np.median(middle, axis=0), None, mask)
    core = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    return Content(background, np.median(image[core if core.any() else mask], axis=0), kind_of(mask), mask)


def kind_of(mask: np.ndarray) -> str:
    """Returns the kind whose outline, moved and scaled onto the mask, has the largest IoU with it."""
    canvas = _normalised(mask)
    scores = {kind: max(_iou(canvas, t) for t in templates) for kind, templates in _templates().items()}
    return max(scores, key=scores.__getitem__)


def _differs(lab: np.ndarray, color: np.ndarray) -> np.ndarray:
    """Returns (H,W) bool: where the colour differs from `color`."""
    return np.linalg.norm(lab - color, axis=-1) > _MIN_DIFFERENCE


def _off_mixtures(image: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns (H,W) bool: where the colour is far from every mixture of the two."""
    line = second - first
    share = np.clip((image - first) @ line / max(float(line @ line), 1.0), 0, 1)
    return np.linalg.norm(image - first - share[..., None] * line, axis=-1) > _MIN_DISTANCE


def _largest_part(mask: np.ndarray) -> np.ndarray:
    """Returns the largest connected part; a morphological opening first removes thin lines (edges of a pattern)."""
    opened = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(opened)
    if count < 2:
        return np.zeros_like(mask)
    return labels == 1 + stats[1:, cv2.CC_STAT_AREA].argmax()


def _normalised(mask: np.ndarray) -> np.ndarray:
    """Returns the mask as (_SIDE,_SIDE) bool, its centroid in the middle, its area a fifth of the canvas."""
    y, x = np.nonzero(mask)
    scale = np.sqrt(0.2 * _SIDE**2 / len(x))
    move = np.asarray([[scale, 0, _SIDE / 2 - scale * x.mean()], [0, scale, _SIDE / 2 - scale * y.mean()]])
    return cv2.warpAffine(mask.astype(np.float32), move, (_SIDE, _SIDE), flags=cv2.INTER_LINEAR) > 0.5


@lru_cache(maxsize=1)
def _templates() -> dict[str, list[np.ndarray]]:
    """Returns {kind: normalised masks over its range of angles}."""
    ground = shapes.Background("plain", "black", "white")

    def mask_of(kind: str, angle: float) -> np.ndarray:
        shape = shapes.Shape(kind, "red", (0.5, 0.5), 0.3, angle)
        return _normalised(shapes.visible_masks(shapes.Scene((shape,), ground, ""), 128)[0])

    ranges = {kind: np.linspace(-turn, turn, _ANGLES if turn else 1) for kind, turn in shapes.MAX_TURN.items()}
    return {kind: [mask_of(kind, float(angle)) for angle in angles] for kind, angles in ranges.items()}


def _iou(first: np.ndarray, second: np.ndarray) -> float:
    return float((first & second).sum() / (first | second).sum())
