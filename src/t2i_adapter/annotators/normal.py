"""Normals of a depth map: which way each place faces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from PIL import Image

from t2i_adapter.annotators.mirror import Kind
from t2i_adapter.annotators.registry import Polarity, open_annotator
from t2i_adapter.errors import UserError


class Normal:
    """Which way surfaces face, from a depth map: red right, green up, blue towards the viewer."""

    @dataclass(frozen=True)
    class Options:
        """`depth` names the kind that makes the depth map; empty, the picture itself is one, near is white. `relief` is
        how deep it goes from black to white, of the picture's shorter side, and `smooth` the sigma, in pixels, that
        evens out its 256 steps."""

        depth: str = ""
        relief: float = 0.5
        smooth: float = 1.0

        def __post_init__(self) -> None:
            if not 0 < self.relief <= 100:
                raise UserError(f"normal: relief={self.relief:g}; allowed is above 0 up to 100.")
            if not 0 <= self.smooth <= 100:
                raise UserError(f"normal: smooth={self.smooth:g}; allowed is 0 to 100 pixels.")

    version = 1
    channels: Literal[1, 3] = 3
    kind: Kind = "normal"
    polarity: Polarity = "none"
    levels: Literal[2, 256] = 256
    licence = "Apache-2.0"
    weights = ""
    needs = ""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._depth = open_annotator(options.depth) if options.depth else None
        self.chance = self._depth is not None and self._depth.chance
        if self._depth:
            self.version = 1000 * self._depth.version + Normal.version  # another depth map, other normals

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        depth = np.asarray((self._depth.make(image, rng) if self._depth else image).convert("L"), np.float32) / 255
        if self._options.smooth:
            depth = cv2.GaussianBlur(depth, (0, 0), self._options.smooth)
        height = self._options.relief * min(image.size) * depth  # towards the viewer, in pixels
        normals = np.stack([-_slope(height, 1), _slope(height, 0), np.ones_like(height)], axis=2)  # rows go down
        normals /= np.linalg.norm(normals, axis=2, keepdims=True)
        return Image.fromarray(np.rint((normals + 1) * 127.5).astype(np.uint8))


def _slope(height: np.ndarray, axis: int) -> np.ndarray:
    """Rise per pixel along an axis, (H,W); 0 where there is but one pixel."""
    return np.gradient(height, axis=axis) if height.shape[axis] > 1 else np.zeros_like(height)
