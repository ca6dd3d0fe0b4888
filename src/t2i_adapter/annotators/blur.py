"""The image out of focus, for adapters that sharpen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from PIL import Image

from t2i_adapter.annotators.mirror import Kind
from t2i_adapter.annotators.registry import Polarity
from t2i_adapter.errors import UserError


class Blur:
    """The image under a Gaussian blur, for sharpening."""

    @dataclass(frozen=True)
    class Options:
        """`sigma` of the Gaussian, of the picture's shorter side."""

        sigma: float = 0.01

        def __post_init__(self) -> None:
            if not 0 < self.sigma <= 0.5:
                raise UserError(f"blur: sigma={self.sigma:g}; allowed is above 0 up to 0.5, of the shorter side.")

    version = 1
    channels: Literal[1, 3] = 3
    kind: Kind = "map"
    polarity: Polarity = "none"
    levels: Literal[2, 256] = 256
    licence = "Apache-2.0 (OpenCV)"
    weights = ""
    needs = ""

    def __init__(self, options: Options) -> None:
        self._sigma = options.sigma

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        return Image.fromarray(cv2.GaussianBlur(np.asarray(image), (0, 0), max(0.1, self._sigma * min(image.size))))
