"""The offset between a condition and its image is found to a fraction of a pixel, and none is found by chance."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from t2i_adapter.data.shapes import condition, render, sample_scene
from t2i_adapter.doctor.offset import MAX_SHIFT, SURE_MARGIN, find_offset, is_mosaic

SHIFTS = [(0, 0), (0, 3), (-3, 0), (5, -7), (MAX_SHIFT, -MAX_SHIFT)]


def texture(size: int, seed: int = 0) -> np.ndarray:
    """(H,W,3) u8: smooth clouds of colour with noise on top, as a photograph has."""
    rng = np.random.default_rng(seed)
    clouds = cv2.resize(rng.uniform(0, 255, (size // 16, size // 16, 3)), (size, size), interpolation=cv2.INTER_CUBIC)
    return np.clip(clouds + rng.normal(0, 6, clouds.shape), 0, 255).astype(np.uint8)


def first(picture: np.ndarray) -> np.ndarray:
    """(H,W) or (H,W,3) -> channels first."""
    return picture[None] if picture.ndim == 2 else np.ascontiguousarray(picture.transpose(2, 0, 1))


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("kind", ["outline", "canny", "depth", "segmentation"])
def test_a_shifted_map_of_a_scene_is_found(kind: str, shift: tuple[int, int]) -> None:
    scene = sample_scene(0, 5)
    image, aside = np.asarray(render(scene, 192)), np.roll(np.asarray(condition(scene, 192, kind)), shift, (0, 1))
    offset = find_offset(first(image), first(aside))
    assert offset is not None and offset.margin >= SURE_MARGIN
    assert offset[:2] == pytest.approx(shift, abs=0.75)  # a line lies inside its shape's border, by half its width


@pytest.mark.parametrize("shift", SHIFTS[:4])
def test_thick_lines_of_a_large_picture_are_compared_at_a_smaller_size(shift: tuple[int, int]) -> None:
    scene = sample_scene(0, 4)
    image, aside = (
        np.asarray(render(scene, 1024)),
        np.roll(np.asarray(condition(scene, 1024, "outline")), shift, (0, 1)),
    )
    offset = find_offset(first(image), first(aside))
    assert offset is not None and offset.margin >= SURE_MARGIN and offset.scale > 1
    assert offset[:2] == pytest.approx(shift, abs=offset.scale / 2)


@pytest.mark.parametrize("shift", SHIFTS[:3])
def test_canny_of_a_large_textured_picture(shift: tuple[int, int]) -> None:
    image = texture(768)
    lines = np.roll(cv2.Canny(image, 50, 100), shift, (0, 1))
    assert lines.any()
    offset = find_offset(first(image), first(lines))
    assert offset is not None and offset.margin >= SURE_MARGIN
    assert offset[:2] == pytest.approx(shift, abs=0.2)


def test_edges_of_another_picture_are_not_sure() -> None:
    margins = []
    for number in range(20):
        image, other = render(sample_scene(0, number), 128), condition(sample_scene(0, 100 + number), 128, "outline")
        offset = find_offset(first(np.asarray(image)), first(np.asarray(other)))
        margins.append(offset.margin if offset else 0.0)
    assert sum(margin >= SURE_MARGIN for margin in margins) <= 1


def test_there_is_no_offset_without_edges() -> None:
    image, flat = first(texture(128)), np.zeros((3, 128, 128), np.uint8)
    assert find_offset(image, flat) is None and find_offset(flat, image) is None
    assert find_offset(image[:, :32], image[:, :32]) is None  # smaller than the search range


def test_cells_of_colour_are_a_mosaic_and_lines_are_not() -> None:
    cells = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    mosaic = np.kron(cells, np.ones((16, 16, 1), np.uint8))
    assert is_mosaic(first(mosaic))
    assert not is_mosaic(first(np.asarray(condition(sample_scene(0, 5), 128, "outline"))))
    assert not is_mosaic(first(texture(128)))
