"""Depth from one picture, near is white."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from t2i_adapter.annotators.mirror import Kind
from t2i_adapter.annotators.pretrained import open_model, pin
from t2i_adapter.annotators.registry import Polarity
from t2i_adapter.annotators.runtime import exactly
from t2i_adapter.errors import UserError

INVERSE, METRIC = "inverse", "metric"
TYPES = {"depth_anything": INVERSE, "dpt": INVERSE, "zoedepth": METRIC}
"""Model type -> what it predicts: larger is nearer, or metres. Depth Anything's config says so where it is metric."""
METRIC_RANGE = (2, 85)
"""Percentiles of the metres that become white and black, as maps for SDXL's ZoeDepth adapter were made: what lies far
behind everything else does not press all else together."""


class Depth:
    """Depth by Depth Anything V2, or MiDaS (DPT), or ZoeDepth."""

    @dataclass(frozen=True)
    class Options:
        """`model`: hub id or folder; Intel/dpt-large is MiDaS, Intel/zoedepth-nyu-kitti is ZoeDepth. `revision`: its
        commit; empty takes the one that is known here."""

        model: str = "depth-anything/Depth-Anything-V2-Small-hf"
        revision: str = ""

        def __post_init__(self) -> None:
            pin(self, "depth")

    version = 1
    channels: Literal[1, 3] = 1
    kind: Kind = "map"
    polarity: Polarity = "near is white"
    levels: Literal[2, 256] = 256
    licence = "Apache-2.0 (Depth Anything V2 Small, DPT), MIT (ZoeDepth)"
    weights = "hub: depth-anything/Depth-Anything-V2-Small-hf"
    needs = ""

    def __init__(self, options: Options) -> None:
        self._options = options

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        options = self._options
        processor, network = open_model("AutoModelForDepthEstimation", options.model, options.revision, "depth")
        meaning = _meaning(network.config, options.model)
        return Image.fromarray(to_grey(_predict(processor, network, image), meaning))


def to_grey(depth: np.ndarray, meaning: str) -> np.ndarray:
    """(H,W) float -> u8 of the same shape, nearest white. A flat picture is black."""
    low, high = (depth.min(), depth.max()) if meaning == INVERSE else np.percentile(depth, METRIC_RANGE)
    if not high > low:
        return np.zeros(depth.shape, np.uint8)
    share = (depth - low) / (high - low)
    nearness = share if meaning == INVERSE else 1 - share
    return np.rint(np.clip(nearness, 0, 1) * 255).astype(np.uint8)


def _meaning(config: Any, model: str) -> str:
    if config.model_type not in TYPES:
        raise UserError(f"depth: model={model}: is a {config.model_type}; those known here are {', '.join(TYPES)}.")
    return METRIC if getattr(config, "depth_estimation_type", None) == METRIC else TYPES[config.model_type]


def _predict(processor: Any, network: Any, image: Image.Image) -> np.ndarray:
    """(H,W) float32, what the network says of each pixel."""
    import torch.nn.functional as F

    height, width = image.height, image.width
    top, left = _padding(processor, height), _padding(processor, width)
    with exactly():
        pixels = processor(images=image, return_tensors="pt")["pixel_values"]
        depth = network(pixels).predicted_depth[:, None]
        size = height + 2 * top, width + 2 * left
        depth = F.interpolate(depth, size=size, mode="bicubic", align_corners=False)
        return depth[0, 0, top : top + height, left : left + width].numpy()


def _padding(processor: Any, side: int) -> int:
    """Pixels that ZoeDepth's processor mirrors onto each end of a side before it scales; none for other processors."""
    from transformers import ZoeDepthImageProcessorPil

    padded = isinstance(processor, ZoeDepthImageProcessorPil) and processor.do_pad
    return int((side / 2) ** 0.5 * 3) if padded else 0
