"""The colours of the image, roughly where they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from t2i_adapter.annotators.mirror import Kind
from t2i_adapter.annotators.registry import Polarity
from t2i_adapter.errors import UserError

FEWEST = 8
"""Cells along the shorter side of a small picture: what 512 pixels have at the usual cell."""


class Palette:
    """Coarse cells of colour: scaled down by 64 bicubic and back by nearest, as T2I-Adapter's colour map."""

    @dataclass(frozen=True)
    class Options:
        """`cell` is a cell's side in pixels; pictures that would have fewer than 8 cells have 8 smaller ones."""

        cell: int = 64

        def __post_init__(self) -> None:
            if self.cell < 1:
                raise UserError(f"palette: cell={self.cell}; allowed is 1 pixel or more.")

    version = 1
    channels: Literal[1, 3] = 3
    kind: Kind = "map"
    polarity: Polarity = "none"
    levels: Literal[2, 256] = 256
    licence = "Apache-2.0"
    weights = ""
    needs = ""

    def __init__(self, options: Options) -> None:
        self._cell = options.cell

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        cell = min(self._cell, max(1, min(image.size) / FEWEST))
        width, height = (max(1, round(side / cell)) for side in image.size)
        cells = image.resize((width, height), Image.Resampling.BICUBIC)
        return cells.resize(image.size, Image.Resampling.NEAREST)
