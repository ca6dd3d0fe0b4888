"""The crop of a pair: one affine map for both pictures, with its position, size and mirroring; and size buckets."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache
from math import log
from typing import Literal

from PIL import Image

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.types import Geometry

Resample = Literal["bicubic", "bilinear", "nearest"]
Buckets = Literal["none", "sdxl", "generated"]

FILTERS: dict[Resample, Image.Resampling] = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}
"""Pillow antialiases the first two when it shrinks; `nearest` never blends label values."""

SDXL_SIDE = 1024
SDXL_BUCKETS: dict[int, tuple[int, ...]] = {
    512: (2048, 1984, 1920, 1856),
    576: (1792, 1728, 1664),
    640: (1600, 1536),
    704: (1472, 1408, 1344),
    768: (1344, 1280),
    832: (1216, 1152),
    896: (1152, 1088),
    960: (1088, 1024),
    1024: (1024, 960),
    1088: (960, 896),
    1152: (896, 832),
    1216: (832,),
    1280: (768,),
    1344: (768,),
    1408: (704,),
    1472: (704,),
    1536: (640,),
    1600: (640,),
    1664: (576,),
    1728: (576,),
    1792: (576,),
    1856: (512,),
    1920: (512,),
    1984: (512,),
    2048: (512,),
}
"""Height -> widths of SDXL's own training sizes (SDXL report, appendix I), around 1024 x 1024."""

MAX_ASPECT = 4
"""Generated buckets have aspects from 1:4 to 4:1, as SDXL's own."""


@dataclass(frozen=True)
class Framing:
    """The options that determine a crop, together with the picture; fields as in `DataOptions`."""

    resolution: int
    buckets: Buckets = "none"
    bucket_step: int = 64
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    views: int = 1

    @classmethod
    def of(cls, options: DataOptions) -> Framing:
        """The options' framing. Fields without effect have their defaults, so equal crops have equal framings."""
        return cls(
            resolution=options.resolution,
            buckets=options.buckets,
            bucket_step=cls.bucket_step if options.buckets == "none" else options.bucket_step,
            crop=options.crop,
            flip=options.flip,
            views=options.views if options.crop == "random" else cls.views,
        )

    @property
    def count(self) -> int:
        """Number of views of a picture. A centred crop has two at most: plain and mirrored."""
        if self.crop == "random":
            return self.views
        return 2 if self.flip else 1

    def targets(self) -> tuple[tuple[int, int], ...]:
        """Every size (height, width) that a crop can have, ascending."""
        return _targets(self.resolution, self.buckets, self.bucket_step)

    def target(self, original: tuple[int, int]) -> tuple[int, int]:
        """The crop size whose aspect is nearest to that of a picture of `original` size; both (height, width)."""
        return _nearest(self.targets(), original)

    def plan(self, original: tuple[int, int], digest: str, view: int) -> Geometry:
        """The geometry of view `view`: the picture is scaled until it just covers its target, then cropped.

        Args:
            original: (height, width) of the upright picture.
            digest: hash of the picture's content; random positions depend on it and `view` alone.
            view: in range(self.count). View 1 of a centred crop is the mirrored one.
        """
        assert 0 <= view < self.count
        geometry = cover(original, self.target(original))
        if self.crop == "center":
            return replace(geometry, flipped=view == 1)
        top, left, side = _hashed_numbers(digest, view)
        rows, columns = (whole - part + 1 for whole, part in zip(geometry.resized, geometry.target, strict=True))
        return replace(geometry, top_left=(top % rows, left % columns), flipped=self.flip and side % 2 == 1)


def cover(original: tuple[int, int], target: tuple[int, int]) -> Geometry:
    """The centre crop of a picture that is scaled until it just covers `target`; all (height, width) in pixels."""
    scale = max(t / o for t, o in zip(target, original, strict=True))
    height, width = (max(t, round(o * scale)) for t, o in zip(target, original, strict=True))
    return Geometry(original, (height, width), ((height - target[0]) // 2, (width - target[1]) // 2), target)


def apply(picture: Image.Image, geometry: Geometry, resample: Resample) -> Image.Image:
    """The crop of `picture`, which shows the view of `geometry.original` and may have another size.

    Resize and crop are one step: the crop's corners are mapped to the picture's coordinates, and only the pixels
    between them are resampled. Pixel centres lie at half coordinates, so pictures of different sizes align to a
    fraction of a pixel; and a long thin picture is never enlarged as a whole.
    """
    (top, left), (height, width) = geometry.top_left, geometry.target
    up, across = picture.height / geometry.resized[0], picture.width / geometry.resized[1]
    bottom, right = min((top + height) * up, picture.height), min((left + width) * across, picture.width)
    crop = picture.resize((width, height), FILTERS[resample], box=(left * across, top * up, right, bottom))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if geometry.flipped else crop


def aspect_gap(image: tuple[int, int], condition: tuple[int, int]) -> float:
    """Difference of two pictures' aspects in pixels: 0 for equal aspects, up to 1 if a size was rounded to whole
    pixels. Sizes are (height, width)."""
    (h, w), (ch, cw) = image, condition
    gaps = abs(h * cw / ch - w), abs(w * ch / cw - h), abs(ch * w / h - cw), abs(cw * h / w - ch)
    return min(gaps)


@lru_cache
def _targets(resolution: int, buckets: Buckets, step: int) -> tuple[tuple[int, int], ...]:
    if buckets == "none":
        return ((resolution, resolution),)
    sizes = _scaled_sdxl(resolution, step) if buckets == "sdxl" else _generated(resolution, step)
    return tuple(sorted(sizes))


def _scaled_sdxl(resolution: int, step: int) -> set[tuple[int, int]]:
    def scaled(side: int) -> int:
        return max(step, int(side * resolution / SDXL_SIDE / step + 0.5) * step)

    return {(scaled(height), scaled(width)) for height, widths in SDXL_BUCKETS.items() for width in widths}


def _generated(resolution: int, step: int) -> set[tuple[int, int]]:
    """For each width the largest height within the square's area, and both turned by 90 degrees. No bucket needs more
    memory than the square."""
    area = max(resolution, step) ** 2
    sizes = set()
    for long in range(step, 2 * max(resolution, step) + 1, step):
        short = area // long // step * step
        if step <= short <= long <= MAX_ASPECT * short:
            sizes |= {(short, long), (long, short)}
    return sizes


@lru_cache(maxsize=4096)
def _nearest(targets: tuple[tuple[int, int], ...], original: tuple[int, int]) -> tuple[int, int]:
    """Compares logarithms of aspects, so 1:2 and 2:1 are equally far from 1:1; of equally near sizes, the larger."""
    wanted = log(original[0] / original[1])
    return min(targets, key=lambda size: (round(abs(log(size[0] / size[1]) - wanted), 9), -size[0] * size[1]))


def _hashed_numbers(digest: str, view: int) -> tuple[int, int, int]:
    """Three independent 64-bit numbers that depend on picture and view alone."""
    hashed = hashlib.sha256(f"{digest}/{view}".encode()).digest()
    return int.from_bytes(hashed[:8]), int.from_bytes(hashed[8:16]), int.from_bytes(hashed[16:24])
