"""Maps that keep the image's colours or brightness and drop its detail: palette, tile, blur, grey."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from t2i_adapter.annotators.registry import Facts
from t2i_adapter.errors import UserError

LEAST_CELLS = 8
"""Cells along the shorter side of a small image: as many as an image of 512 pixels has by default."""


@dataclass(frozen=True)
class Palette:
    """Coarse cells of colour: scaled down by 64 bicubic and back up by nearest, as T2I-Adapter's colour map.

    `cell` is a cell's side in pixels. The cells are smaller if the image would have fewer than 8 along a side.
    """

    facts = Facts(channels=3, licence="Apache-2.0")
    cell: int = 64

    def __post_init__(self) -> None:
        if self.cell < 1:
            raise UserError(f"cell={self.cell}; allowed is 1 pixel or more.")

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        cell = min(self.cell, max(1, min(image.size) / LEAST_CELLS))
        width, height = (max(1, round(side / cell)) for side in image.size)
        cells = image.resize((width, height), Image.Resampling.BICUBIC)
        return cells.resize(image.size, Image.Resampling.NEAREST)


@dataclass(frozen=True)
class Tile:
    """The image in low resolution, for adapters that add detail: averaged down, then bicubic up.

    `factor` is the ratio by which both sides are scaled down.
    """

    facts = Facts(channels=3, licence="Apache-2.0")
    factor: float = 8.0

    def __post_init__(self) -> None:
        if not 1 <= self.factor <= 1024:
            raise UserError(f"factor={self.factor:g}; allowed is 1 to 1024.")

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        width, height = (max(1, round(side / self.factor)) for side in image.size)
        small = image.resize((width, height), Image.Resampling.BOX)
        return small.resize(image.size, Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Blur:
    """The image under a Gaussian blur, for adapters that sharpen.

    `sigma` of the Gaussian is relative to the image's shorter side.
    """

    facts = Facts(channels=3, licence="Apache-2.0 (OpenCV)")
    sigma: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.sigma <= 0.5:
            raise UserError(f"sigma={self.sigma:g}; allowed is above 0 up to 0.5, of the shorter side.")

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        return Image.fromarray(cv2.GaussianBlur(np.asarray(image), (0, 0), max(0.1, self.sigma * min(image.size))))


@dataclass(frozen=True)
class Grey:
    """Brightness, for adapters that colour: luma (ITU-R 601), as Pillow converts."""

    facts = Facts(licence="Apache-2.0")

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        return image.convert("L")
