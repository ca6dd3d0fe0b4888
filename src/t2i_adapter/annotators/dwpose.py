"""Skeletons by DWPose (Yang et al., arXiv 2307.15880), run from its two published ONNX files.

YOLOX detects the people. A network of the RTMPose family then finds 133 points in each person's box: for each point it
returns two rows of scores, one along x and one along y. `skeleton.draw_people` draws them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from PIL import Image

from t2i_adapter.annotators.pretrained import locate, pin
from t2i_adapter.annotators.registry import Facts
from t2i_adapter.annotators.runtime import open_onnx, optional, run_onnx
from t2i_adapter.annotators.skeleton import Skeleton, draw_people
from t2i_adapter.errors import UserError

DETECTOR, POINTS = "yolox_l.onnx", "dw-ll_ucoco_384.onnx"
EXTRA = "dwpose"

DETECTOR_SIDE = 640
STRIDES = (8, 16, 32)
"""Strides in pixels of the detector's three grids. Each cell has one box."""
GREY = 114
"""Value that fills the part of the detector's square outside the image."""
PERSON_COLUMN = 5
"""Column of a box's row. A row is x, y, log width, log height, objectness, then the classes; class 0 is person."""
MIN_SCORE, MAX_OVERLAP = 0.3, 0.45
"""Least score of a box, and largest overlap with a box of a higher score (non-maximum suppression)."""

WIDTH, HEIGHT = 288, 384
"""Size in pixels of the second network's input."""
MARGIN = 1.25
"""Size of the cropped region, relative to the person's box."""
SPLIT = 2
"""Entries a pixel in the second network's rows of scores."""
MEAN = np.array([123.675, 116.28, 103.53], np.float32)
DEVIATION = np.array([58.395, 57.12, 57.375], np.float32)

BODY_18 = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
"""OpenPose's 18 joints as indices of the 133 points. None is the neck, computed as the middle of the shoulders."""
SHOULDERS = (5, 6)
FACE, HAND_L, HAND_R = slice(23, 91), slice(91, 112), slice(112, 133)
PUPILS = 2
"""Last points of a face, which these networks do not find; they are NaN."""


@dataclass(frozen=True)
class DwPose:
    """Skeletons by DWPose: body, hands and face of everyone in the image, also in crowds and at a distance.

    `people`: how many at most, highest score first. `hands`, `face`: draw them too. `visible`: points with at least
    this score are drawn. `model`, `revision`: hub id or folder of yolox_l.onnx and dw-ll_ucoco_384.onnx, and its
    commit; if empty, the commit that this package knows.
    """

    facts = Facts(
        channels=3,
        kind="pose",
        licence="Apache-2.0 (DWPose, YOLOX)",
        weights="hub: yzd-v/DWPose",
        needs=f"sdxl-t2i-adapter[{EXTRA}]",
    )
    people: int = 16
    hands: bool = True
    face: bool = True
    visible: float = 0.3
    model: str = "yzd-v/DWPose"
    revision: str = ""

    def __post_init__(self) -> None:
        if self.people < 1:
            raise UserError(f"people={self.people}; allowed is 1 or more.")
        if not 0 <= self.visible <= 1:
            raise UserError(f"visible={self.visible:g}; allowed is 0 to 1.")
        pin(self, "*.onnx")

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        return Image.fromarray(draw_people(self.skeletons(image), image.height, image.width))

    def skeletons(self, image: Image.Image) -> list[Skeleton]:
        """Returns the people that the map shows, highest score first."""
        picture = np.asarray(image)
        optional("onnxruntime", EXTRA)  # checked before 350 MB are downloaded
        folder = locate(self.model, self.revision, (DETECTOR, POINTS))
        detector, network = (open_onnx(folder / name, EXTRA) for name in (DETECTOR, POINTS))
        people = [_person(*_find_points(network, picture, box), self) for box in _find_boxes(detector, picture)]
        return people[: self.people]


def _find_boxes(detector: Any, picture: np.ndarray) -> np.ndarray:
    """(H,W,3) u8 RGB -> (N,4) left, top, right, bottom of the people, highest score first."""
    height, width = picture.shape[:2]
    scale = DETECTOR_SIDE / max(height, width)
    small = cv2.resize(picture, (max(1, int(width * scale)), max(1, int(height * scale))))
    square = np.full((DETECTOR_SIDE, DETECTOR_SIDE, 3), GREY, np.uint8)
    square[: small.shape[0], : small.shape[1]] = small
    (rows,) = run_onnx(detector, square[..., ::-1].transpose(2, 0, 1))  # BGR, 0 to 255
    cells, strides = _cells()
    middles, sizes = (rows[:, :2] + cells) * strides, np.exp(rows[:, 2:4]) * strides
    scores = rows[:, 4] * rows[:, PERSON_COLUMN]
    boxes = np.concatenate([middles - sizes / 2, middles + sizes / 2], axis=1) / scale
    corners_and_sizes = np.concatenate([boxes[:, :2], sizes / scale], axis=1)
    chosen = cv2.dnn.NMSBoxes(corners_and_sizes.tolist(), scores.tolist(), MIN_SCORE, MAX_OVERLAP)
    return boxes[np.asarray(chosen, int).reshape(-1)]


def _cells() -> tuple[np.ndarray, np.ndarray]:
    """Returns column and row of each box's cell in its grid (N,2), and the grid's stride (N,1)."""
    sides = [DETECTOR_SIDE // stride for stride in STRIDES]
    cells = [np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2) for side in sides]
    return np.concatenate(cells), np.repeat(STRIDES, [side * side for side in sides])[:, None]


def _find_points(network: Any, picture: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the points x, y in pixels of the image (133,2) and their scores (133,)."""
    middle, size = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) * MARGIN
    width = max(size[0], size[1] * WIDTH / HEIGHT)
    scale = width / WIDTH  # pixels of the image to one of the network's input
    corner = middle - np.array([WIDTH, HEIGHT]) * scale / 2
    matrix = np.array([[scale, 0, corner[0]], [0, scale, corner[1]]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    crop = cv2.warpAffine(picture, matrix, (WIDTH, HEIGHT), flags=flags)
    along_x, along_y = run_onnx(network, ((crop - MEAN) / DEVIATION).transpose(2, 0, 1))
    found = np.stack([along_x.argmax(axis=1), along_y.argmax(axis=1)], axis=1) / SPLIT
    return corner + found * scale, np.minimum(along_x.max(axis=1), along_y.max(axis=1))


def _person(points: np.ndarray, scores: np.ndarray, options: DwPose) -> Skeleton:
    visible = np.where(scores[:, None] >= options.visible, points, np.nan)
    neck = visible[list(SHOULDERS)].mean(axis=0)
    body = np.stack([neck if joint is None else visible[joint] for joint in BODY_18])
    hands = (visible[HAND_L], visible[HAND_R]) if options.hands else (None, None)
    face = np.concatenate([visible[FACE], np.full((PUPILS, 2), np.nan)]) if options.face else None
    return Skeleton(body, hands, face)
