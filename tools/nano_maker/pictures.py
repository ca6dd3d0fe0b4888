"""Training pictures: scenes seen through varied original sizes and crops, so that SDXL's size and crop numbers mean
something, and emoji on flat backgrounds."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from t2i_adapter.data import shapes

NATIVE = 128  # pixels: the side of the base's pictures
_CROPPED_SHARE = 0.2
_BLURRED_SHARE = 0.15
_OTHER_SIZE_SHARE = 0.2


@dataclass(frozen=True)
class View:
    """How a picture came to its size: `original` px as found, scaled to `resized`, cut at (top, left)."""

    original: int
    resized: int
    top: int
    left: int

    def time_ids(self, size: int) -> tuple[int, ...]:
        """(6,): original height and width, crop top and left, target height and width, as SDXL orders them."""
        return (self.original, self.original, self.top, self.left, size, size)


def whole(size: int) -> View:
    """The view that the pipelines assume when nothing is said."""
    return View(size, size, 0, 0)


def sample_view(rng: np.random.Generator, size: int) -> View:
    """Most pictures are whole and of native size; some were small (and are blurred), large, or are cut out."""
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


def look(picture_at, view: View, size: int) -> np.ndarray:
    """(size,size,3) uint8: the picture through the view. `picture_at(n)` draws it at n x n as (n,n,3) uint8.

    A picture that was larger than `resized` is drawn at `resized`: the same as drawing it large and shrinking it.
    """
    array = picture_at(min(view.original, view.resized))
    if array.shape[0] < view.resized:
        array = cv2.resize(array, (view.resized, view.resized), interpolation=cv2.INTER_CUBIC)
    return array[view.top : view.top + size, view.left : view.left + size]


def scene_picture(scene: shapes.Scene, view: View, size: int) -> np.ndarray:
    """(size,size,3) uint8."""
    return look(lambda n: np.asarray(shapes.render(scene, n)), view, size)


def emoji_picture(rgba: np.ndarray, background: str, view: View, size: int) -> np.ndarray:
    """(size,size,3) uint8: an emoji (n,n,4) uint8 on a colour."""

    def picture_at(n: int) -> np.ndarray:
        layer = np.asarray(Image.fromarray(rgba).resize((n, n), Image.Resampling.BOX), np.float32)
        alpha = layer[..., 3:] / 255
        color = np.asarray(shapes.COLORS[background], np.float32)
        return np.rint(color + alpha * (layer[..., :3] - color)).astype(np.uint8)

    return look(picture_at, view, size)
