"""Runs an unmodified script that needs torchvision on a machine without torchvision.

    python benchmarks/torchvision_stand_in.py SCRIPT [its flags]

The classes below are the part of `torchvision.transforms` that the diffusers script train_t2i_adapter_sdxl.py uses, for
PIL pictures. If torchvision is installed, the script uses it.
"""

from __future__ import annotations

import importlib
import importlib.util
import runpy
import sys
from collections.abc import Callable, Sequence
from enum import Enum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Each checks once whether torchvision is installed, and would then import parts of it that the stand-in does not have.
CHECKING_LIBRARIES = ("transformers.utils.import_utils", "transformers", "datasets", "accelerate", "diffusers")


class InterpolationMode(Enum):
    NEAREST = Image.Resampling.NEAREST
    BILINEAR = Image.Resampling.BILINEAR
    BICUBIC = Image.Resampling.BICUBIC
    LANCZOS = Image.Resampling.LANCZOS


class Compose:
    """Applies one transform after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, value: Any) -> Any:
        for transform in self.transforms:
            value = transform(value)
        return value


class Resize:
    """Resizes so that the shorter side is `size` pixels; the longer side is rounded down."""

    def __init__(self, size: int, interpolation: InterpolationMode = InterpolationMode.BILINEAR) -> None:
        self.size, self.filter = size, interpolation.value

    def __call__(self, picture: Image.Image) -> Image.Image:
        shorter = min(picture.size)
        if shorter == self.size:
            return picture
        width, height = (side * self.size // shorter for side in picture.size)
        return picture.resize((width, height), self.filter)


class CenterCrop:
    """Crops the square of `size` pixels in the middle; the picture must be at least as large."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, picture: Image.Image) -> Image.Image:
        left, top = (round((side - self.size) / 2) for side in picture.size)
        return picture.crop((left, top, left + self.size, top + self.size))


class ToTensor:
    """Converts an RGB picture to float32 (3,H,W) in [0,1]."""

    def __call__(self, picture: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float().div(255)


class Normalize:
    """Computes (value - mean) / std for each channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (mean, std))

    def __call__(self, picture: Tensor) -> Tensor:
        return (picture - self.mean) / self.std


def install() -> None:
    """Makes `from torchvision import transforms` import the classes above, after the libraries have found none."""
    for name in CHECKING_LIBRARIES:
        importlib.import_module(name)
    importlib.import_module("transformers.utils.import_utils").is_torchvision_available()  # caches its result
    package, transforms = ModuleType("torchvision"), ModuleType("torchvision.transforms")
    for module in (package, transforms):
        module.__spec__ = ModuleSpec(module.__name__, None)
    for part in (InterpolationMode, Compose, Resize, CenterCrop, ToTensor, Normalize):
        setattr(transforms, part.__name__, part)
    package.__dict__["transforms"] = transforms
    sys.modules.update({"torchvision": package, "torchvision.transforms": transforms})


def main() -> None:
    script = Path(sys.argv[1])
    if importlib.util.find_spec("torchvision") is None:
        install()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
