"""Depth maps by networks, and the surface normals that follow from a depth map."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from PIL import Image

from t2i_adapter.annotators.pretrained import open_model, pin
from t2i_adapter.annotators.registry import Annotator, Facts, open_annotator
from t2i_adapter.annotators.runtime import deterministic
from t2i_adapter.errors import UserError

INVERSE, METRIC = "inverse", "metric"
TYPES = {"depth_anything": INVERSE, "dpt": INVERSE, "zoedepth": METRIC}
"""Model type -> its output: inverse depth (larger is nearer) or metres. A metric Depth Anything's config says so."""
METRIC_RANGE = (2, 85)
"""Percentiles of the metres that become white and black, as for SDXL's ZoeDepth adapter. A distant background then does
not compress the range of everything else."""


@dataclass(frozen=True)
class Depth:
    """Depth by Depth Anything V2, MiDaS (DPT) or ZoeDepth; near is white.

    `model`: hub id or folder. Intel/dpt-large is MiDaS, Intel/zoedepth-nyu-kitti is ZoeDepth. `revision`: its commit;
    if empty, the commit that this package knows.
    """

    facts = Facts(
        polarity="near is white",
        licence="Apache-2.0 (Depth Anything V2 Small, DPT), MIT (ZoeDepth)",
        weights="hub: depth-anything/Depth-Anything-V2-Small-hf",
    )
    model: str = "depth-anything/Depth-Anything-V2-Small-hf"
    revision: str = ""

    def __post_init__(self) -> None:
        pin(self)

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        processor, network = open_model("AutoModelForDepthEstimation", self.model, self.revision)
        meaning = _meaning(network.config, self.model)
        return Image.fromarray(to_grey(_predict(processor, network, image), meaning))


def to_grey(depth: np.ndarray, meaning: str) -> np.ndarray:
    """(H,W) float -> (H,W) u8, nearest white. A constant depth is black."""
    low, high = (depth.min(), depth.max()) if meaning == INVERSE else np.percentile(depth, METRIC_RANGE)
    if not high > low:
        return np.zeros(depth.shape, np.uint8)
    share = (depth - low) / (high - low)
    nearness = share if meaning == INVERSE else 1 - share
    return np.rint(np.clip(nearness, 0, 1) * 255).astype(np.uint8)


def _meaning(config: Any, model: str) -> str:
    if config.model_type not in TYPES:
        raise UserError(f"model={model}: its type is {config.model_type}; supported are {', '.join(TYPES)}.")
    return METRIC if getattr(config, "depth_estimation_type", None) == METRIC else TYPES[config.model_type]


def _predict(processor: Any, network: Any, image: Image.Image) -> np.ndarray:
    """The network's output at each pixel: (H,W) float32."""
    import torch.nn.functional as F

    height, width = image.height, image.width
    top, left = _padding(processor, height), _padding(processor, width)
    with deterministic():
        pixels = processor(images=image, return_tensors="pt")["pixel_values"]
        depth = network(pixels).predicted_depth[:, None]
        size = height + 2 * top, width + 2 * left
        depth = F.interpolate(depth, size=size, mode="bicubic", align_corners=False)
        return depth[0, 0, top : top + height, left : left + width].numpy()


def _padding(processor: Any, side: int) -> int:
    """Pixels that ZoeDepth's processor mirrors onto each end of a side before it scales; 0 for other processors."""
    from transformers import ZoeDepthImageProcessorPil

    padded = isinstance(processor, ZoeDepthImageProcessorPil) and processor.do_pad
    return int((side / 2) ** 0.5 * 3) if padded else 0


@dataclass(frozen=True)
class Normal:
    """Which way surfaces face, computed from a depth map: red right, green up, blue towards the viewer.

    `depth` names the kind that makes the depth map; if empty, the image itself is one (near is white). `relief` is the
    depth from black to white, relative to the image's shorter side. `smooth` is the sigma, in pixels, of the blur that
    removes the steps of its 256 values.
    """

    facts = Facts(channels=3, kind="normal", licence="Apache-2.0")
    depth: str = ""
    relief: float = 0.5
    smooth: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.relief <= 100:
            raise UserError(f"relief={self.relief:g}; allowed is above 0 up to 100.")
        if not 0 <= self.smooth <= 100:
            raise UserError(f"smooth={self.smooth:g}; allowed is 0 to 100 pixels.")
        if self._depth:  # a new version of the depth maps is a new version of the normals
            version = 1000 * self._depth.facts.version + self.facts.version
            object.__setattr__(self, "facts", replace(self.facts, version=version))

    @cached_property
    def _depth(self) -> Annotator | None:
        return open_annotator(self.depth) if self.depth else None

    @property
    def chance(self) -> bool:
        return self._depth is not None and self._depth.chance

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        depth = np.asarray((self._depth.plugin(image, rng) if self._depth else image).convert("L"), np.float32) / 255
        if self.smooth:
            depth = cv2.GaussianBlur(depth, (0, 0), self.smooth)
        height = self.relief * min(image.size) * depth  # towards the viewer, in pixels
        normals = np.stack([-_slope(height, 1), _slope(height, 0), np.ones_like(height)], axis=2)  # rows go down
        normals /= np.linalg.norm(normals, axis=2, keepdims=True)
        return Image.fromarray(np.rint((normals + 1) * 127.5).astype(np.uint8))


def _slope(height: np.ndarray, axis: int) -> np.ndarray:
    """Rise per pixel along an axis, (H,W); 0 if the axis has one pixel."""
    return np.gradient(height, axis=axis) if height.shape[axis] > 1 else np.zeros_like(height)
