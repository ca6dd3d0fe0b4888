"""Body, hands and face of the people in a picture, by the BlazePose networks.

A detector looks at the whole picture and gives two points a person, which say where the body lies and how it leans.
That region is cut out upright, and a second network finds 33 body landmarks in it, and a better region, which is looked
at again. Hands and face are looked for where the body says they are, and again where they are found. Bazarevsky et al.,
arXiv 2006.10204.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from t2i_adapter.annotators.runtime import open_tflite, run_tflite

DETECTOR_SIDE, BODY_SIDE, HAND_SIDE, FACE_SIDE = 224, 256, 224, 192
STRIDES = (8, 16, 32, 32, 32)
"""Of the detector's grids; each cell has two anchors in each."""
LOOKS = 2
"""How often the body is looked at; the first region leans on the picture as a whole, and is off by a few percent."""
MIN_SCORE, MAX_OVERLAP = 0.5, 0.3
"""Detections below this score are none, and of those that overlap more only the best counts."""
BODY_MARGIN, HAND_MARGIN, FACE_MARGIN = 1.25, 2.0, 1.5
"""Region to cut out, relative to what it is to hold."""
HAND_FROM_BODY_MARGIN, FACE_FROM_BODY_MARGIN = 2.0, 2.6
HAND_SHIFT = 0.1
"""Hands are cut out this share of their size nearer the fingertips, of which the palm's points know nothing."""
HEATMAP_REACH = 3
"""A landmark is drawn to the heatmap's mean over this many cells around it."""

NOSE, EYE_L, EYE_R, EAR_L, EAR_R = 0, 2, 5, 7, 8
SHOULDER_L, SHOULDER_R, ELBOW_L, ELBOW_R, WRIST_L, WRIST_R = 11, 12, 13, 14, 15, 16
PINKY_L, PINKY_R, INDEX_L, INDEX_R = 17, 18, 19, 20
HIP_L, HIP_R, KNEE_L, KNEE_R, ANKLE_L, ANKLE_R = 23, 24, 25, 26, 27, 28
"""Numbers of the body's landmarks; left and right are the person's."""
BODY_18 = (
    (NOSE,), (SHOULDER_L, SHOULDER_R), (SHOULDER_R,), (ELBOW_R,), (WRIST_R,), (SHOULDER_L,), (ELBOW_L,), (WRIST_L,),
    (HIP_R,), (KNEE_R,), (ANKLE_R,), (HIP_L,), (KNEE_L,), (ANKLE_L,), (EYE_R,), (EYE_L,), (EAR_R,), (EAR_L,),
)  # fmt: skip
"""OpenPose's 18 joints, each the middle of these landmarks: the neck is between the shoulders."""
PALM = (0, 1, 2, 3, 5, 6, 9, 10, 13, 14, 17, 18)
"""Hand landmarks that move little when fingers bend: the hand's region is theirs."""
MESH_EYE_R, MESH_EYE_L = 33, 263
"""Outer corners of the eyes in the mesh of 468 points."""
MESH_68 = (
    162, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 389,  # jaw, from the right ear
    71, 63, 105, 66, 107, 336, 296, 334, 293, 301,  # brows
    168, 197, 5, 4, 75, 97, 2, 326, 305,  # nose
    33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380,  # eyes
    61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181, 78, 82, 13, 312, 308, 317, 14, 87,  # lips
)  # fmt: skip
"""The mesh's points that are nearest to the 68 of the usual face annotation, in its order."""
EYES_68 = (range(36, 42), range(42, 48))


@dataclass(frozen=True)
class Person:
    """Points (N,2) x, y in pixels of the picture, NaN where not seen.

    Attributes:
        body: (18,2), OpenPose's COCO joints.
        hands: left and right, (21,2) each, wrist first, then four points a finger from the thumb on; None: not seen.
        face: (70,2), 68 points and both pupils; None: not seen.
    """

    body: np.ndarray
    hands: tuple[np.ndarray | None, np.ndarray | None]
    face: np.ndarray | None


@dataclass(frozen=True)
class Region:
    """A square that is cut out upright: its middle (x, y) and side in pixels, and its turn, clockwise in radians."""

    middle: np.ndarray
    side: float
    turn: float

    def to_picture(self, points: np.ndarray) -> np.ndarray:
        """(N,2) in [0,1] of the region -> pixels of the picture."""
        return self.middle + (points - 0.5) * self.side @ self._rotation().T

    def cut(self, picture: np.ndarray, side: int) -> np.ndarray:
        """(H,W,3) u8 -> (side,side,3) float32 in [0,1], black where the region leaves the picture."""
        shrink = min(1.0, 2 * side / self.side)  # bilinear sampling alone would skip pixels
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


def find_people(picture: np.ndarray, most: int, hands: bool, face: bool, min_score: float) -> list[Person]:
    """The people in (H,W,3) u8 RGB, the surest first, `most` at most; hands and faces only if asked for.

    Args:
        min_score: landmarks that the network deems visible with less probability count as not seen.
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
        people.append(Person(_inside(body, picture), (both[0], both[1]), _face(picture, seen) if face else None))
    return people


def _detect(picture: np.ndarray, most: int) -> list[Region]:
    """Regions of bodies, the surest first."""
    height, width = picture.shape[:2]
    whole = Region(np.array([width, height]) / 2, float(max(height, width)), 0.0)
    detector = open_tflite("pose_detection.tflite", "pose")
    out = run_tflite(detector, whole.cut(picture, DETECTOR_SIDE) * 2 - 1)
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
    """(2254,2) x, y in [0,1]: the cells' middles, grid after grid, twice for each grid of a stride."""
    grids = []
    for stride in dict.fromkeys(STRIDES):
        cells = DETECTOR_SIDE // stride
        y, x = np.divmod(np.arange(cells**2), cells)
        middles = (np.stack([x, y], axis=1) + 0.5) / cells
        grids.append(np.repeat(middles, 2 * STRIDES.count(stride), axis=0))
    return np.concatenate(grids)


def _groups(boxes: np.ndarray, scores: np.ndarray) -> list[np.ndarray]:
    """Numbers of the boxes (x0, y0, x1, y1) that mean one person together, the surest person first."""
    order = np.argsort(-scores, kind="stable")
    groups = []
    while len(order):
        same = _overlaps(boxes[order[0]], boxes[order]) > MAX_OVERLAP
        same[0] = True
        groups.append(order[same])
        order = order[~same]
    return groups


def _overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Intersection over union of one box with each of (N,4)."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    shared = np.prod(np.maximum(sides, 0), axis=1)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return shared / np.maximum(np.prod(box[2:] - box[:2]) + areas - shared, 1e-12)


def _upright(start: np.ndarray, end: np.ndarray, side: float) -> Region:
    """The region around `start` in which `end` lies straight above it."""
    dx, dy = end - start
    return Region(start, max(side, 1.0), float(np.arctan2(dx, -dy)))


def _body_region(hips: np.ndarray, end: np.ndarray) -> Region:
    """From the middle of the hips and the point above it at which the stretched body would end."""
    return _upright(hips, end, 2 * float(np.linalg.norm(end - hips)) * BODY_MARGIN)


def _body(picture: np.ndarray, region: Region) -> tuple[np.ndarray, np.ndarray] | None:
    """(33,2) pixels, and (33,) how probably they are visible and in the region; None where there is no body."""
    network = open_tflite("pose_landmark_full.tflite", "pose")
    found = None
    for _ in range(LOOKS):
        out = run_tflite(network, region.cut(picture, BODY_SIDE))
        if out["Identity_1"][0] < MIN_SCORE:  # a probability already
            return None
        values = out["Identity"].reshape(39, 5).astype(np.float64)
        points = _refined(values[:, :2] / BODY_SIDE, _sigmoid(out["Identity_3"]))
        found = region.to_picture(points[:33]), _sigmoid(values[:33, 3:]).min(axis=1)
        region = _body_region(*region.to_picture(values[33:35, :2] / BODY_SIDE))
    return found


def _refined(points: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """(N,2) in [0,1], each moved to the mean of its heatmap (h,w,N) around it where that is sure of it."""
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
    """(21,2) pixels, from the body's wrist, little finger and index; None where they or the hand are not seen."""
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
    network = open_tflite("hand_landmark_full.tflite", "pose")
    out = run_tflite(network, region.cut(picture, HAND_SIDE))
    if out["Identity_1"][0] < MIN_SCORE:
        return None
    return region.to_picture(out["Identity"].reshape(21, 3)[:, :2].astype(np.float64) / HAND_SIDE)


def _hand_region(points: np.ndarray) -> Region:
    """From the palm's points, upright along the line from the wrist to the roots of the fingers."""
    wrist, roots = points[0], (points[5] + 2 * points[9] + points[13]) / 4
    lean = _upright(wrist, roots, 1.0)
    region = _around(points[list(PALM)], lean.turn, HAND_MARGIN)
    up = np.array([np.sin(lean.turn), -np.cos(lean.turn)])
    return Region(region.middle + up * region.side / HAND_MARGIN * HAND_SHIFT, region.side, lean.turn)


def _face(picture: np.ndarray, seen: np.ndarray) -> np.ndarray | None:
    """(70,2) pixels, from the body's landmarks (33,2); None where eyes, nose or the face are not seen."""
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
    network = open_tflite("face_landmark.tflite", "pose")
    out = run_tflite(network, region.cut(picture, FACE_SIDE))
    if _sigmoid(out["conv2d_31"].ravel()[0]) < MIN_SCORE:
        return None
    return region.to_picture(out["conv2d_21"].reshape(468, 3)[:, :2].astype(np.float64) / FACE_SIDE)


def _level(right: np.ndarray, left: np.ndarray) -> float:
    """The turn at which the line from the right eye to the left one is level."""
    dx, dy = left - right
    return float(np.arctan2(dy, dx))


def _around(points: np.ndarray, turn: float, margin: float) -> Region:
    """The region that holds (N,2) points when it is turned so, times a margin."""
    rotation = Region(np.zeros(2), 1.0, turn)._rotation()
    turned = points @ rotation  # into the region's own directions
    low, high = turned.min(axis=0), turned.max(axis=0)
    return Region(rotation @ ((low + high) / 2), max(1.0, float((high - low).max()) * margin), turn)


def _inside(points: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """The points, NaN where they leave the picture: the networks guess on beyond its edge."""
    height, width = picture.shape[:2]
    with np.errstate(invalid="ignore"):
        kept = np.all((points >= 0) & (points <= np.array([width, height])), axis=1)
    return np.where(kept[:, None], points, np.nan)


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(values.astype(np.float64), -100, 100)))
