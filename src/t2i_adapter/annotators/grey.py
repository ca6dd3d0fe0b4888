"""The image's brightness, for adapters that colour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from t2i_adapter.annotators.mirror import Kind
from t2i_adapter.annotators.registry import Polarity


class Grey:
    """Brightness: luma (ITU-R 601), as Pillow converts."""

    @dataclass(frozen=True)
    class Options:
        """None."""

    version = 1
    channels: Literal[1, 3] = 1
    kind: Kind = "map"
    polarity: Polarity = "none"
    levels: Literal[2, 256] = 256
    licence = "Apache-2.0"
    weights = ""
    needs = ""

    def __init__(self, options: Options) -> None:
        pass

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        return image.convert("L")
