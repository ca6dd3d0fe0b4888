"""How mirroring changes a condition's colours if they distinguish left and right."""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image

Kind = Literal["map", "labels", "pose", "normal"]

HUES = 18
"""OpenPose's body colours have 18 hues, 20 degrees apart, from red. Joint k and limb k both have hue k."""

JOINT_TWINS = ((2, 5), (3, 6), (4, 7), (8, 11), (9, 12), (10, 13), (14, 15), (16, 17))
"""COCO-18 joints, right and left: shoulder, elbow, wrist, hip, knee, ankle, eye, ear; 0 is the nose, 1 the neck."""

LIMB_TWINS = ((0, 1), (2, 4), (3, 5), (6, 9), (7, 10), (8, 11), (13, 15), (14, 16))
"""Limbs in OpenPose's order, right and left: neck to shoulder, upper arm, forearm, neck to hip, thigh, shin, nose to
eye, eye to ear; 12 is neck to nose."""

LIMB_BRIGHTNESS, JOINT_BRIGHTNESS = 0.6, 1.0
FAINT = 0.25
"""Saturation; pixels below it are not part of the body: face points are white, the background is black."""


def exchange_sides(picture: Image.Image, kind: Kind) -> Image.Image:
    """Returns the picture in the colours that its mirror image needs; it is not mirrored yet. RGB or L in, RGB out if
    colours change.

    `map` and `labels`: unchanged, their colours do not depend on sides.

    `normal`: red is the x component, (x + 1) / 2, which changes its sign.

    `pose`: left and right joints and limbs exchange their hues; brightness and saturation stay. The colours are those
    of OpenPose's COCO body model (Cao et al., arXiv 1812.08008) as ControlNet's annotator draws them: joints at full
    brightness, limbs at 60 %. Joint k and limb k share a hue, so brightness decides which one a pixel is. The hands of
    whole-body models have other hues, which are not supported.
    """
    if kind == "normal":
        values = np.array(picture.convert("RGB"))
        values[..., 0] = 255 - values[..., 0]
        return Image.fromarray(values)
    if kind == "pose":
        return Image.fromarray(_exchange_hues(np.asarray(picture.convert("RGB"))))
    return picture


def _exchange_hues(values: np.ndarray) -> np.ndarray:
    """(H,W,3) u8 -> (H,W,3) u8 in which every body colour has the hue of its twin."""
    import cv2  # 15 MB of memory that most runs do not need

    hsv = cv2.cvtColor(values.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)  # hue in degrees, the others in [0,1]
    hue, saturation, value = hsv[..., 0], hsv[..., 1], hsv[..., 2]
    nearest = np.rint(hue * HUES / 360).astype(int) % HUES
    is_joint = value > (LIMB_BRIGHTNESS + JOINT_BRIGHTNESS) / 2
    turned = np.where(is_joint, _turns(JOINT_TWINS)[nearest], _turns(LIMB_TWINS)[nearest])
    hsv[..., 0] = np.where(saturation < FAINT, hue, (hue + turned) % 360)
    return np.rint(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * 255).astype(np.uint8)


def _turns(twins: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Returns the degrees (HUES,) from each hue to the hue of its twin."""
    turns = np.zeros(HUES, np.float32)
    for right, left in twins:
        turns[right] = (left - right) * 360 / HUES
        turns[left] = -turns[right]
    return turns
