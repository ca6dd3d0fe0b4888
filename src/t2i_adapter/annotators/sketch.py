"""Pen sketch by extended difference of Gaussians (Winnemoeller et al., Computers & Graphics 2012)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from PIL import Image

from t2i_adapter.annotators.mirror import Kind
from t2i_adapter.annotators.registry import Polarity
from t2i_adapter.errors import UserError

SIDE = 512
"""Shorter side, in pixels, for which `sigma` is given."""
WIDER = 1.6
"""The second Gaussian's sigma over the first's: the difference is then near the Laplacian."""
EPSILON = -0.004
"""Differences, of brightness in [0,1], above this are paper; under 0, so that flat places are, dark ones too."""
OFFICIAL = (0.3, 0.8)
"""From where the official SDXL sketch adapter's recipe draws each picture's threshold."""


class Sketch:
    """Pen strokes where the image is darker than beside it, one pen and no greys."""

    @dataclass(frozen=True)
    class Options:
        """`sigma` is the stroke's width in pixels of a picture of 512 and grows with it; a stroke's strength, 0 to 1,
        rises with `gain` and is drawn above `threshold`. `random_threshold` draws that anew each time, evenly from
        0.3 to 0.8."""

        sigma: float = 1.0
        gain: float = 50.0
        threshold: float = 0.5
        random_threshold: bool = False

        def __post_init__(self) -> None:
            if not 0.1 <= self.sigma <= 20:
                raise UserError(f"sketch: sigma={self.sigma:g}; allowed is 0.1 to 20 pixels.")
            if not 0 < self.gain <= 1000:
                raise UserError(f"sketch: gain={self.gain:g}; allowed is above 0 up to 1000.")
            if not 0 < self.threshold < 1:
                raise UserError(f"sketch: threshold={self.threshold:g}; allowed is between 0 and 1.")

    version = 1
    channels: Literal[1, 3] = 1
    kind: Kind = "map"
    polarity: Polarity = "white on black"
    levels: Literal[2, 256] = 2
    licence = "Apache-2.0"
    weights = ""
    needs = ""

    def __init__(self, options: Options) -> None:
        self._options = options
        self.chance = options.random_threshold

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        options = self._options
        threshold = options.threshold if rng is None else rng.uniform(*OFFICIAL)
        return Image.fromarray(np.where(strokes(image, options.sigma, options.gain) > threshold, 255, 0).astype("u1"))


def strokes(image: Image.Image, sigma: float, gain: float) -> np.ndarray:
    """(H,W) float32, 0 where there is no stroke, up to 1."""
    grey = np.asarray(image.convert("L"), np.float32) / 255
    width = max(0.3, sigma * min(grey.shape) / SIDE)
    difference = cv2.GaussianBlur(grey, (0, 0), width) - cv2.GaussianBlur(grey, (0, 0), WIDER * width)
    return np.tanh(gain * np.maximum(EPSILON - difference, 0))
