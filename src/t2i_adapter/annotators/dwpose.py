"""Skeletons by DWPose (Yang et al., arXiv 2307.15880), run from its two published ONNX files.

YOLOX finds the people; a network of the RTMPose family finds 133 points in each one's box, as two rows of
probabilities a point, one along x and one along y. They are drawn as `pose` draws its points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from PIL import Image

from t2i_adapter.annotators.mediapipe.landmarks import Person
from t2i_adapter.annotators.mediapipe.skeleton import draw_people
from t2i_adapter.annotators.mirror import Kind
from t2i_adapter.annotators.pretrained import locate, pin
from t2i_adapter.annotators.registry import Polarity
from t2i_adapter.annotators.runtime import open_onnx, optional, run_onnx
from t2i_adapter.errors import UserError

DETECTOR, POINTS = "yolox_l.onnx", "dw-ll_ucoco_384.onnx"
EXTRA = "dwpose"

DETECTOR_SIDE = 640
STRIDES = (8, 16, 32)
"""Of the detector's grids; each cell has one box."""
GREY = 114
"""What fills the detector's square beside the picture."""
PERSON_COLUMN = 5
"""Of a box's row: x, y, log width, log height, trust, then the classes, of which the first is a person."""
MIN_SCORE, MAX_OVERLAP = 0.3, 0.45
"""People the detector trusts less are none, and of boxes that overlap more only the surest counts."""

WIDTH, HEIGHT = 288, 384
"""What the second network sees of each person."""
MARGIN = 1.25
"""Region to cut out, relative to the person's box."""
SPLIT = 2
"""Bins a pixel in its rows of probabilities."""
MEAN = np.array([123.675, 116.28, 103.53], np.float32)
DEVIATION = np.array([58.395, 57.12, 57.375], np.float32)

BODY_18 = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
"""OpenPose's joints among the 133 points; it alone has a neck, which is the middle of the shoulders."""
SHOULDERS = (5, 6)
FACE, HAND_L, HAND_R = slice(23, 91), slice(91, 112), slice(112, 133)
PUPILS = 2
"""Last of a face's points, which these networks do not find."""


class DwPose:
    """Skeletons by DWPose: body, hands and face of everyone in the picture, also in crowds and from afar."""

    @dataclass(frozen=True)
    class Options:
        """`people`: how many at most, the surest first. `hands`, `face`: draw them too. `visible`: points are drawn
        that the network trusts this much. `model`, `revision`: hub id or folder of yolox_l.onnx and
        dw-ll_ucoco_384.onnx, and its commit; empty takes the one known here."""

        people: int = 16
        hands: bool = True
        face: bool = True
        visible: float = 0.3
        model: str = "yzd-v/DWPose"
        revision: str = ""

        def __post_init__(self) -> None:
            if self.people < 1:
                raise UserError(f"dwpose: people={self.people}; needed is 1 or more.")
            if not 0 <= self.visible <= 1:
                raise UserError(f"dwpose: visible={self.visible:g}; allowed is 0 to 1.")
            pin(self, "dwpose", "*.onnx")

    version = 1
    channels: Literal[1, 3] = 3
    kind: Kind = "pose"
    polarity: Polarity = "none"
    levels: Literal[2, 256] = 256
    licence = "Apache-2.0 (DWPose, YOLOX)"
    weights = "hub: yzd-v/DWPose"
    needs = f"sdxl-t2i-adapter[{EXTRA}]"

    def __init__(self, options: Options) -> None:
        self._options = options

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        options, picture = self._options, np.asarray(image)
        optional("onnxruntime", "dwpose", EXTRA)  # before 350 MB are downloaded
        folder = locate(options.model, options.revision, "dwpose", (DETECTOR, POINTS))
        detector, network = (open_onnx(folder / name, "dwpose", EXTRA) for name in (DETECTOR, POINTS))
        people = [_person(*_find_points(network, picture, box), options) for box in _find_boxes(detector, picture)]
        return Image.fromarray(draw_people(people[: options.people], *picture.shape[:2]))


def _find_boxes(detector: Any, picture: np.ndarray) -> np.ndarray:
    """(H,W,3) u8 RGB -> (N,4) left, top, right, bottom of the people, the surest first."""
    height, width = picture.shape[:2]
    scale = DETECTOR_SIDE / max(height, width)
    small = cv2.resize(picture, (max(1, int(width * scale)), max(1, int(height * scale))))
    square = np.full((DETECTOR_SIDE, DETECTOR_SIDE, 3), GREY, np.uint8)
    square[: small.shape[0], : small.shape[1]] = small
    (rows,) = run_onnx(detector, square[..., ::-1].transpose(2, 0, 1))  # blue, green, red, 0 to 255
    cells, strides = _cells()
    middles, sizes = (rows[:, :2] + cells) * strides, np.exp(rows[:, 2:4]) * strides
    scores = rows[:, 4] * rows[:, PERSON_COLUMN]
    boxes = np.concatenate([middles - sizes / 2, middles + sizes / 2], axis=1) / scale
    corners_and_sizes = np.concatenate([boxes[:, :2], sizes / scale], axis=1)
    kept = cv2.dnn.NMSBoxes(corners_and_sizes.tolist(), scores.tolist(), MIN_SCORE, MAX_OVERLAP)
    return boxes[np.asarray(kept, int).reshape(-1)]


def _cells() -> tuple[np.ndarray, np.ndarray]:
    """(N,2) column and row of each box's cell in its grid, and (N,1) the grid's stride."""
    sides = [DETECTOR_SIDE // stride for stride in STRIDES]
    cells = [np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2) for side in sides]
    return np.concatenate(cells), np.repeat(STRIDES, [side * side for side in sides])[:, None]


def _find_points(network: Any, picture: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(133,2) points x, y in pixels of the picture, and the trust in each (133,)."""
    middle, size = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) * MARGIN
    width = max(size[0], size[1] * WIDTH / HEIGHT)
    scale = width / WIDTH  # pixels of the picture to one that the network sees
    corner = middle - np.array([WIDTH, HEIGHT]) * scale / 2
    matrix = np.array([[scale, 0, corner[0]], [0, scale, corner[1]]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    seen = cv2.warpAffine(picture, matrix, (WIDTH, HEIGHT), flags=flags)
    along_x, along_y = run_onnx(network, ((seen - MEAN) / DEVIATION).transpose(2, 0, 1))
    found = np.stack([along_x.argmax(axis=1), along_y.argmax(axis=1)], axis=1) / SPLIT
    return corner + found * scale, np.minimum(along_x.max(axis=1), along_y.max(axis=1))


def _person(points: np.ndarray, trust: np.ndarray, options: DwPose.Options) -> Person:
    seen = np.where(trust[:, None] >= options.visible, points, np.nan)
    neck = seen[list(SHOULDERS)].mean(axis=0)
    body = np.stack([neck if joint is None else seen[joint] for joint in BODY_18])
    hands = (seen[HAND_L], seen[HAND_R]) if options.hands else (None, None)
    face = np.concatenate([seen[FACE], np.full((PUPILS, 2), np.nan)]) if options.face else None
    return Person(body, hands, face)
