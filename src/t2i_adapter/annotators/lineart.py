"""Line drawing without a network: what is darker than its surroundings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from PIL import Image

from t2i_adapter.annotators.mirror import Kind
from t2i_adapter.annotators.registry import Polarity
from t2i_adapter.errors import UserError

FAINT = 8.0
"""Grey levels under which a difference is no line: the others' median sets the contrast."""
LEAST = 16.0
"""Grey levels that the median is at least taken to be, so that noise is not blown up."""
INK = 127.0
"""What the median line becomes."""


class Lineart:
    """Line drawing with soft strokes, by the formula known as lineart "standard"."""

    @dataclass(frozen=True)
    class Options:
        """`sigma` of the Gaussian that tells the surroundings, in pixels."""

        sigma: float = 6.0

        def __post_init__(self) -> None:
            if not 0.1 <= self.sigma <= 100:
                raise UserError(f"lineart: sigma={self.sigma:g}; allowed is 0.1 to 100 pixels.")

    version = 1
    channels: Literal[1, 3] = 1
    kind: Kind = "map"
    polarity: Polarity = "white on black"
    levels: Literal[2, 256] = 256
    licence = "Apache-2.0"
    weights = ""
    needs = ""

    def __init__(self, options: Options) -> None:
        self._sigma = options.sigma

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        values = np.asarray(image, np.float32)
        darker = (cv2.GaussianBlur(values, (0, 0), self._sigma) - values).min(axis=2).clip(0, 255)
        lines = darker[darker > FAINT]
        contrast = max(LEAST, float(np.median(lines))) if lines.size else LEAST
        return Image.fromarray((darker * (INK / contrast)).clip(0, 255).astype(np.uint8))
