"""Canny edges, white on black, by OpenCV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from PIL import Image

from t2i_adapter.annotators.mirror import Kind
from t2i_adapter.annotators.registry import Polarity
from t2i_adapter.errors import UserError


class Canny:
    """Edges of the image, one pixel wide."""

    @dataclass(frozen=True)
    class Options:
        """Gradients above `high` start an edge, those above `low` continue one; of 8-bit grey levels, Sobel, 3 x 3.

        With `vary` above 0 both thresholds are multiplied by one number, drawn each time between 1 / (1 + vary) and
        1 + vary, as often above 1 as below: an adapter that saw fine and coarse edges takes either.
        """

        low: float = 100.0
        high: float = 200.0
        vary: float = 0.0

        def __post_init__(self) -> None:
            if not 0 <= self.low <= self.high:
                raise UserError(f"canny: low={self.low:g}, high={self.high:g}; needed is 0 <= low <= high.")
            if not 0 <= self.vary <= 10:
                raise UserError(f"canny: vary={self.vary:g}; allowed is 0 to 10.")

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
        self.chance = options.vary > 0

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        options = self._options
        factor = 1.0 if rng is None else (1 + options.vary) ** rng.uniform(-1, 1)
        return Image.fromarray(cv2.Canny(np.asarray(image), options.low * factor, options.high * factor))
