"""A quick hand's drawing: the main outlines alone, in few straight strokes of a thick pen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from PIL import Image

from t2i_adapter.annotators.mirror import Kind
from t2i_adapter.annotators.registry import Polarity
from t2i_adapter.errors import UserError

SIDE, LONGEST = 256, 1024
"""Pixels of the shorter side at which outlines are looked for, and of the longer side at most."""
SMOOTH = 2.0
"""Sigma of the blur that detail is lost in, and Canny's thresholds after it, both there."""
EDGE = (15, 40)


class Scribble:
    """The main outlines in few strokes of a thick pen, as a quick hand draws them."""

    @dataclass(frozen=True)
    class Options:
        """All of the picture's shorter side: `pen` is the strokes' width, outlines shorter than `shortest` are left
        out, and strokes leave them by up to `careless`."""

        pen: float = 0.008
        shortest: float = 0.1
        careless: float = 0.006

        def __post_init__(self) -> None:
            for name in ("pen", "shortest", "careless"):
                value = getattr(self, name)
                if not 0 <= value <= 1:
                    raise UserError(f"scribble: {name}={value:g}; allowed is 0 to 1, of the shorter side.")

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
        scale = min(SIDE / side, LONGEST / max(image.size))
        width, height = (max(1, round(scale * length)) for length in image.size)
        small = image.convert("L").resize((width, height))
        edges = cv2.Canny(cv2.GaussianBlur(np.asarray(small), (0, 0), SMOOTH), *EDGE)
        outlines, _ = cv2.findContours(edges, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        options, wide = self._options, scale * side
        strokes = [
            # pixels are squares, and OpenCV counts from their centres
            np.rint((cv2.approxPolyDP(outline, options.careless * wide, closed=True) + 0.5) / scale - 0.5).astype(int)
            for outline in outlines
            if cv2.arcLength(outline, closed=True) >= 2 * options.shortest * wide  # an open line's runs there and back
        ]
        paper = np.zeros((image.height, image.width), np.uint8)
        cv2.polylines(paper, strokes, isClosed=True, color=255, thickness=max(1, round(options.pen * side)))
        return Image.fromarray(paper)
