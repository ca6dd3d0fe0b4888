"""A person's body, hands and face as points, and how they are drawn: OpenPose's skeletons in OpenPose's colours."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np

from t2i_adapter.annotators.mirror import HUES, LIMB_BRIGHTNESS

LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),
    (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
"""Joints of each limb, in OpenPose's order. Limb k and joint k have hue k."""
FINGERS = tuple((0 if n == 0 else 4 * finger + n, 4 * finger + n + 1) for finger in range(5) for n in range(4))
"""Points of each of a hand's 20 bones, thumb first, from the wrist outwards."""
REFERENCE_SIDE = 512
"""Shorter side in pixels of an image for which the widths below are meant; they grow with the image."""
LIMB_RADIUS, JOINT_RADIUS, BONE_WIDTH, KNUCKLE_RADIUS, FACE_RADIUS = 4, 4, 2, 4, 3
KNUCKLE, WHITE = (0, 0, 255), (255, 255, 255)


@dataclass(frozen=True)
class Skeleton:
    """A person's points (N,2): x, y in pixels of the image, NaN if not visible.

    Attributes:
        body: (18,2), OpenPose's COCO joints.
        hands: left and right, (21,2) each: the wrist, then four points a finger, thumb first. None if not detected.
        face: (70,2), 68 points and both pupils. None if not detected.
    """

    body: np.ndarray
    hands: tuple[np.ndarray | None, np.ndarray | None]
    face: np.ndarray | None


def draw_people(people: Iterable[Skeleton], height: int, width: int) -> np.ndarray:
    """Draws skeletons on black: (H,W,3) u8 RGB. Edges are not smoothed, so each pixel has its limb's exact colour."""
    canvas = np.zeros((height, width, 3), np.uint8)
    scale = min(height, width) / REFERENCE_SIDE
    for person in people:
        _draw_body(canvas, person.body, scale)
        for hand in person.hands:
            if hand is not None:
                _draw_hand(canvas, hand, scale)
        if person.face is not None:
            _draw_dots(canvas, person.face, WHITE, _pixels(FACE_RADIUS * scale))
    return canvas


def _draw_body(canvas: np.ndarray, joints: np.ndarray, scale: float) -> None:
    for hue, (start, end) in enumerate(LIMBS):
        ends = joints[[start, end]]
        if not np.isnan(ends).any():
            _draw_limb(canvas, ends, _colour(hue / HUES, LIMB_BRIGHTNESS), _pixels(LIMB_RADIUS * scale))
    for hue, joint in enumerate(joints):
        _draw_dots(canvas, joint[None], _colour(hue / HUES), _pixels(JOINT_RADIUS * scale))


def _draw_limb(canvas: np.ndarray, ends: np.ndarray, colour: tuple[int, ...], radius: int) -> None:
    """Draws an ellipse from joint to joint."""
    middle = [int(value) for value in ends.mean(axis=0)]
    dx, dy = ends[1] - ends[0]
    axes = int(np.hypot(dx, dy) / 2), radius
    outline = cv2.ellipse2Poly(middle, axes, int(np.degrees(np.arctan2(dy, dx))), 0, 360, 1)
    cv2.fillConvexPoly(canvas, np.array(outline), colour)


def _draw_hand(canvas: np.ndarray, points: np.ndarray, scale: float) -> None:
    for number, bone in enumerate(FINGERS):
        ends = points[list(bone)]
        if not np.isnan(ends).any():
            start, end = ends.astype(int).tolist()
            cv2.line(canvas, start, end, _colour(number / len(FINGERS)), _pixels(BONE_WIDTH * scale))
    _draw_dots(canvas, points, KNUCKLE, _pixels(KNUCKLE_RADIUS * scale))


def _draw_dots(canvas: np.ndarray, points: np.ndarray, colour: tuple[int, ...], radius: int) -> None:
    for x, y in points[~np.isnan(points).any(axis=1)].astype(int).tolist():
        cv2.circle(canvas, (x, y), radius, colour, thickness=-1)


def _colour(hue: float, brightness: float = 1.0) -> tuple[int, ...]:
    """Returns the RGB values, 0 to 255, of a saturated hue in [0,1)."""
    return tuple(int(channel * 255 * brightness) for channel in colorsys.hsv_to_rgb(hue, 1.0, 1.0))


def _pixels(width: float) -> int:
    return max(1, round(width))
