"""Measures how different two colours look: sRGB to CIELAB, and the CIEDE2000 difference.

Sharma, Wu, Dalal, "The CIEDE2000 Color-Difference Formula: Implementation Notes, Supplementary Test Data, and
Mathematical Observations", Color Research & Application 30(1), 2005. Equation numbers below are those of the paper.
A difference of 1 is just noticeable side by side; 8 is the same colour in other light; unrelated colours differ by 30
and more.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

# IEC 61966-2-1: linear sRGB to XYZ with the white point D65.
_SRGB_TO_XYZ = np.asarray(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE = _SRGB_TO_XYZ.sum(axis=1)


def srgb_to_lab(rgb: ArrayLike) -> np.ndarray:
    """(..., 3) sRGB in 0 to 255 -> (..., 3) CIELAB under D65."""
    encoded = np.asarray(rgb, np.float64) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    relative = linear @ _SRGB_TO_XYZ.T / _WHITE
    f = np.where(relative > (6 / 29) ** 3, np.cbrt(relative), relative / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def ciede2000(lab1: ArrayLike, lab2: ArrayLike) -> np.ndarray:
    """(..., 3) and (..., 3) CIELAB, broadcast -> (...) difference, with kL = kC = kH = 1."""
    L1, a1, b1 = np.moveaxis(np.asarray(lab1, np.float64), -1, 0)
    L2, a2, b2 = np.moveaxis(np.asarray(lab2, np.float64), -1, 0)
    # (2)-(7): chroma and hue with a stretched a axis near grey
    C_mean = (np.hypot(a1, b1) + np.hypot(a2, b2)) / 2
    G = 0.5 * (1 - _seventh_power_share(C_mean))
    C1, h1 = _chroma_hue((1 + G) * a1, b1)
    C2, h2 = _chroma_hue((1 + G) * a2, b2)
    # (8)-(11): differences in lightness, chroma and hue
    dL, dC = L2 - L1, C2 - C1
    dh = np.where(C1 * C2 == 0, 0.0, (h2 - h1 + 180) % 360 - 180)
    dH = 2 * np.sqrt(C1 * C2) * _sin(dh / 2)
    # (12)-(14): means
    L, C, h = (L1 + L2) / 2, (C1 + C2) / 2, _mean_hue(h1, h2, C1 * C2)
    # (15)-(21): weights
    T = 1 - 0.17 * _cos(h - 30) + 0.24 * _cos(2 * h) + 0.32 * _cos(3 * h + 6) - 0.20 * _cos(4 * h - 63)
    SL = 1 + 0.015 * (L - 50) ** 2 / np.sqrt(20 + (L - 50) ** 2)
    SC, SH = 1 + 0.045 * C, 1 + 0.015 * C * T
    RT = -_sin(60 * np.exp(-(((h - 275) / 25) ** 2))) * 2 * _seventh_power_share(C)
    # (22)
    return np.sqrt((dL / SL) ** 2 + (dC / SC) ** 2 + (dH / SH) ** 2 + RT * (dC / SC) * (dH / SH))


def _seventh_power_share(chroma: np.ndarray) -> np.ndarray:
    """sqrt(C^7 / (C^7 + 25^7)), of (4) and (17)."""
    return np.sqrt(chroma**7 / (chroma**7 + 25.0**7))


def _chroma_hue(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(5)-(7): chroma, and hue in degrees from 0 to 360."""
    return np.hypot(a, b), np.degrees(np.arctan2(b, a)) % 360


def _mean_hue(h1: np.ndarray, h2: np.ndarray, chroma_product: np.ndarray) -> np.ndarray:
    """(14): halfway along the shorter arc; the sum if one of the two is grey and has no hue."""
    far = np.abs(h1 - h2) > 180
    mean = np.where(far, np.where(h1 + h2 < 360, h1 + h2 + 360, h1 + h2 - 360), h1 + h2) / 2
    return np.where(chroma_product == 0, h1 + h2, mean)


def _sin(degrees: np.ndarray) -> np.ndarray:
    return np.sin(np.radians(degrees))


def _cos(degrees: np.ndarray) -> np.ndarray:
    return np.cos(np.radians(degrees))
