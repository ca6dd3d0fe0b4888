"""The content of a caption as numbers: the targets that the text encoders learn to predict."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from t2i_adapter.data import emoji, shapes

SLOTS = 3  # shapes, front to back
THUMBNAIL = 8  # pixels: side of the emoji's picture that the encoders predict from its name
_NAMES = list(shapes.COLORS)


@dataclass(frozen=True)
class Targets:
    """One caption and its content. Colours are RGB in [-1,1]. What a caption does not define is NaN or -1."""

    caption: str
    ground: np.ndarray  # (6,) colour and accent of the background
    pattern: int  # index into PATTERNS
    count: int  # number of shapes; 0 for an emoji
    kinds: np.ndarray  # (SLOTS,) index into KINDS
    shapes: np.ndarray  # (SLOTS,6) colour, then x, y and radius in [-1,1]
    thumbnail: np.ndarray  # (4 * THUMBNAIL^2,) of an emoji: premultiplied RGBA in [-1,1]


def scene_targets(scene: shapes.Scene) -> Targets:
    kinds, rows = np.full(SLOTS, -1), np.full((SLOTS, 6), np.nan, np.float32)
    for i, shape in enumerate(reversed(scene.shapes)):
        kinds[i] = shapes.KINDS.index(shape.kind)
        rows[i] = [*_rgb(shape.color), *(2 * c - 1 for c in shape.center), (shape.radius - 0.22) / 0.11]
    ground = scene.background
    return Targets(
        caption=scene.caption,
        ground=np.asarray(_rgb(ground.color) + _rgb(ground.color if ground.pattern == "plain" else ground.accent)),
        pattern=shapes.PATTERNS.index(ground.pattern),
        count=len(scene.shapes),
        kinds=kinds,
        shapes=rows,
        thumbnail=np.full(4 * THUMBNAIL**2, np.nan, np.float32),
    )


def emoji_targets(icon: emoji.Icon, rgba: np.ndarray, background: str) -> Targets:
    """rgba: the rendered icon, (n,n,4) uint8."""
    small = Image.fromarray(rgba).convert("RGBa").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return Targets(
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
