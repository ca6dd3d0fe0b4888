"""Makes small colour profiles (ICC version 2), and computes what they mean without a colour engine."""

from __future__ import annotations

import struct

import numpy as np

D50 = (0.9642, 1.0, 0.8249)
SRGB = ((0.43607, 0.38515, 0.14307), (0.22249, 0.71687, 0.06061), (0.01392, 0.09708, 0.71410))
DISPLAY_P3 = ((0.51512, 0.29198, 0.15710), (0.24120, 0.69225, 0.06657), (-0.00105, 0.04189, 0.78407))
ADOBE_RGB = ((0.60974, 0.20528, 0.14919), (0.31111, 0.62567, 0.06322), (0.01947, 0.06087, 0.74457))
"""Columns are the XYZ (D50) of red, green and blue."""


def rgb_profile(matrix: tuple[tuple[float, ...], ...] = DISPLAY_P3, gamma: float = 2.2) -> bytes:
    columns = list(zip(*matrix, strict=True))
    points = {name: _xyz(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)}
    return _profile(b"mntrRGB XYZ ", {**points, **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _gamma(gamma))})


def srgb_profile() -> bytes:
    """sRGB with its curve as a table, as most files have it."""
    steps = np.linspace(0, 1, 1024)
    table = np.round(decode_srgb(steps) * 65535).astype(">u2").tobytes()
    curve = b"curv\0\0\0\0" + struct.pack(">I", 1024) + table
    columns = list(zip(*SRGB, strict=True))
    points = {name: _xyz(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)}
    return _profile(b"mntrRGB XYZ ", {**points, **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)})


def grey_profile(gamma: float) -> bytes:
    return _profile(b"mntrGRAYXYZ ", {b"kTRC": _gamma(gamma)})


def cmyk_profile(cyan: tuple[float, float, float]) -> bytes:
    """Paper is white, black ink is black, and full cyan has the Lab colour `cyan`; other inks are grey."""
    grid = np.zeros((2, 2, 2, 2, 3))
    for c, m, y, k in np.ndindex(2, 2, 2, 2):
        light = 0.0 if k else 100.0 - 20 * (m + y)
        grid[c, m, y, k] = cyan if c and not (m or y or k) else (light, 0, 0)
    lab = np.stack([grid[..., 0] * 2.55, grid[..., 1] + 128, grid[..., 2] + 128], axis=-1)
    identity = struct.pack(">9i", *(65536 * (row == column) for row in range(3) for column in range(3)))
    ramp = bytes(range(256))
    table = np.round(lab).astype(np.uint8).tobytes()
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + 4 * ramp + table + 3 * ramp
    return _profile(b"prtrCMYKLab ", {b"A2B0": lut, b"A2B1": lut})


def to_srgb(colour: tuple[int, int, int], matrix: tuple[tuple[float, ...], ...], gamma: float) -> np.ndarray:
    """(3,) 0..255: the sRGB values of a colour of `rgb_profile(matrix, gamma)`, by the definition of sRGB."""
    return _of_xyz(np.array(matrix) @ (np.array(colour) / 255) ** gamma)


def lab_to_srgb(lab: tuple[float, float, float]) -> np.ndarray:
    """(3,) 0..255."""
    y = (lab[0] + 16) / 116
    f = np.array([y + lab[1] / 500, y, y - lab[2] / 200])
    return _of_xyz(np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * D50)


def decode_srgb(values: np.ndarray) -> np.ndarray:
    """0..1 -> linear light."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def encode_srgb(light: np.ndarray) -> np.ndarray:
    """Linear light -> 0..1."""
    light = np.clip(light, 0, 1)
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def _of_xyz(xyz: np.ndarray) -> np.ndarray:
    return 255 * encode_srgb(np.linalg.solve(np.array(SRGB), xyz))


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(_fixed, values))


def _gamma(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def _profile(kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    """`kind`: class, colour space and connection space, 4 letters each."""
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(79),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": _xyz(D50),
        **tags,
    }
    start, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I", start + len(body)) + bytes(4) + b"\x02\x20\0\0" + kind + bytes(12) + b"acsp" + bytes(28)
    head += b"".join(map(_fixed, D50))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body
