"""Compares two condition maps by what their kind means: lines, regions, soft edges, depth, classes, colours, normals.

Every comparison takes the map of a generated picture and the map that is wanted, of equal size. All arithmetic is in
float: a difference of two uint8 arrays would wrap around.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from t2i_adapter.annotators.registry import Annotator
from t2i_adapter.evaluation.color import ciede2000, srgb_to_lab
from t2i_adapter.evaluation.metrics import condition_agreement, iou, is_drawn, lines_curve

Family = Literal["lines", "regions", "edges", "depth", "labels", "palette", "normal", "pose", "other"]
REGIONS, RANKED = ("mask", "person"), ("sam",)
"""Kinds whose white pixels are areas, and kinds whose colours are ranks and not classes. Their facts do not say so."""
TOLERANCES_PX = (0, 1, 2, 4)
"""Tolerances of the curve of F1, in pixels of the picture."""
MS_SSIM_BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Weights of the five scales (Wang, Simoncelli, Bovik 2003)."""
MS_SSIM_KERNEL = 11
"""Side in pixels of its Gaussian window."""
CELLS = 64
"""Most cells a side at which colour maps are compared. A palette has 16 cells along 1024 px."""


def family(annotator: Annotator) -> Family:
    """Returns what the maps of an annotator are compared as, by its facts, and by its name if these do not say."""
    facts = annotator.facts
    if annotator.name in REGIONS:
        return "regions"
    if annotator.name == "palette":
        return "palette"
    if facts.kind in ("pose", "normal"):
        return "pose" if facts.kind == "pose" else "normal"
    if facts.kind == "labels" and annotator.name not in RANKED:
        return "labels"
    if facts.levels == 2:
        return "lines"
    if facts.polarity == "near is white":
        return "depth"
    return "edges" if facts.channels == 1 and facts.polarity != "none" else "other"


def compare(kind: Family, got: np.ndarray, wanted: np.ndarray, levels: int) -> dict[str, float]:
    """Returns the metrics of one pair of maps, both (H,W) or (H,W,3) uint8, without those that need a package.

    All kinds have `condition_f1` for maps of two levels, else `condition_error`.
    """
    values = condition_agreement(got, wanted, levels)
    if kind == "lines":
        curve = lines_curve(is_drawn(got), is_drawn(wanted), TOLERANCES_PX)
        values |= {curve_key(tolerance): f1 for tolerance, f1 in zip(TOLERANCES_PX, curve, strict=True)}
    elif kind == "regions":
        values["condition_iou"] = iou(is_drawn(got), is_drawn(wanted))
    elif kind == "depth":
        values |= depth_agreement(_grey(got), _grey(wanted))
    elif kind == "palette":
        values["condition_color"] = palette_difference(got, wanted)
    elif kind == "normal":
        values["normal_angle"] = normal_angle(got, wanted)
    return values


def curve_key(tolerance: int) -> str:
    """The key of F1 at a tolerance in px: f1_exact, f1_1px, ..."""
    return f"f1_{tolerance}px" if tolerance else "f1_exact"


def ms_ssim(got: np.ndarray, wanted: np.ndarray) -> float | None:
    """MS-SSIM of two maps, (H,W) or (H,W,3) uint8, with values in [0,1]: 1 for equal maps.

    Its five scales need a shorter side of 176 px. Smaller maps have the first four with weights that again add up to 1,
    and maps below 99 px have None. Raises ImportError if torchmetrics is missing.
    """
    import torch
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    side = min(got.shape[:2])
    scales = next((n for n in (5, 4) if side // (n - 1) ** 2 >= MS_SSIM_KERNEL), None)
    if scales is None:
        return None
    total = sum(MS_SSIM_BETAS[:scales])
    betas = tuple(beta / total for beta in MS_SSIM_BETAS[:scales])
    a, b = (torch.from_numpy(np.atleast_3d(m).astype(np.float32) / 255).permute(2, 0, 1)[None] for m in (got, wanted))
    return float(multiscale_structural_similarity_index_measure(a, b, data_range=1.0, betas=betas))


def depth_agreement(got: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Compares two depth maps, (H,W) of 0 to 255.

    `depth_error`: root mean squared difference, 0 to 1, after the scale and shift of `got` that make it least; the
    scale is not negative, so an inverted map is not a good one. `depth_spearman`: correlation of the ranks, -1 to 1; 0
    if a map is constant. `depth_rmse_255`: root mean squared difference without scale and shift, 0 to 255.
    """
    a, b = got.astype(np.float64) / 255, wanted.astype(np.float64) / 255
    spread = np.var(a)
    scale = max(0.0, float(np.mean((a - a.mean()) * (b - b.mean())) / spread)) if spread else 0.0
    fitted = scale * (a - a.mean()) + b.mean()
    return {
        "depth_error": float(np.sqrt(np.mean((fitted - b) ** 2))),
        "depth_spearman": _correlation(_ranks(got), _ranks(wanted)),
        "depth_rmse_255": 255 * float(np.sqrt(np.mean((a - b) ** 2))),
    }


def palette_difference(got: np.ndarray, wanted: np.ndarray) -> float:
    """Mean CIEDE2000 difference of two colour maps, (H,W,3) uint8, over their cells: 0 for equal maps."""
    height, width = got.shape[:2]
    size = min(width, CELLS), min(height, CELLS)
    a, b = (np.asarray(Image.fromarray(m).resize(size, Image.Resampling.NEAREST)) for m in (got, wanted))
    return float(np.mean(ciede2000(srgb_to_lab(a), srgb_to_lab(b))))


def normal_angle(got: np.ndarray, wanted: np.ndarray) -> float:
    """Mean angle in degrees between the directions of two normal maps, (H,W,3) uint8, 127.5 being 0."""
    a, b = (m.astype(np.float64) / 127.5 - 1 for m in (got, wanted))
    lengths = np.linalg.norm(a, axis=2) * np.linalg.norm(b, axis=2)
    cosines = np.sum(a * b, axis=2) / np.maximum(lengths, 1e-12)
    return float(np.degrees(np.arccos(np.clip(cosines, -1, 1))).mean())


def nearest_class(values: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """(H,W,3) uint8 and (C,3) uint8 -> (H,W) int: the nearest colour of the palette in RGB, the first of equals.

    The value of (H,W) maps is taken for all three channels.
    """
    colors = np.broadcast_to(np.atleast_3d(values), (*values.shape[:2], 3)).reshape(-1, 3).astype(np.int64)
    packed, back = np.unique(colors @ (65536, 256, 1), return_inverse=True)
    distinct = np.stack([packed >> 16, packed >> 8 & 255, packed & 255], axis=1)
    distances = ((distinct[:, None] - palette[None].astype(np.int64)) ** 2).sum(axis=2)
    return distances.argmin(axis=1)[back].reshape(values.shape[:2])


def class_counts(got: np.ndarray, wanted: np.ndarray, classes: int) -> np.ndarray:
    """Two (H,W) int maps of classes -> (3,C) int: pixels of each class in both maps, in `got`, and in `wanted`.

    These are the diagonal and the two sums of the confusion matrix, from which every IoU follows.
    """
    both = got[got == wanted]
    return np.stack([np.bincount(each.ravel(), minlength=classes) for each in (both, got, wanted)])


def own_palette(maps: Sequence[Any], least: float = 0.001) -> np.ndarray:
    """Returns (C,3) uint8: the colours of label maps (PIL images) that fill at least the share `least` of one map."""
    colors: dict[tuple[int, ...], None] = {}
    for each in maps:
        pixels = np.asarray(each.convert("RGB")).reshape(-1, 3)
        found, counts = np.unique(pixels, axis=0, return_counts=True)
        colors |= dict.fromkeys(map(tuple, found[counts >= least * len(pixels)].tolist()))
    return np.asarray(list(colors), np.uint8).reshape(-1, 3)


def _grey(values: np.ndarray) -> np.ndarray:
    return values if values.ndim == 2 else np.asarray(Image.fromarray(values).convert("L"))


def _ranks(values: np.ndarray) -> np.ndarray:
    """(H,W) of uint8 -> (H,W) float: the rank of each pixel; equal values share the mean of their ranks."""
    counts = np.bincount(values.ravel(), minlength=256)
    return (np.cumsum(counts) - (counts - 1) / 2)[values]


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    spread = np.sqrt(np.sum(a * a) * np.sum(b * b))
    return float(np.sum(a * b) / spread) if spread else 0.0
