"""The main object's silhouette, by colour alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from PIL import Image

from t2i_adapter.annotators.mirror import Kind
from t2i_adapter.annotators.registry import Polarity
from t2i_adapter.errors import UserError

LARGEST = 256
"""Longer side, in pixels, at which the cut is sought; its time grows with the area."""
LEAST_SIDE = 8
"""Pixels under which a picture has no mask."""
ROUNDS = 3
SEED = 0  # OpenCV's mixture models start by chance


class Mask:
    """Silhouette of what stands in the middle, by GrabCut (Rother et al., 2004); black where nothing does."""

    @dataclass(frozen=True)
    class Options:
        """`margin`, of each side of the picture, is taken to be ground at the start."""

        margin: float = 0.03

        def __post_init__(self) -> None:
            if not 0 < self.margin < 0.5:
                raise UserError(f"mask: margin={self.margin:g}; allowed is between 0 and 0.5.")

    version = 1
    channels: Literal[1, 3] = 1
    kind: Kind = "map"
    polarity: Polarity = "white on black"
    levels: Literal[2, 256] = 2
    licence = "Apache-2.0 (OpenCV)"
    weights = ""
    needs = ""

    def __init__(self, options: Options) -> None:
        self._margin = options.margin

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        small = image.copy()
        small.thumbnail((LARGEST, LARGEST))
        if min(small.size) < LEAST_SIDE:
            return Image.new("L", image.size)
        inside = Image.fromarray(_cut_out(np.asarray(small), self._margin))
        grown = inside.resize(image.size, Image.Resampling.BILINEAR)
        return grown.point([0] * 128 + [255] * 128)


def _cut_out(values: np.ndarray, margin: float) -> np.ndarray:
    """(H,W,3) u8 -> (H,W) u8, 255 on the object."""
    height, width = values.shape[:2]
    top, left = max(1, round(margin * height)), max(1, round(margin * width))
    labels = np.zeros((height, width), np.uint8)
    box = left, top, width - 2 * left, height - 2 * top
    cv2.setRNGSeed(SEED)
    cv2.grabCut(values, labels, box, np.zeros((1, 65)), np.zeros((1, 65)), ROUNDS, cv2.GC_INIT_WITH_RECT)
    return np.where((labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD), 255, 0).astype(np.uint8)
