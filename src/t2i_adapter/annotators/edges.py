"""Edges, lines and strokes by formulas that need no weights: canny, lineart, sketch, scribble, lines."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from t2i_adapter.annotators.registry import Facts
from t2i_adapter.errors import UserError

LINEART_FAINT = 8.0
"""Grey levels; smaller differences are no lines and do not count in the median."""
LINEART_LEAST = 16.0
"""Grey levels; lower bound of the median, so that noise is not amplified."""
LINEART_INK = 127.0
"""Value of a line as dark as the median."""

SKETCH_SIDE = 512
"""Shorter side in pixels to which `Sketch.sigma` refers."""
SKETCH_RATIO = 1.6
"""Second Gaussian's sigma over the first's; their difference then approximates the Laplacian."""
SKETCH_EPSILON = -0.004
"""Differences of brightness, in [0,1], above this are no stroke. Below 0, so that flat areas have none."""
SKETCH_THRESHOLDS = (0.3, 0.8)
"""Range of the random threshold in the recipe of SDXL's official sketch adapter."""

SCRIBBLE_SIDE, SCRIBBLE_LONGEST = 256, 1024
"""Shorter side in pixels at which outlines are detected, and upper bound of the longer side there."""
SCRIBBLE_BLUR = 2.0
"""Sigma in pixels of the blur that removes details before the detection."""
SCRIBBLE_CANNY = (15, 40)
"""Canny's thresholds of the detection."""

LINES_LEAST_SIDE = 8
"""Pixels; smaller images have no lines, because OpenCV's detector fails on some of them."""
LINES_PEN = 1 / 512
"""Width of the drawn lines over the image's shorter side; one pixel at least."""


@dataclass(frozen=True)
class Canny:
    """Edges one pixel wide, by Canny's detector.

    A gradient above `high` starts an edge, a gradient above `low` continues one; Sobel 3 x 3 of 8-bit grey levels. With
    `vary` above 0 each draw multiplies both thresholds by a random number from 1 / (1 + vary) to 1 + vary, as often
    below 1 as above, so the adapter learns from fine and from coarse edges.
    """

    facts = Facts(polarity="white on black", levels=2, licence="Apache-2.0 (OpenCV)")
    low: float = 100.0
    high: float = 200.0
    vary: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise UserError(f"low={self.low:g}, high={self.high:g}; needed is 0 <= low <= high.")
        if not 0 <= self.vary <= 10:
            raise UserError(f"vary={self.vary:g}; allowed is 0 to 10.")

    @property
    def chance(self) -> bool:
        return self.vary > 0

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        factor = 1.0 if rng is None else (1 + self.vary) ** rng.uniform(-1, 1)
        return Image.fromarray(cv2.Canny(np.asarray(image), self.low * factor, self.high * factor))


@dataclass(frozen=True)
class Lineart:
    """Line drawing with soft strokes, by the formula known as lineart "standard".

    `sigma`, in pixels, is the width of the Gaussian that averages a pixel's surroundings.
    """

    facts = Facts(polarity="white on black", licence="Apache-2.0")
    sigma: float = 6.0

    def __post_init__(self) -> None:
        if not 0.1 <= self.sigma <= 100:
            raise UserError(f"sigma={self.sigma:g}; allowed is 0.1 to 100 pixels.")

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        values = np.asarray(image, np.float32)
        darker = (cv2.GaussianBlur(values, (0, 0), self.sigma) - values).min(axis=2).clip(0, 255)
        lines = darker[darker > LINEART_FAINT]
        contrast = max(LINEART_LEAST, float(np.median(lines))) if lines.size else LINEART_LEAST
        return Image.fromarray((darker * (LINEART_INK / contrast)).clip(0, 255).astype(np.uint8))


@dataclass(frozen=True)
class Sketch:
    """Strokes of one pen, without greys, where the image is darker than its surroundings.

    `sigma` is the stroke's width in pixels of an image of 512, and grows with the image. A stroke's strength, 0 to 1,
    rises with `gain`; strokes stronger than `threshold` are drawn. With `random_threshold` each draw takes a random
    threshold from 0.3 to 0.8.
    """

    facts = Facts(polarity="white on black", levels=2, licence="Apache-2.0")
    sigma: float = 1.0
    gain: float = 50.0
    threshold: float = 0.5
    random_threshold: bool = False

    def __post_init__(self) -> None:
        if not 0.1 <= self.sigma <= 20:
            raise UserError(f"sigma={self.sigma:g}; allowed is 0.1 to 20 pixels.")
        if not 0 < self.gain <= 1000:
            raise UserError(f"gain={self.gain:g}; allowed is above 0 up to 1000.")
        if not 0 < self.threshold < 1:
            raise UserError(f"threshold={self.threshold:g}; allowed is between 0 and 1.")

    @property
    def chance(self) -> bool:
        return self.random_threshold

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        threshold = self.threshold if rng is None else rng.uniform(*SKETCH_THRESHOLDS)
        return Image.fromarray(np.where(strokes(image, self.sigma, self.gain) > threshold, 255, 0).astype("u1"))


def strokes(image: Image.Image, sigma: float, gain: float) -> np.ndarray:
    """Returns the strokes' strength: (H,W) float32 in [0,1], 0 without a stroke."""
    grey = np.asarray(image.convert("L"), np.float32) / 255
    width = max(0.3, sigma * min(grey.shape) / SKETCH_SIDE)
    difference = cv2.GaussianBlur(grey, (0, 0), width) - cv2.GaussianBlur(grey, (0, 0), SKETCH_RATIO * width)
    return np.tanh(gain * np.maximum(SKETCH_EPSILON - difference, 0))


@dataclass(frozen=True)
class Scribble:
    """The main outlines in few strokes of a thick pen, like a quick drawing by hand.

    All options are relative to the image's shorter side: `pen` is the strokes' width, outlines shorter than `shortest`
    are not drawn, and a stroke deviates from its outline by up to `careless`.
    """

    facts = Facts(polarity="white on black", levels=2, licence="Apache-2.0 (OpenCV)")
    pen: float = 0.008
    shortest: float = 0.1
    careless: float = 0.006

    def __post_init__(self) -> None:
        for name in ("pen", "shortest", "careless"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UserError(f"{name}={value:g}; allowed is 0 to 1, of the shorter side.")

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        side = min(image.size)
        scale = min(SCRIBBLE_SIDE / side, SCRIBBLE_LONGEST / max(image.size))
        width, height = (max(1, round(scale * length)) for length in image.size)
        small = image.convert("L").resize((width, height))
        edges = cv2.Canny(cv2.GaussianBlur(np.asarray(small), (0, 0), SCRIBBLE_BLUR), *SCRIBBLE_CANNY)
        outlines, _ = cv2.findContours(edges, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        small_side = scale * side
        drawn = [
            # OpenCV's coordinates count from the centres of pixels
            np.rint((cv2.approxPolyDP(outline, self.careless * small_side, closed=True) + 0.5) / scale - 0.5).astype(
                int
            )
            for outline in outlines
            if cv2.arcLength(outline, closed=True)
            >= 2 * self.shortest * small_side  # an open line is traced there and back
        ]
        paper = np.zeros((image.height, image.width), np.uint8)
        cv2.polylines(paper, drawn, isClosed=True, color=255, thickness=max(1, round(self.pen * side)))
        return Image.fromarray(paper)


@dataclass(frozen=True)
class Lines:
    """Straight line segments, by OpenCV's LSD (von Gioi et al., 2010).

    Segments shorter than `shortest`, relative to the image's shorter side, are not drawn.
    """

    facts = Facts(polarity="white on black", levels=2, licence="Apache-2.0 (OpenCV)")
    shortest: float = 0.04

    def __post_init__(self) -> None:
        if not 0 <= self.shortest <= 1:
            raise UserError(f"shortest={self.shortest:g}; allowed is 0 to 1, of the shorter side.")

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        side = min(image.size)
        paper = np.zeros((image.height, image.width), np.uint8)
        for start, end in _segments(image) if side >= LINES_LEAST_SIDE else ():
            if np.hypot(*(end - start)) >= self.shortest * side:
                a, b = (tuple(np.rint(point).astype(int).tolist()) for point in (start, end))
                cv2.line(paper, a, b, 255, max(1, round(LINES_PEN * side)))
        return Image.fromarray(paper)


def _segments(image: Image.Image) -> np.ndarray:
    """(N,2,2) float32: both ends (x, y) of each segment, in pixels."""
    found = cv2.createLineSegmentDetector().detect(np.asarray(image.convert("L")))[0]
    return np.zeros((0, 2, 2), np.float32) if found is None else found.reshape(-1, 2, 2)
