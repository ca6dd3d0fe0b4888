"""Metrics of all pictures together, which no single picture has: mIoU, diversity among seeds, KID and FID."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from t2i_adapter.annotators.runtime import tensors_only
from t2i_adapter.evaluation.color import srgb_to_lab
from t2i_adapter.evaluation.metrics import Estimate

RESAMPLES = 2_000
"""Resamples of the interval of mIoU."""
REDUCED = 8
"""Factor by which both sides of a picture are scaled down before pictures are compared as wholes."""
LEAST_FOR_KID = 20
LEAST_FOR_FID = 2_000
"""Pictures below which KID and FID are not stated: FID's error then is larger than what it should show."""
FID_BLOCKS = 10
"""Blocks of the jackknife of FID's interval."""


def mean_iou(counts: np.ndarray, seed: int) -> Estimate:
    """Returns the mIoU of one confusion matrix over all pictures, and its bootstrap interval.

    Args:
        counts: (N,3,C) int, `kinds.class_counts` of each pair; the interval resamples the N pairs.

    A class counts if it is in a picture or in a condition: one that was generated and is in no condition has IoU 0.
    """
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=RESAMPLES)
    sums = np.tensordot(weights.astype(np.float64), counts.astype(np.float64), axes=1)  # (RESAMPLES,3,C)
    low, high = np.quantile(_mean_iou(sums), [0.025, 0.975])
    return Estimate(float(_mean_iou(counts.sum(axis=0))), float(low), float(high))


def _mean_iou(sums: np.ndarray) -> np.ndarray:
    """(...,3,C) pixels in both, got and wanted -> (...): mean IoU of the classes that occur."""
    both, union = sums[..., 0, :], sums[..., 1, :] + sums[..., 2, :] - sums[..., 0, :]
    present = union > 0
    return np.sum(both / np.maximum(union, 1), axis=-1, where=present) / np.maximum(present.sum(axis=-1), 1)


def mean_distance(pictures: Sequence[Image.Image]) -> float:
    """Returns the mean over all pairs of k >= 2 pictures of their root mean squared difference in CIELAB.

    Both sides are scaled down by 8 first, so the distance is one of layout and colours, not of texture. No network
    takes part: it is no LPIPS.
    """
    labs = [srgb_to_lab(np.asarray(reduced(picture))) for picture in pictures]
    distances = [
        np.sqrt(np.mean(np.sum((a - b) ** 2, axis=2))) for number, a in enumerate(labs) for b in labs[number + 1 :]
    ]
    return float(np.mean(distances))


def reduced(picture: Image.Image) -> Image.Image:
    """Returns the picture as RGB with both sides scaled down by 8, averaged."""
    size = max(1, picture.width // REDUCED), max(1, picture.height // REDUCED)
    return picture.convert("RGB").resize(size, Image.Resampling.BOX)


def inception_features(pictures: Sequence[Image.Image]) -> Any:
    """Returns Inception v3's features of N pictures, torch (N,2048), as FID and KID are defined.

    Raises ImportError if torchmetrics or torch-fidelity is missing. The first call downloads the network's weights.
    """
    import torch
    from torchmetrics.image.fid import NoTrainInceptionV3

    with tensors_only():
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"])
    with torch.inference_mode():
        rows = [network(torch.from_numpy(np.array(p.convert("RGB"))).permute(2, 0, 1)[None]) for p in pictures]
    return torch.cat(rows)


def kernel_distance(groups: Sequence[Any], wanted: Any) -> Estimate:
    """KID: the unbiased squared distance (MMD) of two sets of features; the kernel is (x y / D + 1)^3.

    Args:
        groups: k sets, torch (N,D) each, one picture a pair; the result is the mean of their distances.
        wanted: the targets, torch (N,D), row n being the target of the groups' row n.

    The interval is 1.96 standard errors of a jackknife that leaves out one pair after the other. KID may be below 0.
    Raises ImportError.
    """
    found = [_kernel_distance(group, wanted) for group in groups]
    return _jackknife(float(np.mean([value for value, _ in found])), np.mean([rest for _, rest in found], axis=0))


def _kernel_distance(got: Any, wanted: Any) -> tuple[float, np.ndarray]:
    """Returns MMD^2 and its values without each of the N pairs (N,), which follow from sums of the kernel's rows."""
    import torch
    from torchmetrics.image.kid import poly_kernel

    a, b = got.to(torch.float64), wanted.to(torch.float64)
    n = len(a)
    aa, bb, ab = poly_kernel(a, a), poly_kernel(b, b), poly_kernel(a, b)
    own = aa.sum() - aa.diagonal().sum() + bb.sum() - bb.diagonal().sum()
    rows = 2 * (aa.sum(1) - aa.diagonal() + bb.sum(1) - bb.diagonal())
    crossed = ab.sum(1) + ab.sum(0) - ab.diagonal()
    without = (own - rows) / ((n - 1) * (n - 2)) - 2 * (ab.sum() - crossed) / (n - 1) ** 2
    return float(own / (n * (n - 1)) - 2 * ab.sum() / n**2), without.numpy()


def frechet_distance(groups: Sequence[Any], wanted: Any) -> Estimate:
    """FID of two sets of features. Arguments: as in `kernel_distance`.

    The interval is 1.96 standard errors of a jackknife of ten blocks of pairs. Raises ImportError.
    """
    blocks = np.arange(len(wanted)) % FID_BLOCKS
    value = float(np.mean([_frechet_distance(group, wanted) for group in groups]))
    without = [
        np.mean([_frechet_distance(group[blocks != block], wanted[blocks != block]) for group in groups])
        for block in range(FID_BLOCKS)
    ]
    return _jackknife(value, np.asarray(without))


def _frechet_distance(got: Any, wanted: Any) -> float:
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Features(torch.nn.Identity):
        num_features = got.shape[1]

    metric = FrechetInceptionDistance(feature=Features()).set_dtype(torch.float64)
    metric.update(wanted.to(torch.float64), real=True)
    metric.update(got.to(torch.float64), real=False)
    return float(metric.compute())


def _jackknife(value: float, without: np.ndarray) -> Estimate:
    """value: of all. without: (B,) values, each without one of B blocks."""
    error = 1.96 * float(np.sqrt((len(without) - 1) * np.var(without)))
    return Estimate(value, value - error, value + error)
