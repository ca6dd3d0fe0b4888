"""Segments a picture into foreground and background by colour alone.

The colours that are spread along the border (one on a plain background, two on stripes) are the background's palette.
So are colours that occur in many separate places on the background, all over the picture, such as dots and flowers.
Pixels that differ from the whole palette are foreground. The segmenter sees neither the prompt nor the condition nor
the true mask, so it treats generated and true pictures alike.
"""

from __future__ import annotations

from itertools import combinations

import cv2
import numpy as np

_RING = 0.03  # width of the border, as a share of the shorter side
_SECTORS = 4  # sectors per side; a background colour shows in several of the 16, an object at the frame in few
_MIN_SECTORS = 5  # in which a background colour shows
_MIN_SHARE = 0.02  # of a sector's pixels, to count as showing there
_MAX_COLORS = 5  # clusters of the border's pixels
_SAME_COLOR = 12.0  # Lab distance below which two clusters are one colour
_MIXED_SHARE = 0.12  # of the border; a rarer colour between two others is their antialiased edge
_CLIP = 40.0  # Lab distance at which distances are clipped: strong colours do not raise Otsu's threshold
_THRESHOLD = (6.0, 20.0)  # bounds of the threshold in Lab; 2.3 is just noticeable
_WIDE = 0.07  # of the shorter side; wider regions are not antialiased edges of a pattern
_REPEATS = 6  # places of a pattern's colour, at least: more than the objects of one colour
_QUARTERS = 3  # quarters of the picture that have such places, at least; an object may hide the fourth
_SURROUNDED = 0.6  # share of the places' rim that is background, at least: spots on an object are no pattern of it
_INSIDE = ((4, 6), (2, 4))  # (depth, reach) in pixels at which an object's own colour is looked up
_MIN_PART = 0.004  # share of the picture; smaller parts are specks
_MIN_PART_OF_LARGEST = 0.06  # share of the largest part; smaller parts are specks


def foreground_mask(image: np.ndarray) -> np.ndarray:
    """(H,W,3) uint8 sRGB -> (H,W) bool, True for the pixels of objects. The mask of a one-colour picture is empty."""
    lab = _lab(image)
    palette = _background_palette(lab)
    palette = np.concatenate([palette, _pattern_colors(lab, palette)])
    distance = _distance(lab, palette)
    coarse = _coarse(lab, palette, distance)
    return _without_specks(_refined(coarse, lab, distance))


def _coarse(lab: np.ndarray, palette: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Returns (H,W) bool, True where the picture differs from the background; its edges are not refined yet.

    The antialiased edges of a patterned background are mixtures of its colours and near to none of them. So pixels of
    a mixed colour count only in regions too wide for an edge, such as a grey object on black and white stripes.
    """
    differs = distance > _threshold(distance)
    if len(palette) == 1:
        return _without_specks(_opened(differs, 3))
    unmixed = _opened(_distance_to_mixtures(lab, palette) > _threshold(distance), 3)
    wide = max(5, round(_WIDE * min(differs.shape)))
    seeds = _without_specks(unmixed | _opened(differs, wide))
    return _without_specks(_opened(differs & _grown(seeds, 2), 3))


def _distance_to_mixtures(lab: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """(H,W): Lab distance of each pixel to the nearest straight line between two colours of the palette."""
    nearest = np.full(lab.shape[:2], np.inf)
    for a, b in combinations(palette, 2):
        nearest = np.minimum(nearest, np.linalg.norm(lab - _on_line(lab, a, b), axis=2))
    return nearest


def _on_line(colors: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the mixture of `a` and `b` that is nearest to each colour (...,3)."""
    along = np.clip((colors - a) @ (b - a) / np.dot(b - a, b - a), 0, 1)
    return a + along[..., None] * (b - a)


def _lab(image: np.ndarray) -> np.ndarray:
    """(H,W,3) uint8 -> (H,W,3) float32 CIE Lab, smoothed by a median, which does not move edges."""
    return cv2.cvtColor(cv2.medianBlur(np.ascontiguousarray(image), 3).astype(np.float32) / 255, cv2.COLOR_RGB2LAB)


def _background_palette(lab: np.ndarray) -> np.ndarray:
    """(H,W,3) -> (K,3): the colours that are spread along the border."""
    pixels, sectors = _border(lab)
    centers, labels = _clusters(pixels)
    shown = np.zeros((len(centers), 4 * _SECTORS))
    np.add.at(shown, (labels, sectors), 1)
    spread = (shown / np.bincount(sectors, minlength=4 * _SECTORS) > _MIN_SHARE).sum(axis=1)
    shares = np.bincount(labels, minlength=len(centers)) / len(labels)  # descending
    keep = (spread >= _MIN_SECTORS) & ~_mixed(centers, shares)
    keep[0] = True
    return centers[keep]


def _mixed(centers: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """(K,3), (K,) -> (K,) bool: rare colours between two more frequent ones, as in antialiased edges of stripes."""
    mixed = np.zeros(len(centers), bool)
    for i, color in enumerate(centers):
        for a, b in combinations(centers[:i], 2):
            near = np.linalg.norm(color - _on_line(color, a, b)) < _SAME_COLOR
            mixed[i] |= near and shares[i] < _MIXED_SHARE
    return mixed


def _pattern_colors(lab: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """(H,W,3), (K,3) -> (N,3): the colours of small shapes that are repeated all over the background."""
    distance = _distance(lab, palette)
    other = distance > _threshold(distance)
    if np.count_nonzero(other) < 4 * _REPEATS:  # too few for a pattern, and OpenCV reads a single pixel as three
        return palette[:0]
    centers, labels = _clusters(lab[other])
    colored = np.full(other.shape, -1)
    colored[other] = labels
    return centers[[_is_repeated(colored == i, ~other) for i in range(len(centers))]]


def _is_repeated(mask: np.ndarray, background: np.ndarray) -> bool:
    """Whether a colour's pixels (H,W) form many separate places, surrounded by background, all over the picture."""
    mask = _opened(mask, 3)  # removes the thin antialiased edges of larger objects
    _, _, stats, centroids = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    edge, beyond = (_grown(mask, pixels) for pixels in (3, 5))
    rim = beyond & ~edge
    large = stats[1:, cv2.CC_STAT_AREA] >= max(4, 2e-4 * mask.size)
    if large.sum() < _REPEATS or background[rim].mean() < _SURROUNDED:
        return False
    height, width = mask.shape
    x, y = centroids[1:][large].T
    return len({(a, b) for a, b in zip(x > width / 2, y > height / 2, strict=True)}) >= _QUARTERS


def _grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    return cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8), iterations=pixels) > 0


def _border(lab: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the border's pixels (M,3) and the sector of each, 0 to 4 x _SECTORS - 1 (M,)."""
    height, width = lab.shape[:2]
    ring = max(2, round(_RING * min(height, width)))
    y, x = np.mgrid[0:height, 0:width]
    depth = np.stack([y, height - 1 - y, x, width - 1 - x])  # distance to the top, bottom, left and right side
    side = depth.argmin(axis=0)
    along = np.where(side < 2, x / width, y / height)
    inside = depth.min(axis=0) < ring
    return lab[inside], (side * _SECTORS + (along * _SECTORS).astype(int))[inside]


def _clusters(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(M,3) -> centres (K,3), largest cluster first, and the centre of each pixel (M,).

    Seeded k-means; centres nearer than _SAME_COLOR are merged.
    """
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
    """(H,W): Lab distance of each pixel to the nearest colour of the palette."""
    return np.linalg.norm(lab[:, :, None] - palette, axis=3).min(axis=2)


def _threshold(distance: np.ndarray) -> float:
    """Returns Otsu's threshold of the clipped distances, bounded by _THRESHOLD."""
    scaled = np.rint(np.minimum(distance, _CLIP) * (255 / _CLIP)).astype(np.uint8)
    found, _ = cv2.threshold(scaled, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return float(np.clip(found * _CLIP / 255, *_THRESHOLD))


def _opened(mask: np.ndarray, width: int) -> np.ndarray:
    """Removes lines thinner than `width`, such as antialiased edges between two background colours."""
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))
    # Replicates the border, so that an object that touches the frame is not thinned there.
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), width, width, width, width, cv2.BORDER_REPLICATE)
    opened = cv2.morphologyEx(padded, cv2.MORPH_OPEN, kernel)
    return opened[width:-width, width:-width] > 0


def _without_specks(mask: np.ndarray) -> np.ndarray:
    """Removes the parts that are small compared with the picture or with the largest part."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    if count == 1:
        return mask
    areas = stats[:, cv2.CC_STAT_AREA].astype(float)
    areas[0] = 0
    kept = areas >= max(_MIN_PART * mask.size, _MIN_PART_OF_LARGEST * areas.max())
    return kept[np.asarray(labels, np.int64)] & mask


def _refined(mask: np.ndarray, lab: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Moves the mask's edge half-way between the object's colour and the background's.

    A low threshold includes the faint rim of an object of a strong colour. A pixel of the rim stays only if its colour
    is nearer to the object's inside than to the background.
    """
    inside, known = np.zeros_like(lab), np.zeros(mask.shape, bool)
    for depth, reach in _INSIDE:
        colors, near = _colors_inside(mask, lab, depth, reach)
        inside, known = np.where((near & ~known)[..., None], colors, inside), known | near
    return np.where(known, np.linalg.norm(lab - inside, axis=2) < distance, mask)


def _colors_inside(mask: np.ndarray, lab: np.ndarray, depth: int, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns, for each pixel, the colour of the nearest pixel that lies `depth` pixels inside the mask (H,W,3), and
    whether that pixel is within `reach` pixels (H,W)."""
    core = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8), iterations=depth, borderValue=1)
    if not core.any():
        return lab, np.zeros(mask.shape, bool)
    away, labels = cv2.distanceTransformWithLabels(1 - core, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    nearest = np.asarray(labels, np.int64)
    colors = np.zeros((nearest.max() + 1, 3), np.float32)
    colors[nearest[core > 0]] = lab[core > 0]
    return colors[nearest], np.asarray(away) <= reach
