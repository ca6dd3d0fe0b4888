"""The kind `pose`: body, hands and face of the people in an image, by MediaPipe's BlazePose networks.

A detector runs on the whole image and returns two points a person, which determine the body's position and rotation.
That region is cropped upright; a second network returns 33 body landmarks in it and a more exact region, and runs again
on that one. The networks of hands and face run on regions that the body's landmarks predict, then on regions from their
own first result. Bazarevsky et al., arXiv 2006.10204.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from PIL import Image

from t2i_adapter.annotators.registry import Facts
from t2i_adapter.annotators.runtime import open_tflite, run_tflite
from t2i_adapter.annotators.skeleton import Skeleton, draw_people
from t2i_adapter.errors import UserError

DETECTOR_SIDE, BODY_SIDE, HAND_SIDE, FACE_SIDE = 224, 256, 224, 192
STRIDES = (8, 16, 32, 32, 32)
"""Strides in pixels of the detector's grids. Each cell has two anchors a grid."""
BODY_PASSES = 2
"""Runs of the body's network. Its first region comes from the detector and is off by a few percent."""
MIN_SCORE, MAX_OVERLAP = 0.5, 0.3
"""Least score of a detection, and overlap above which detections are merged into one person."""
BODY_MARGIN, HAND_MARGIN, FACE_MARGIN = 1.25, 2.0, 1.5
"""Size of the cropped region, relative to its content."""
HAND_FROM_BODY_MARGIN, FACE_FROM_BODY_MARGIN = 2.0, 2.6
HAND_SHIFT = 0.1
"""The hand's region is shifted towards the fingertips by this share of its size: the palm's points exclude them."""
HEATMAP_REACH = 3
"""Cells on each side of a landmark over which the heatmap's mean is taken."""

NOSE, EYE_L, EYE_R, EAR_L, EAR_R = 0, 2, 5, 7, 8
SHOULDER_L, SHOULDER_R, ELBOW_L, ELBOW_R, WRIST_L, WRIST_R = 11, 12, 13, 14, 15, 16
PINKY_L, PINKY_R, INDEX_L, INDEX_R = 17, 18, 19, 20
HIP_L, HIP_R, KNEE_L, KNEE_R, ANKLE_L, ANKLE_R = 23, 24, 25, 26, 27, 28
"""Indices of the body's landmarks. Left and right are the person's."""
BODY_18 = (
    (NOSE,), (SHOULDER_L, SHOULDER_R), (SHOULDER_R,), (ELBOW_R,), (WRIST_R,), (SHOULDER_L,), (ELBOW_L,), (WRIST_L,),
    (HIP_R,), (KNEE_R,), (ANKLE_R,), (HIP_L,), (KNEE_L,), (ANKLE_L,), (EYE_R,), (EYE_L,), (EAR_R,), (EAR_L,),
)  # fmt: skip
"""OpenPose's 18 joints; each is the mean of these landmarks. The neck is the middle of the shoulders."""
PALM = (0, 1, 2, 3, 5, 6, 9, 10, 13, 14, 17, 18)
"""Hand landmarks that move little when fingers bend. They determine the hand's region."""
MESH_EYE_R, MESH_EYE_L = 33, 263
"""Outer corners of the eyes in the mesh of 468 points."""
MESH_68 = (
    162, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 389,  # jaw, from the right ear
    71, 63, 105, 66, 107, 336, 296, 334, 293, 301,  # brows
    168, 197, 5, 4, 75, 97, 2, 326, 305,  # nose
    33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380,  # eyes
    61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181, 78, 82, 13, 312, 308, 317, 14, 87,  # lips
)  # fmt: skip
"""Points of the mesh nearest to the 68 points of the common face annotation, in its order."""
EYES_68 = (range(36, 42), range(42, 48))


@dataclass(frozen=True)
class Pose:
    """18 body joints, both hands and the face of each person, on black.

    `people`: how many at most, highest score first. `hands`, `face`: draw them too. `visible`: joints that are visible
    with at least this probability are drawn.
    """

    facts = Facts(
        channels=3,
        kind="pose",
        licence="Apache-2.0 (MediaPipe)",
        weights="mediapipe 0.10.21: python -m t2i_adapter.annotators.weights pose",
        needs="sdxl-t2i-adapter[pose]",
    )
    people: int = 4
    hands: bool = True
    face: bool = True
    visible: float = 0.5

    def __post_init__(self) -> None:
        if self.people < 1:
            raise UserError(f"people={self.people}; allowed is 1 or more.")
        if not 0 <= self.visible <= 1:
            raise UserError(f"visible={self.visible:g}; allowed is a probability, 0 to 1.")

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        return Image.fromarray(draw_people(self.skeletons(image), image.height, image.width))

    def skeletons(self, image: Image.Image) -> list[Skeleton]:
        """Returns the people that the map shows, highest score first."""
        return find_people(np.asarray(image), self.people, self.hands, self.face, self.visible)


@dataclass(frozen=True)
class Region:
    """A rotated square that is cropped upright: its middle (x, y) and side in pixels, its turn clockwise in radians."""

    middle: np.ndarray
    side: float
    turn: float

    def to_picture(self, points: np.ndarray) -> np.ndarray:
        """(N,2) in [0,1] of the region -> (N,2) in pixels of the image."""
        return self.middle + (points - 0.5) * self.side @ self._rotation().T

    def crop(self, picture: np.ndarray, side: int) -> np.ndarray:
        """(H,W,3) u8 -> (side,side,3) float32 in [0,1]. Pixels outside the image are black."""
        shrink = min(1.0, 2 * side / self.side)  # bilinear sampling alone would skip pixels of large regions
        if shrink < 1:
            height, width = picture.shape[:2]
            small = max(1, round(width * shrink)), max(1, round(height * shrink))
            picture = cv2.resize(picture, small, interpolation=cv2.INTER_AREA)
        scale = self.side * shrink / side
        matrix = np.hstack([self._rotation() * scale, np.zeros((2, 1))])
        centre = np.full(2, (side - 1) / 2)
        matrix[:, 2] = self.middle * shrink - 0.5 - matrix[:, :2] @ centre
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(picture, matrix, (side, side), flags=flags).astype(np.float32) / 255

    def _rotation(self) -> np.ndarray:
        cos, sin = np.cos(self.turn), np.sin(self.turn)
        return np.array([[cos, -sin], [sin, cos]])


def find_people(picture: np.ndarray, most: int, hands: bool, face: bool, min_score: float) -> list[Skeleton]:
    """Returns the people in an image (H,W,3) u8 RGB, at most `most`, highest score first.

    Args:
        hands, face: whether to detect them.
        min_score: landmarks with a lower probability of being visible are NaN.
    """
    people = []
    for region in _detect(picture, most):
        found = _body(picture, region)
        if found is None:
            continue
        landmarks, visible = found
        seen = np.where(visible[:, None] >= min_score, landmarks, np.nan)
        body = np.stack([seen[list(parts)].mean(axis=0) for parts in BODY_18])
        wrists = ((WRIST_L, PINKY_L, INDEX_L), (WRIST_R, PINKY_R, INDEX_R))
        both = [_hand(picture, seen[list(parts)]) if hands else None for parts in wrists]
        people.append(Skeleton(_inside(body, picture), (both[0], both[1]), _face(picture, seen) if face else None))
    return people


def _detect(picture: np.ndarray, most: int) -> list[Region]:
    """Returns the regions of bodies, highest score first."""
    height, width = picture.shape[:2]
    whole = Region(np.array([width, height]) / 2, float(max(height, width)), 0.0)
    detector = open_tflite("pose_detection.tflite")
    out = run_tflite(detector, whole.crop(picture, DETECTOR_SIDE) * 2 - 1)
    scores = _sigmoid(out["Identity_1"][:, 0])
    chosen = np.flatnonzero(scores >= MIN_SCORE)
    values = out["Identity"][chosen].astype(np.float64) / DETECTOR_SIDE
    centres = values[:, :2] + _anchors()[chosen]
    boxes = np.hstack([centres - values[:, 2:4] / 2, centres + values[:, 2:4] / 2])
    points = values[:, 4:8].reshape(-1, 2, 2) + _anchors()[chosen][:, None]  # middle of the hips; end of the body
    regions = []
    for group in _groups(boxes, scores[chosen])[:most]:
        weights = scores[chosen][group]
        hips, end = whole.to_picture(np.average(points[group], axis=0, weights=weights))
        regions.append(_body_region(hips, end))
    return regions


@lru_cache(maxsize=1)
def _anchors() -> np.ndarray:
    """Returns the middles x, y of the cells, (2254,2) in [0,1], grid after grid, twice for each grid of a stride."""
    grids = []
    for stride in dict.fromkeys(STRIDES):
        cells = DETECTOR_SIDE // stride
        y, x = np.divmod(np.arange(cells**2), cells)
        middles = (np.stack([x, y], axis=1) + 0.5) / cells
        grids.append(np.repeat(middles, 2 * STRIDES.count(stride), axis=0))
    return np.concatenate(grids)


def _groups(boxes: np.ndarray, scores: np.ndarray) -> list[np.ndarray]:
    """Returns the indices of the boxes (x0, y0, x1, y1) of each person, highest score first."""
    order = np.argsort(-scores, kind="stable")
    groups = []
    while len(order):
        same = _overlaps(boxes[order[0]], boxes[order]) > MAX_OVERLAP
        same[0] = True
        groups.append(order[same])
        order = order[~same]
    return groups


def _overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Returns the intersection over union (N,) of one box with each of (N,4)."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    shared = np.prod(np.maximum(sides, 0), axis=1)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return shared / np.maximum(np.prod(box[2:] - box[:2]) + areas - shared, 1e-12)


def _upright(start: np.ndarray, end: np.ndarray, side: float) -> Region:
    """Returns the region around `start` in which `end` is straight above it."""
    dx, dy = end - start
    return Region(start, max(side, 1.0), float(np.arctan2(dx, -dy)))


def _body_region(hips: np.ndarray, end: np.ndarray) -> Region:
    """Returns the region of a body, from the middle of the hips and the end point of the stretched body above it."""
    return _upright(hips, end, 2 * float(np.linalg.norm(end - hips)) * BODY_MARGIN)


def _body(picture: np.ndarray, region: Region) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns 33 landmarks (33,2) in pixels and the probabilities (33,) that they are visible and inside the region.
    Returns None if there is no body."""
    network = open_tflite("pose_landmark_full.tflite")
    found = None
    for _ in range(BODY_PASSES):
        out = run_tflite(network, region.crop(picture, BODY_SIDE))
        if out["Identity_1"][0] < MIN_SCORE:  # a probability already
            return None
        values = out["Identity"].reshape(39, 5).astype(np.float64)
        points = _refined(values[:, :2] / BODY_SIDE, _sigmoid(out["Identity_3"]))
        found = region.to_picture(points[:33]), _sigmoid(values[:33, 3:]).min(axis=1)
        region = _body_region(*region.to_picture(values[33:35, :2] / BODY_SIDE))
    return found


def _refined(points: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Moves each of the points (N,2), in [0,1], to the mean of its heatmap (h,w,N) nearby, if the heatmap's maximum
    there is at least `MIN_SCORE`."""
    height, width = heat.shape[:2]
    moved = points.copy()
    for n, (x, y) in enumerate(points):
        column, row = int(x * width), int(y * height)
        if not (0 <= column < width and 0 <= row < height):
            continue
        top, left = max(0, row - HEATMAP_REACH), max(0, column - HEATMAP_REACH)
        patch = heat[top : row + HEATMAP_REACH + 1, left : column + HEATMAP_REACH + 1, n]
        if patch.max() >= MIN_SCORE:
            rows, columns = np.indices(patch.shape)
            moved[n] = (
                (patch * (columns + left)).sum() / patch.sum() / width,
                (patch * (rows + top)).sum() / patch.sum() / height,
            )
    return moved


def _hand(picture: np.ndarray, parts: np.ndarray) -> np.ndarray | None:
    """Returns the hand (21,2) in pixels, from the body's wrist, little finger and index; None if one is not visible."""
    wrist, pinky, index = parts
    if np.isnan(parts).any():
        return None
    knuckle = (2 * index + pinky) / 3
    region = _upright(knuckle, knuckle * 2 - wrist, 2 * float(np.linalg.norm(knuckle - wrist)) * HAND_FROM_BODY_MARGIN)
    points = _hand_landmarks(picture, region)
    if points is not None:
        points = _hand_landmarks(picture, _hand_region(points))
    return None if points is None else _inside(points, picture)


def _hand_landmarks(picture: np.ndarray, region: Region) -> np.ndarray | None:
    network = open_tflite("hand_landmark_full.tflite")
    out = run_tflite(network, region.crop(picture, HAND_SIDE))
    if out["Identity_1"][0] < MIN_SCORE:
        return None
    return region.to_picture(out["Identity"].reshape(21, 3)[:, :2].astype(np.float64) / HAND_SIDE)


def _hand_region(points: np.ndarray) -> Region:
    """Returns the region of the palm's points, upright along the line from the wrist to the roots of the fingers."""
    wrist, roots = points[0], (points[5] + 2 * points[9] + points[13]) / 4
    lean = _upright(wrist, roots, 1.0)
    region = _around(points[list(PALM)], lean.turn, HAND_MARGIN)
    up = np.array([np.sin(lean.turn), -np.cos(lean.turn)])
    return Region(region.middle + up * region.side / HAND_MARGIN * HAND_SHIFT, region.side, lean.turn)


def _face(picture: np.ndarray, seen: np.ndarray) -> np.ndarray | None:
    """Returns the face (70,2) in pixels, from the body's landmarks (33,2); None if eyes, nose or face are hidden."""
    right, left, nose = seen[EYE_R], seen[EYE_L], seen[NOSE]
    if np.isnan(np.stack([right, left, nose])).any():
        return None
    head = seen[:11][~np.isnan(seen[:11, 0])]
    region = _around(head, _level(right, left), FACE_FROM_BODY_MARGIN)
    mesh = _face_landmarks(picture, region)
    if mesh is not None:
        turn = _level(mesh[MESH_EYE_R], mesh[MESH_EYE_L])
        mesh = _face_landmarks(picture, _around(mesh, turn, FACE_MARGIN))
    if mesh is None:
        return None
    points = mesh[list(MESH_68)]
    pupils = [points[list(eye)].mean(axis=0) for eye in EYES_68]
    return _inside(np.vstack([points, *(pupil[None] for pupil in pupils)]), picture)


def _face_landmarks(picture: np.ndarray, region: Region) -> np.ndarray | None:
    network = open_tflite("face_landmark.tflite")
    out = run_tflite(network, region.crop(picture, FACE_SIDE))
    if _sigmoid(out["conv2d_31"].ravel()[0]) < MIN_SCORE:
        return None
    return region.to_picture(out["conv2d_21"].reshape(468, 3)[:, :2].astype(np.float64) / FACE_SIDE)


def _level(right: np.ndarray, left: np.ndarray) -> float:
    """Returns the turn that makes the line from the right eye to the left eye horizontal."""
    dx, dy = left - right
    return float(np.arctan2(dy, dx))


def _around(points: np.ndarray, turn: float, margin: float) -> Region:
    """Returns the region with this turn that contains (N,2) points, enlarged by a margin."""
    rotation = Region(np.zeros(2), 1.0, turn)._rotation()
    turned = points @ rotation  # in the region's own axes
    low, high = turned.min(axis=0), turned.max(axis=0)
    return Region(rotation @ ((low + high) / 2), max(1.0, float((high - low).max()) * margin), turn)


def _inside(points: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """Sets points outside the image to NaN: the networks also predict points beyond its edge."""
    height, width = picture.shape[:2]
    with np.errstate(invalid="ignore"):
        inside = np.all((points >= 0) & (points <= np.array([width, height])), axis=1)
    return np.where(inside[:, None], points, np.nan)


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(values.astype(np.float64), -100, 100)))
