"""Metrics of how well a picture follows its condition: pure functions that compare it with its own pair's truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from t2i_adapter.evaluation.color import ciede2000, srgb_to_lab
from t2i_adapter.evaluation.foreground import foreground_mask

TOLERANCE = 2 / 128
"""Tolerance of outlines and lines, as a share of the picture's shorter side: two pixels at 128."""


@dataclass(frozen=True)
class NamedColor:
    """A colour that the prompt names: sRGB 0 to 255, and the share of its region that it should fill, (0, 1]."""

    rgb: tuple[int, int, int]
    share: float


@dataclass(frozen=True)
class Truth:
    """What a picture of a pair should show.

    Attributes:
        mask: (H,W) bool, True for the pixels of objects.
        objects: the objects' colours, with their shares of the mask; empty if unknown.
        background: the background's main colour; None if unknown.
    """

    mask: np.ndarray
    objects: tuple[NamedColor, ...] = ()
    background: NamedColor | None = None


def measure(image: np.ndarray, truth: Truth) -> dict[str, float]:
    """Returns all metrics of one picture, (H,W,3) uint8 sRGB; colour errors only if the truth has colours."""
    foreground = foreground_mask(image)
    tolerance = TOLERANCE * min(truth.mask.shape)
    values = {"iou": iou(foreground, truth.mask), "edge_f1": edge_f1(foreground, truth.mask, tolerance)}
    if truth.objects:
        values["object_color"] = color_error(image, foreground, truth.objects)
    if truth.background:
        values["background_color"] = color_error(image, ~foreground, (truth.background,))
    return values


def iou(got: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two (H,W) bool masks, 0 to 1; 1 for two empty masks."""
    union = np.count_nonzero(got | truth)
    return np.count_nonzero(got & truth) / union if union else 1.0


def edge_f1(got: np.ndarray, truth: np.ndarray, tolerance: float) -> float:
    """F1 of two masks' outlines, 0 to 1. A pixel matches if the other outline is within `tolerance` px.

    Precision is the share of `got`'s outline that matches, recall the share of `truth`'s outline that matches.
    """
    return lines_f1(outline(got), outline(truth), tolerance)


def lines_f1(a: np.ndarray, b: np.ndarray, tolerance: float) -> float:
    """F1 of the True pixels of two (H,W) bool maps, 0 to 1; 1 for two empty maps.

    A pixel matches if the other map has a True pixel within `tolerance` px.
    """
    return lines_curve(a, b, (tolerance,))[0]


def lines_curve(a: np.ndarray, b: np.ndarray, tolerances: Sequence[float]) -> list[float]:
    """Returns `lines_f1` of two (H,W) bool maps at each tolerance in px, from one pair of distance transforms."""
    if not a.any() or not b.any():
        return [float(a.any() == b.any())] * len(tolerances)
    to_b, to_a = _distance_to(b)[a], _distance_to(a)[b]
    found = [(np.mean(to_b <= tolerance), np.mean(to_a <= tolerance)) for tolerance in tolerances]
    return [float(2 * p * r / (p + r)) if p + r else 0.0 for p, r in found]


def condition_agreement(got: np.ndarray, wanted: np.ndarray, levels: int) -> dict[str, float]:
    """Compares two condition maps, both (H,W) or (H,W,3) uint8.

    Returns `condition_f1` for maps of two levels, else `condition_error`, the root mean squared difference, 0 to 1.
    """
    if levels == 2:
        a, b = is_drawn(got), is_drawn(wanted)
        return {"condition_f1": lines_f1(a, b, TOLERANCE * min(a.shape))}
    return {"condition_error": float(np.sqrt(np.mean((got / 255.0 - wanted / 255.0) ** 2)))}


def is_drawn(values: np.ndarray) -> np.ndarray:
    """(H,W) or (H,W,3) uint8 -> (H,W) bool: the pixels of a map of two levels that are white."""
    return np.asarray(np.atleast_3d(values).max(axis=2) >= 128)


def outline(mask: np.ndarray) -> np.ndarray:
    """(H,W) bool -> (H,W) bool: the outermost pixels of a mask. The picture's frame is not part of an outline."""
    inner = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8), borderValue=1)
    return mask & (inner == 0)


def _distance_to(mask: np.ndarray) -> np.ndarray:
    """(H,W) bool -> (H,W) float: distance in pixels to the nearest True pixel."""
    return cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def color_error(image: np.ndarray, region: np.ndarray, colors: Sequence[NamedColor]) -> float:
    """Mean over `colors` of the CIEDE2000 difference to the region's pixels, 0 (the same colour) to about 100.

    Each colour is compared with the pixels nearest to it, as many as its share of the region; the difference is their
    median. So the position of an object does not matter, only whether its colour is present in the wanted amount. If
    the region is empty (no object was generated), the whole picture stands in for it and the error is large.
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
    """A mean over pairs with the bounds of its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def to_json(self) -> dict[str, object]:
        return {"mean": self.mean, "ci95": [self.low, self.high]}


def picture_excess(image: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Returns by how much a picture is more clipped and more colourful than its target, both (H,W,3) uint8 sRGB.

    `clipped`: share of pixels with a channel at 0 or 255, 0 to 1. `saturation`: mean CIELAB chroma. Each is the
    picture's value minus the target's, and 0 if the target has more.
    """

    def levels(values: np.ndarray) -> np.ndarray:
        clipped = np.mean(((values == 0) | (values == 255)).any(axis=2))
        lab = srgb_to_lab(values)
        return np.array([clipped, np.mean(np.hypot(lab[..., 1], lab[..., 2]))])

    clipped, saturation = np.maximum(levels(image) - levels(target), 0).tolist()
    return {"clipped": clipped, "saturation": saturation}


def bootstrap(values: Sequence[float], seed: int, resamples: int = 10_000) -> Estimate:
    """Returns the mean of one value a pair and its percentile bootstrap interval; `seed` decides the resamples."""
    array = np.asarray(values, np.float64)
    indices = np.random.default_rng(seed).integers(len(array), size=(resamples, len(array)))
    low, high = np.quantile(array[indices].mean(axis=1), [0.025, 0.975])
    return Estimate(float(array.mean()), float(low), float(high))
