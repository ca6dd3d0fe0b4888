"""Image and condition lie on each other, and the size conditioning tells the truth."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from t2i_adapter.sources.geometry import Resample, apply, aspect_gap, plan

SIZES = [(64, 64), (100, 160), (333, 211), (48, 480), (17, 23), (683, 1024)]


@pytest.mark.parametrize("original", SIZES)
@pytest.mark.parametrize("resolution", [32, 64, 128])
def test_the_plan_is_a_centre_crop_of_the_resized_picture(original: tuple[int, int], resolution: int) -> None:
    geometry = plan(original, resolution)
    assert min(geometry.resized) == resolution
    assert geometry.target == (resolution, resolution)
    for axis in (0, 1):
        exact = original[axis] * resolution / min(original)
        assert abs(geometry.resized[axis] - exact) <= 0.5
        after = geometry.resized[axis] - resolution - geometry.top_left[axis]
        assert 0 <= after - geometry.top_left[axis] <= 1, "the margins differ by the odd pixel at most"
    assert geometry.time_ids() == (*original, *geometry.top_left, resolution, resolution)


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("original", SIZES)
def test_one_step_equals_resizing_and_then_cropping(original: tuple[int, int], resample: Resample) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*original, 3), dtype=np.uint8)
    picture, geometry = Image.fromarray(noise), plan(original, 32)
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    whole = picture.resize(geometry.resized[::-1], filters[resample])
    (top, left), (height, width) = geometry.top_left, geometry.target
    expected = np.asarray(whole.crop((left, top, left + width, top + height)))
    got = np.asarray(apply(picture, geometry, resample))
    assert np.abs(got.astype(int) - expected.astype(int)).max() <= 1  # one level of Pillow's 8-bit rounding


def test_nearest_takes_the_pixel_under_the_centre() -> None:
    columns = np.tile(np.arange(211, dtype=np.uint8), (133, 1))
    geometry = plan((133, 211), 32)
    got = np.asarray(apply(Image.fromarray(columns), geometry, "nearest")).astype(float)
    centres = (geometry.top_left[1] + np.arange(32) + 0.5) * 211 / geometry.resized[1] - 0.5
    assert np.abs(got - centres).max() <= 0.5 + 1e-6


def test_a_picture_of_the_right_size_is_untouched() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for resample in ("bicubic", "bilinear", "nearest"):
        assert (np.asarray(apply(Image.fromarray(noise), plan((64, 64), 64), resample)) == noise).all()


def checkerboard(size: tuple[int, int], cells: tuple[int, int]) -> Image.Image:
    """A board of `cells` fields over the whole picture, each pixel the exact share of white in it."""
    fine = 64
    rows, columns = (
        ((np.arange(length * fine) * count // (length * fine)) % 2).reshape(length, fine).mean(axis=1)
        for length, count in zip(size, cells, strict=True)
    )
    board = rows[:, None] * (1 - columns) + (1 - rows[:, None]) * columns
    return Image.fromarray((board * 255).round().astype(np.uint8))


def edges(profile: np.ndarray) -> np.ndarray:
    """Sub-pixel places where a row of grey levels crosses the middle."""
    values = profile.astype(float) - 127.5
    at = np.flatnonzero(values[:-1] * values[1:] < 0)
    return at + values[at] / (values[at] - values[at + 1])


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("original", [(240, 240), (240, 400), (480, 320)])
def test_a_checkerboard_and_its_rescaled_condition_meet_within_half_a_pixel(
    original: tuple[int, int], scale: float
) -> None:
    cells = original[0] // 20, original[1] // 20
    other = round(original[0] * scale), round(original[1] * scale)
    geometry = plan(original, 160)
    image = np.asarray(apply(checkerboard(original, cells), geometry, "bicubic"))
    condition = np.asarray(apply(checkerboard(other, cells), geometry, "bilinear"))
    middle = image.shape[0] // 2 + 4
    for line in (image[middle], image[:, middle]), (condition[middle], condition[:, middle]):
        assert all(len(edges(profile)) >= 5 for profile in line)
    for axis in (0, 1):
        a, b = edges(image.take(middle, axis)), edges(condition.take(middle, axis))
        assert len(a) == len(b)
        assert np.abs(a - b).max() < 0.25  # pixels; a crop of the resized picture rounded by itself is off by up to 1


def test_an_off_by_half_map_would_be_seen() -> None:
    """The measure itself: a shifted condition breaks the bound above."""
    size, cells = (240, 240), (12, 12)
    geometry = plan(size, 160)
    shifted = Image.fromarray(np.roll(np.asarray(checkerboard(size, cells)), 2, axis=1))
    a, b = (edges(np.asarray(apply(board, geometry, "bilinear"))[84]) for board in (checkerboard(size, cells), shifted))
    nearest = np.abs(a[:, None] - b).min(axis=1)
    assert 1.0 < nearest.max() < 1.7  # two pixels at a scale of two thirds


def test_nearest_invents_no_labels() -> None:
    labels = np.random.default_rng(0).choice([0, 7, 200], (90, 120)).astype(np.uint8)
    cut = np.asarray(apply(Image.fromarray(labels), plan((90, 120), 64), "nearest"))
    assert set(np.unique(cut)) <= {0, 7, 200}


def test_shrinking_does_not_alias() -> None:
    stripes = np.zeros((512, 512), np.uint8)
    stripes[:, ::2] = 255
    for resample in ("bicubic", "bilinear"):
        cut = np.asarray(apply(Image.fromarray(stripes), plan((512, 512), 64), resample)).astype(int)
        assert np.abs(cut - 127.5).max() <= 6, "lines finer than a pixel become grey"


def test_a_long_thin_picture_is_not_blown_up_as_a_whole() -> None:
    picture = Image.new("RGB", (20_000, 2), "red")
    geometry = plan((2, 20_000), 512)
    assert geometry.resized == (512, 5_120_000)  # 7.8 GB if it were made
    assert apply(picture, geometry, "bicubic").size == (512, 512)


@pytest.mark.parametrize(
    ("image", "condition", "fits"),
    [
        ((64, 64), (128, 128), True),
        ((683, 1024), (341, 512), True),
        ((683, 1024), (342, 512), True),
        ((1000, 1001), (1024, 1024), True),
        ((64, 64), (64, 128), False),
        ((64, 64), (64, 62), False),
        ((1000, 1333), (512, 704), False),  # an annotator that rounds sides to 64 squeezes the picture
        ((1000, 1500), (1500, 1000), False),
    ],
)
def test_the_aspect_gap_allows_rounding_only(image: tuple[int, int], condition: tuple[int, int], fits: bool) -> None:
    assert (aspect_gap(image, condition) <= 1) == fits
    assert (aspect_gap(image[::-1], condition[::-1]) <= 1) == fits
