"""How well a picture follows its condition: pure functions on arrays, each picture against its own pair's truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from t2i_adapter.evaluation.color import ciede2000, srgb_to_lab
from t2i_adapter.evaluation.figure import figure_mask

TOLERANCE = 2 / 128  # of the picture's shorter side: two pixels at 128


@dataclass(frozen=True)
class NamedColor:
    """A colour that the prompt asks for: sRGB 0 to 255, and the share of its region that it should fill, (0, 1]."""

    rgb: tuple[int, int, int]
    share: float


@dataclass(frozen=True)
class Truth:
    """What a pair's picture should show.

    Attributes:
        mask: (H,W) bool, True where an object is to be.
        objects: the objects' colours, shares of the figure; empty where they are not known.
        ground: the background's main colour; None where it is not known.
    """

    mask: np.ndarray
    objects: tuple[NamedColor, ...] = ()
    ground: NamedColor | None = None


def measure(image: np.ndarray, truth: Truth) -> dict[str, float]:
    """All metrics of one picture, (H,W,3) uint8 sRGB; colour errors only where the truth knows the colours."""
    figure = figure_mask(image)
    tolerance = TOLERANCE * min(truth.mask.shape)
    values = {"iou": iou(figure, truth.mask), "edge_f1": edge_f1(figure, truth.mask, tolerance)}
    if truth.objects:
        values["object_color"] = color_error(image, figure, truth.objects)
    if truth.ground:
        values["background_color"] = color_error(image, ~figure, (truth.ground,))
    return values


def iou(got: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two (H,W) bool masks, 0 to 1; two empty masks agree."""
    union = np.count_nonzero(got | truth)
    return np.count_nonzero(got & truth) / union if union else 1.0


def edge_f1(got: np.ndarray, truth: np.ndarray, tolerance: float) -> float:
    """F1 of two masks' outlines, 0 to 1: an outline's pixel counts where the other outline is within `tolerance` px.

    Precision is the share of `got`'s outline that lies near `truth`'s, recall the share of `truth`'s near `got`'s.
    """
    return lines_f1(outline(got), outline(truth), tolerance)


def lines_f1(a: np.ndarray, b: np.ndarray, tolerance: float) -> float:
    """F1 of two (H,W) bool drawings, 0 to 1: what is set in one counts where the other is set within `tolerance` px.

    Two empty drawings agree.
    """
    if not a.any() or not b.any():
        return float(a.any() == b.any())
    precision = np.mean(_distance_to(b)[a] <= tolerance)
    recall = np.mean(_distance_to(a)[b] <= tolerance)
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def condition_agreement(got: np.ndarray, wanted: np.ndarray, levels: int) -> dict[str, float]:
    """How near two condition maps are, both (H,W) or (H,W,3) uint8: `condition_f1` of two-valued maps, of others
    `condition_error`, the root of the mean squared difference, 0 to 1."""
    if levels == 2:
        a, b = (np.asarray(np.atleast_3d(values).max(axis=2) >= 128) for values in (got, wanted))
        return {"condition_f1": lines_f1(a, b, TOLERANCE * min(a.shape))}
    return {"condition_error": float(np.sqrt(np.mean((got / 255.0 - wanted / 255.0) ** 2)))}


def outline(mask: np.ndarray) -> np.ndarray:
    """(H,W) bool -> (H,W) bool: a mask's outermost pixels. The picture's own frame is no outline."""
    inner = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8), borderValue=1)
    return mask & (inner == 0)


def _distance_to(mask: np.ndarray) -> np.ndarray:
    """(H,W) float: distance in pixels to the mask's nearest pixel."""
    return cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def color_error(image: np.ndarray, region: np.ndarray, colors: Sequence[NamedColor]) -> float:
    """Mean over `colors` of the CIEDE2000 difference to the region's pixels, 0 (the very colour) to about 100.

    Each colour claims its share of the region: the pixels that are nearest to it; their median difference counts.
    So it does not matter where an object stands, only whether something in its colour is there, as large as asked.
    Without a region (no object was drawn) the whole picture is taken: the error is then the ground's, and large.
    """
    pixels = srgb_to_lab(image[region] if region.any() else image.reshape(-1, 3))
    errors = []
    for color in colors:
        wanted = srgb_to_lab(np.asarray(color.rgb, np.uint8))
        differences = np.sort(ciede2000(pixels, np.broadcast_to(wanted, pixels.shape)))
        claimed = max(1, round(color.share * len(differences)))
        errors.append(np.median(differences[:claimed]))
    return float(np.mean(errors))


@dataclass(frozen=True)
class Estimate:
    """A mean over pairs with the ends of its 95 % interval."""

    mean: float
    low: float
    high: float

    def to_json(self) -> dict[str, object]:
        return {"mean": self.mean, "ci95": [self.low, self.high]}


def bootstrap(values: Sequence[float], seed: int, resamples: int = 10_000) -> Estimate:
    """The mean of one value a pair, and its percentile bootstrap interval: pairs are redrawn with replacement."""
    array = np.asarray(values, np.float64)
    draws = np.random.default_rng(seed).integers(len(array), size=(resamples, len(array)))
    low, high = np.quantile(array[draws].mean(axis=1), [0.025, 0.975])
    return Estimate(float(array.mean()), float(low), float(high))
