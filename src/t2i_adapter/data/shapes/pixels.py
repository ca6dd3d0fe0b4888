"""Renders a scene: its picture, and the exact condition maps, which a photograph needs an annotator for."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
from PIL import Image

from .scene import COLORS, KINDS, Scene, Shape

CONDITIONS = ("outline", "canny", "depth", "segmentation", "palette")

_SUPERSAMPLE = 4  # coverage in 16ths of a pixel; a 128 px scene takes about a millisecond
_SUBPIXEL_BITS = 4  # cv2.fillPoly takes integers with this many binary places
_PALETTE_CELLS = 8  # T2I-Adapter's colour map divides 512 px by 64; other sizes keep its 8 x 8 cells
_FAR = 40  # depth of the background; 0 would mean that the depth is unknown
SEGMENTATION_COLORS: dict[str, tuple[int, int, int]] = dict(
    zip(
        KINDS,
        [(230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48), (145, 30, 180), (70, 240, 240),
         (240, 50, 230)],
        strict=True,
    )
)  # fmt: skip
"""Kind of shape -> its colour in a segmentation map; the background is black."""


def render(scene: Scene, size: int) -> Image.Image:
    """The picture: RGB, size x size pixels, antialiased."""
    picture = _background(scene, size)  # (H,W,3) float, 0 to 255
    for shape in scene.shapes:
        coverage = _coverage(shape, size)[..., None]
        picture += coverage * (np.asarray(COLORS[shape.color], np.float32) - picture)
    return Image.fromarray(np.rint(picture).astype(np.uint8))


def visible_masks(scene: Scene, size: int) -> np.ndarray:
    """(N,H,W) bool, back to front: the visible pixels of each shape, without those that shapes in front hide."""
    masks = np.zeros((len(scene.shapes), size, size), bool)
    hidden = np.zeros((size, size), bool)
    for i in reversed(range(len(scene.shapes))):
        whole = _coverage(scene.shapes[i], size) >= 0.5
        masks[i] = whole & ~hidden
        hidden |= whole
    return masks


def background_mask(scene: Scene, size: int) -> np.ndarray:
    """(H,W) bool: the pixels outside all shapes."""
    return np.logical_not(visible_masks(scene, size).any(axis=0))


def condition(scene: Scene, size: int, kind: str) -> Image.Image:
    """One of CONDITIONS for the scene: RGB, size x size, aligned with `render` to the pixel. Raises ValueError."""
    if kind not in _CONDITION_MAKERS:
        raise ValueError(f"unknown condition: {kind!r}; allowed: {', '.join(CONDITIONS)}")
    array = _CONDITION_MAKERS[kind](scene, size)
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    return Image.fromarray(array)


def _outline(scene: Scene, size: int) -> np.ndarray:
    """(H,W) uint8: the contour of each visible shape, white on black, as in fill50k."""
    canvas = np.zeros((size, size), np.uint8)
    thickness = max(1, round(size / 256))  # fill50k: 512 px, lines of 2
    for mask in visible_masks(scene, size):
        contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(canvas, contours, -1, 255, thickness)
    return canvas


def _canny(scene: Scene, size: int) -> np.ndarray:
    """(H,W) uint8: OpenCV's Canny of the picture, with the usual thresholds 100 and 200."""
    return cv2.Canny(np.asarray(render(scene, size)), 100, 200)


def _depth(scene: Scene, size: int) -> np.ndarray:
    """(H,W) uint8, nearer is brighter: the front shape is 255, the background _FAR, the others in even steps."""
    canvas = np.full((size, size), _FAR, np.uint8)
    count = len(scene.shapes)
    for i, mask in enumerate(visible_masks(scene, size)):
        canvas[mask] = round(_FAR + (255 - _FAR) * (i + 1) / count)
    return canvas


def _segmentation(scene: Scene, size: int) -> np.ndarray:
    """(H,W,3) uint8: each visible shape in its colour of SEGMENTATION_COLORS, on black."""
    canvas = np.zeros((size, size, 3), np.uint8)
    for shape, mask in zip(scene.shapes, visible_masks(scene, size), strict=True):
        canvas[mask] = SEGMENTATION_COLORS[shape.kind]
    return canvas


def _palette(scene: Scene, size: int) -> np.ndarray:
    """(H,W,3) uint8: scaled to 8 x 8 cells (bicubic) and back (nearest), as T2I-Adapter's colour condition."""
    cells = render(scene, size).resize((_PALETTE_CELLS, _PALETTE_CELLS), Image.Resampling.BICUBIC)
    return np.asarray(cells.resize((size, size), Image.Resampling.NEAREST))


_CONDITION_MAKERS = dict(zip(CONDITIONS, (_outline, _canny, _depth, _segmentation, _palette), strict=True))


def _background(scene: Scene, size: int) -> np.ndarray:
    """(H,W,3) float32, 0 to 255."""
    color, accent = (np.asarray(COLORS[c], np.float32) for c in (scene.background.color, scene.background.accent))
    coverage = _pattern_coverage(scene.background.pattern, size)[..., None]
    return color + coverage * (accent - color)


@lru_cache(maxsize=64)
def _pattern_coverage(pattern: str, size: int) -> np.ndarray:
    """(H,W) float32 in [0,1]: share of each pixel that the accent covers. The colour covers the larger area."""
    big = size * _SUPERSAMPLE
    y, x = np.mgrid[0:big, 0:big].astype(np.float32) / big
    if pattern == "striped":
        mask = ((x + y) * 4) % 1 < 0.36
    elif pattern == "dotted":
        mask = _grid_distance(x, y, cells=4)[0] < 0.22
    elif pattern == "floral":
        distance, direction = _grid_distance(x, y, cells=3)
        petals = distance < 0.34 * (0.68 + 0.32 * np.cos(5 * direction))
        mask = petals & (distance > 0.09)
    else:
        mask = np.zeros_like(x, bool)
    return _shrink(mask.astype(np.uint8) * 255, size)


def _grid_distance(x: np.ndarray, y: np.ndarray, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Distance (in cells) and direction to the nearest point of a grid whose odd rows are shifted by half a cell."""
    row = np.floor(y * cells)
    dx = (x * cells + 0.5 * (row % 2)) % 1 - 0.5
    dy = (y * cells) % 1 - 0.5
    return np.hypot(dx, dy), np.arctan2(dx, -dy)


def _coverage(shape: Shape, size: int) -> np.ndarray:
    """(H,W) float32 in [0,1]: share of each pixel that the shape covers."""
    big = size * _SUPERSAMPLE
    angle = np.deg2rad(shape.angle)
    turn = np.asarray([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    canvas = np.zeros((big, big), np.uint8)
    # In OpenCV integer coordinates are pixel centres; minus half a pixel, 0 is the corner of the picture.
    polygons = [
        np.rint((((outline @ turn) * shape.radius + shape.center) * big - 0.5) * 2**_SUBPIXEL_BITS).astype(np.int32)
        for outline in _unit_outlines(shape.kind)
    ]
    cv2.fillPoly(canvas, polygons, 255, lineType=cv2.LINE_8, shift=_SUBPIXEL_BITS)
    return _shrink(canvas, size)


def _shrink(canvas: np.ndarray, size: int) -> np.ndarray:
    """(big,big) uint8 -> (size,size) float32 in [0,1]: the mean over each pixel."""
    return cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


@lru_cache(maxsize=len(KINDS))
def _unit_outlines(kind: str) -> tuple[np.ndarray, ...]:
    """Closed outlines (M,2) inside the unit circle, y pointing down; a second outline is a hole."""
    if kind == "circle":
        return (_arc(1.0),)
    if kind == "ring":
        return (_arc(1.0), _arc(0.55))
    if kind == "square":
        return (_regular(4, turn=np.pi / 4),)
    if kind == "triangle":
        return (_regular(3),)
    if kind == "diamond":
        return (_regular(4) * (0.66, 1.0),)
    if kind == "star":
        return (_regular(10) * np.tile([[1.0], [0.42]], (5, 1)),)
    if kind == "heart":
        return (_heart(),)
    return (_cross(arm=0.36),)


def _regular(corners: int, turn: float = 0.0) -> np.ndarray:
    """(corners,2): a regular polygon on the unit circle, the first corner at the top."""
    a = np.arange(corners) * 2 * np.pi / corners + turn
    return np.stack([np.sin(a), -np.cos(a)], axis=1)


def _arc(radius: float) -> np.ndarray:
    return _regular(96) * radius


def _heart() -> np.ndarray:
    """(96,2): the classic curve x = 16 sin^3 a, centred and scaled into the unit circle."""
    a = np.arange(96) * 2 * np.pi / 96
    x = 16 * np.sin(a) ** 3
    y = -(13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a))
    outline = np.stack([x, y - 2.5], axis=1)
    return outline / np.linalg.norm(outline, axis=1).max()


def _cross(arm: float) -> np.ndarray:
    """(12,2): an upright cross whose arms are 2 * arm wide; its tips are on the unit circle."""
    tip = np.sqrt(1 - arm**2)
    quarter = np.asarray([(-arm, -tip), (arm, -tip), (arm, -arm)])
    turns = [np.asarray([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]) for a in np.arange(4) * np.pi / 2]
    return np.concatenate([quarter @ turn for turn in turns])
