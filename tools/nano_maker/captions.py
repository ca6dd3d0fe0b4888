"""What a caption says, as numbers: the targets that the text encoders learn to predict."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from t2i_adapter.data import emoji, shapes

SLOTS = 3  # shapes, front to back
THUMBNAIL = 8  # pixels: the side of the emoji's picture that its name has to recall
_NAMES = list(shapes.COLORS)


@dataclass(frozen=True)
class PairDataset:
    """One caption and what it says. Colours are RGB in [-1,1]; entries that the caption has not got are nan or -1."""

    caption: str
    ground: np.ndarray  # (6,) colour and accent of the background
    pattern: int  # index into PATTERNS
    count: int  # shapes; 0 for an emoji
    kinds: np.ndarray  # (SLOTS,) index into KINDS
    shapes: np.ndarray  # (SLOTS,6) colour, then x, y and radius in [-1,1]
    thumbnail: np.ndarray  # (4 * THUMBNAIL^2,) of an emoji, premultiplied RGBA in [-1,1]


def scene_facts(scene: shapes.Scene) -> PairDataset:
    kinds, rows = np.full(SLOTS, -1), np.full((SLOTS, 6), np.nan, np.float32)
    for i, shape in enumerate(reversed(scene.shapes)):
        kinds[i] = shapes.KINDS.index(shape.kind)
        rows[i] = [*_rgb(shape.color), *(2 * c - 1 for c in shape.center), (shape.radius - 0.22) / 0.11]
    ground = scene.background
    return PairDataset(
        caption=scene.caption,
        ground=np.asarray(_rgb(ground.color) + _rgb(ground.color if ground.pattern == "plain" else ground.accent)),
        pattern=shapes.PATTERNS.index(ground.pattern),
        count=len(scene.shapes),
        kinds=kinds,
        shapes=rows,
        thumbnail=np.full(4 * THUMBNAIL**2, np.nan, np.float32),
    )


def emoji_facts(icon: emoji.Icon, rgba: np.ndarray, background: str) -> PairDataset:
    """rgba: the icon's picture, (n,n,4) uint8."""
    small = Image.fromarray(rgba).convert("RGBa").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return PairDataset(
        caption=emoji.caption(icon, background),
        ground=np.asarray(_rgb(background) * 2),
        pattern=0,
        count=0,
        kinds=np.full(SLOTS, -1),
        shapes=np.full((SLOTS, 6), np.nan, np.float32),
        thumbnail=np.asarray(small, np.float32).ravel() / 127.5 - 1,
    )


def any_color(rng: np.random.Generator) -> str:
    return _NAMES[rng.integers(len(_NAMES))]


def _rgb(color: str) -> list[float]:
    return [value / 127.5 - 1 for value in shapes.COLORS[color]]
