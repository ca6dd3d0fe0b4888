"""Training pictures of the base: scenes and emoji with varied original sizes and crops.

The variation lets the base learn SDXL's size and crop conditioning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from t2i_adapter.data import shapes

NATIVE = 128  # pixels: side of the base's pictures
_CROPPED_SHARE = 0.2
_BLURRED_SHARE = 0.15
_OTHER_SIZE_SHARE = 0.2


@dataclass(frozen=True)
class View:
    """Size and crop of a picture: `original` px, scaled to `resized` px, cropped at (top, left)."""

    original: int
    resized: int
    top: int
    left: int

    def time_ids(self, size: int) -> tuple[int, ...]:
        """Returns (6,): original height and width, crop top and left, target height and width, in SDXL's order."""
        return (self.original, self.original, self.top, self.left, size, size)


def whole(size: int) -> View:
    """Returns the view that the pipelines assume by default: native size, without a crop."""
    return View(size, size, 0, 0)


def sample_view(rng: np.random.Generator, size: int) -> View:
    """Draws a view. Most are whole and of native size; some have a small (blurred) or a large original, or a crop."""
    resized, top, left = size, 0, 0
    if rng.random() < _CROPPED_SHARE:
        resized = int(size * rng.uniform(1.1, 1.6))
        top, left = (int(v) for v in rng.integers(0, resized - size + 1, size=2))
    draw = rng.random()
    if draw < _BLURRED_SHARE:
        return View(int(size * rng.uniform(0.15, 0.8)), resized, top, left)
    if draw < _BLURRED_SHARE + _OTHER_SIZE_SHARE:
        return View(int(size * rng.uniform(1.0, 6.0)), resized, top, left)
    return View(size, resized, top, left)


def apply_view(render: Callable[[int], np.ndarray], view: View, size: int) -> np.ndarray:
    """Returns a picture with the view's size and crop, (size,size,3) uint8. render(n) returns it as (n,n,3) uint8.

    An original larger than `resized` is rendered at `resized`, which equals rendering it large and scaling it down.
    """
    array = render(min(view.original, view.resized))
    if array.shape[0] < view.resized:
        array = cv2.resize(array, (view.resized, view.resized), interpolation=cv2.INTER_CUBIC)
    return array[view.top : view.top + size, view.left : view.left + size]


def scene_picture(scene: shapes.Scene, view: View, size: int) -> np.ndarray:
    """Returns a scene's picture, (size,size,3) uint8."""
    return apply_view(lambda n: np.asarray(shapes.render(scene, n)), view, size)


def emoji_picture(rgba: np.ndarray, background: str, view: View, size: int) -> np.ndarray:
    """Returns the picture of an emoji, (n,n,4) uint8, on a colour: (size,size,3) uint8."""

    def render(n: int) -> np.ndarray:
        layer = np.asarray(Image.fromarray(rgba).resize((n, n), Image.Resampling.BOX), np.float32)
        alpha = layer[..., 3:] / 255
        color = np.asarray(shapes.COLORS[background], np.float32)
        return np.rint(color + alpha * (layer[..., :3] - color)).astype(np.uint8)

    return apply_view(render, view, size)
