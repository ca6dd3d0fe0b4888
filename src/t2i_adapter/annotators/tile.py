"""The image in low resolution, for adapters that add detail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from t2i_adapter.annotators.mirror import Kind
from t2i_adapter.annotators.registry import Polarity
from t2i_adapter.errors import UserError


class Tile:
    """The image scaled down by averaging and back up, for adding detail."""

    @dataclass(frozen=True)
    class Options:
        """`factor` by which the sides are scaled down."""

        factor: float = 8.0

        def __post_init__(self) -> None:
            if not 1 <= self.factor <= 1024:
                raise UserError(f"tile: factor={self.factor:g}; allowed is 1 to 1024.")

    version = 1
    channels: Literal[1, 3] = 3
    kind: Kind = "map"
    polarity: Polarity = "none"
    levels: Literal[2, 256] = 256
    licence = "Apache-2.0"
    weights = ""
    needs = ""

    def __init__(self, options: Options) -> None:
        self._factor = options.factor

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        width, height = (max(1, round(side / self._factor)) for side in image.size)
        small = image.resize((width, height), Image.Resampling.BOX)
        return small.resize(image.size, Image.Resampling.BICUBIC)
