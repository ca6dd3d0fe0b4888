"""Figure and ground: which pixels of a picture belong to its objects, by colour alone.

The border of a picture is taken to be background: its few colours (a plain ground has one, stripes two) are the
ground's palette. So is a colour that comes back in many places on the ground, all over the picture: dots, flowers.
What differs from the whole palette is figure. Nothing else is known here: neither the prompt nor the
condition nor the true mask, so the same function measures a drawn picture and a true one without favour.
"""

from __future__ import annotations

from itertools import combinations

import cv2
import numpy as np

_RING = 0.03  # width of the border that is looked at, as a share of the shorter side
_SECTORS = 4  # parts of each side; a ground colour shows in several of the 16, an object that touches the frame in few
_MIN_SECTORS = 5
_MIN_SHARE = 0.02  # of a sector's pixels, to count as showing there
_MAX_COLORS = 5  # clusters that the border is split into
_SAME_COLOR = 12.0  # Lab distance under which two clusters are one colour
_MIXED_SHARE = 0.12  # of the border, under which a colour between two others is their smooth edge
_CLIP = 40.0  # Lab distance beyond which a pixel is figure whatever the rest: keeps the threshold off faint colours
_THRESHOLD = (6.0, 20.0)  # bounds of the threshold in Lab: 2.3 is just noticeable
_WIDE = 0.07  # of the shorter side: what is wider is no soft edge of a pattern
_REPEATS = 6  # places in which a colour must come back to be a pattern's: more than the objects of one colour
_QUARTERS = 3  # of the picture, in which it must come back: an object may hide it in one
_SURROUNDED = 0.6  # share of such a place's rim that must be ground: spots on an object are not the ground's pattern
_INSIDE = ((4, 6), (2, 4))  # where an object's own colour is looked for: pixels deep, and pixels away
_MIN_PART = 0.004  # parts smaller than this share of the picture are specks
_MIN_PART_OF_LARGEST = 0.06  # and so are those smaller than this share of the largest part


def figure_mask(image: np.ndarray) -> np.ndarray:
    """(H,W,3) uint8 sRGB -> (H,W) bool, True where an object is seen.

    A picture of one colour has no figure: the mask is empty.
    """
    lab = _lab(image)
    palette = _ground_palette(lab)
    palette = np.concatenate([palette, _pattern_colors(lab, palette)])
    distance = _distance(lab, palette)
    coarse = _coarse(lab, palette, distance)
    return _without_specks(_refined(coarse, lab, distance))


def _coarse(lab: np.ndarray, palette: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Where the picture differs from the ground, (H,W) bool, before the edge is put in its place.

    On a patterned ground soft edges show mixtures of its colours, which are near none of them. So what looks like a
    mixture counts only where it is too wide to be an edge: a grey object on black and white stripes is one.
    """
    differs = distance > _threshold(distance)
    if len(palette) == 1:
        return _without_specks(_opened(differs, 3))
    unmixed = _opened(_distance_to_mixtures(lab, palette) > _threshold(distance), 3)
    wide = max(5, round(_WIDE * min(differs.shape)))
    seeds = _without_specks(unmixed | _opened(differs, wide))
    return _without_specks(_opened(differs & _grown(seeds, 2), 3))


def _distance_to_mixtures(lab: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """(H,W): Lab distance of each pixel to the nearest straight line between two colours of the ground."""
    nearest = np.full(lab.shape[:2], np.inf)
    for a, b in combinations(palette, 2):
        nearest = np.minimum(nearest, np.linalg.norm(lab - _on_line(lab, a, b), axis=2))
    return nearest


def _on_line(colors: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(...,3): of each colour (...,3) the nearest mixture of `a` and `b`."""
    along = np.clip((colors - a) @ (b - a) / np.dot(b - a, b - a), 0, 1)
    return a + along[..., None] * (b - a)


def _lab(image: np.ndarray) -> np.ndarray:
    """(H,W,3) uint8 -> (H,W,3) float32 CIE Lab, lightly smoothed: the median keeps edges where they are."""
    return cv2.cvtColor(cv2.medianBlur(np.ascontiguousarray(image), 3).astype(np.float32) / 255, cv2.COLOR_RGB2LAB)


def _ground_palette(lab: np.ndarray) -> np.ndarray:
    """(H,W,3) -> (K,3): the colours that are spread along the border."""
    pixels, sectors = _border(lab)
    centers, labels = _clusters(pixels)
    shown = np.zeros((len(centers), 4 * _SECTORS))
    np.add.at(shown, (labels, sectors), 1)
    spread = (shown / np.bincount(sectors, minlength=4 * _SECTORS) > _MIN_SHARE).sum(axis=1)
    shares = np.bincount(labels, minlength=len(centers)) / len(labels)  # falling: the first is the largest
    keep = (spread >= _MIN_SECTORS) & ~_mixed(centers, shares)
    keep[0] = True
    return centers[keep]


def _mixed(centers: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """(K,3), (K,) -> (K,) bool: small colours between two larger ones, as smooth edges of stripes have them."""
    mixed = np.zeros(len(centers), bool)
    for i, color in enumerate(centers):
        for a, b in combinations(centers[:i], 2):
            near = np.linalg.norm(color - _on_line(color, a, b)) < _SAME_COLOR
            mixed[i] |= near and shares[i] < _MIXED_SHARE
    return mixed


def _pattern_colors(lab: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """(H,W,3), (K,3) -> (N,3): the colours of small things that are repeated on the ground, all over it."""
    distance = _distance(lab, palette)
    other = distance > _threshold(distance)
    if np.count_nonzero(other) < 4 * _REPEATS:  # too few for a pattern, and OpenCV reads a single pixel as three
        return palette[:0]
    centers, labels = _clusters(lab[other])
    colored = np.full(other.shape, -1)
    colored[other] = labels
    return centers[[_is_repeated(colored == i, ~other) for i in range(len(centers))]]


def _is_repeated(mask: np.ndarray, ground: np.ndarray) -> bool:
    """Whether a colour's pixels (H,W) are many separate places, with ground around them, all over the picture."""
    mask = _opened(mask, 3)  # the smooth edge of a larger object leaves thin shreds of a mixed colour
    _, _, stats, centroids = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    smooth_edge, beyond = (_grown(mask, pixels) for pixels in (3, 5))
    rim = beyond & ~smooth_edge
    large = stats[1:, cv2.CC_STAT_AREA] >= max(4, 2e-4 * mask.size)
    if large.sum() < _REPEATS or ground[rim].mean() < _SURROUNDED:
        return False
    height, width = mask.shape
    x, y = centroids[1:][large].T
    return len({(a, b) for a, b in zip(x > width / 2, y > height / 2, strict=True)}) >= _QUARTERS


def _grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    return cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8), iterations=pixels) > 0


def _border(lab: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The border's pixels (M,3), and which of the 4 x _SECTORS parts each lies in (M,)."""
    height, width = lab.shape[:2]
    ring = max(2, round(_RING * min(height, width)))
    y, x = np.mgrid[0:height, 0:width]
    depth = np.stack([y, height - 1 - y, x, width - 1 - x])  # to the top, bottom, left and right side
    side = depth.argmin(axis=0)
    along = np.where(side < 2, x / width, y / height)
    inside = depth.min(axis=0) < ring
    return lab[inside], (side * _SECTORS + (along * _SECTORS).astype(int))[inside]


def _clusters(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(M,3) -> centres (K,3) and the centre of each pixel (M,): k-means, seeded, near centres merged, the
    largest first."""
    count = min(_MAX_COLORS, len(np.unique(pixels, axis=0)))
    cv2.setRNGSeed(0)
    stop = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 20, 0.5)
    start = np.zeros((len(pixels), 1), np.int32)
    _, found, centers = cv2.kmeans(np.ascontiguousarray(pixels), count, start, stop, 3, cv2.KMEANS_PP_CENTERS)
    labels = np.asarray(found, np.int64).ravel()
    sizes = np.bincount(labels, minlength=len(centers))
    kept: list[int] = []
    for i in np.argsort(-sizes, kind="stable"):
        if all(np.linalg.norm(centers[i] - centers[k]) >= _SAME_COLOR for k in kept):
            kept.append(i)
    centers = centers[kept]
    return centers, np.linalg.norm(pixels[:, None] - centers, axis=2).argmin(axis=1)


def _distance(lab: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """(H,W): Lab distance of each pixel to the nearest colour of the ground."""
    return np.linalg.norm(lab[:, :, None] - palette, axis=3).min(axis=2)


def _threshold(distance: np.ndarray) -> float:
    """Otsu's threshold of the clipped distances, held within what the eye calls another colour."""
    scaled = np.rint(np.minimum(distance, _CLIP) * (255 / _CLIP)).astype(np.uint8)
    found, _ = cv2.threshold(scaled, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return float(np.clip(found * _CLIP / 255, *_THRESHOLD))


def _opened(mask: np.ndarray, width: int) -> np.ndarray:
    """Lines thinner than `width` removed: smooth edges between two ground colours look like a third colour."""
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))
    # Beyond the frame an object goes on: padding by repetition, so that it is not thinned along the frame.
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), width, width, width, width, cv2.BORDER_REPLICATE)
    opened = cv2.morphologyEx(padded, cv2.MORPH_OPEN, kernel)
    return opened[width:-width, width:-width] > 0


def _without_specks(mask: np.ndarray) -> np.ndarray:
    """Parts that are small for the picture or for the largest part removed."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    if count == 1:
        return mask
    areas = stats[:, cv2.CC_STAT_AREA].astype(float)
    areas[0] = 0
    kept = areas >= max(_MIN_PART * mask.size, _MIN_PART_OF_LARGEST * areas.max())
    return kept[np.asarray(labels, np.int64)] & mask


def _refined(mask: np.ndarray, lab: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """The edge put half-way between an object's colour and the ground's.

    A low threshold takes in the faint rim of an object of strong colour. Each pixel of the rim is kept only where
    its colour is nearer to that of the object inside than to the ground.
    """
    inside, known = np.zeros_like(lab), np.zeros(mask.shape, bool)
    for depth, reach in _INSIDE:
        colors, near = _colors_inside(mask, lab, depth, reach)
        inside, known = np.where((near & ~known)[..., None], colors, inside), known | near
    return np.where(known, np.linalg.norm(lab - inside, axis=2) < distance, mask)


def _colors_inside(mask: np.ndarray, lab: np.ndarray, depth: int, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """For each pixel the colour of the nearest one that lies `depth` pixels inside the mask (H,W,3), and whether it
    is within `reach` pixels (H,W)."""
    core = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8), iterations=depth, borderValue=1)
    if not core.any():
        return lab, np.zeros(mask.shape, bool)
    away, labels = cv2.distanceTransformWithLabels(1 - core, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    nearest = np.asarray(labels, np.int64)
    colors = np.zeros((nearest.max() + 1, 3), np.float32)
    colors[nearest[core > 0]] = lab[core > 0]
    return colors[nearest], np.asarray(away) <= reach
