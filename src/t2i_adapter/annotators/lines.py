"""Straight lines, for buildings and rooms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from PIL import Image

from t2i_adapter.annotators.mirror import Kind
from t2i_adapter.annotators.registry import Polarity
from t2i_adapter.errors import UserError

LEAST_SIDE = 8
"""Pixels under which a picture has no lines; OpenCV's detector fails on some smaller ones."""
PEN = 1 / 512
"""Width of what is drawn, of the shorter side; one pixel at least."""


class Lines:
    """Straight line segments, found by OpenCV's LSD (von Gioi et al., 2010)."""

    @dataclass(frozen=True)
    class Options:
        """Segments shorter than `shortest`, of the picture's shorter side, are left out."""

        shortest: float = 0.04

        def __post_init__(self) -> None:
            if not 0 <= self.shortest <= 1:
                raise UserError(f"lines: shortest={self.shortest:g}; allowed is 0 to 1, of the shorter side.")

    version = 1
    channels: Literal[1, 3] = 1
    kind: Kind = "map"
    polarity: Polarity = "white on black"
    levels: Literal[2, 256] = 2
    licence = "Apache-2.0 (OpenCV)"
    weights = ""
    needs = ""

    def __init__(self, options: Options) -> None:
        self._options = options

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        side = min(image.size)
        paper = np.zeros((image.height, image.width), np.uint8)
        for start, end in _segments(image) if side >= LEAST_SIDE else ():
            if np.hypot(*(end - start)) >= self._options.shortest * side:
                a, b = (tuple(np.rint(point).astype(int).tolist()) for point in (start, end))
                cv2.line(paper, a, b, 255, max(1, round(PEN * side)))
        return Image.fromarray(paper)


def _segments(image: Image.Image) -> np.ndarray:
    """(N,2,2) float32: each segment's ends, (x, y) in pixels."""
    found = cv2.createLineSegmentDetector().detect(np.asarray(image.convert("L")))[0]
    return np.zeros((0, 2, 2), np.float32) if found is None else found.reshape(-1, 2, 2)
