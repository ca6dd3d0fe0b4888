"""The kinds without weights, compared with independent implementations."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from t2i_adapter.annotators.mirror import exchange_sides
from t2i_adapter.annotators.registry import annotate, open_annotator
from t2i_adapter.data.shapes import condition, render, sample_scene, visible_masks

SCENES = (25, 47, 70, 105)  # three shapes each on a plain ground


def scene(number: int = 25, size: int = 128) -> Image.Image:
    return render(sample_scene(0, number), size)


def clouds(size: int = 128, cells: int = 12) -> Image.Image:
    """Soft and strong edges of every colour."""
    values = np.random.default_rng(2).integers(0, 256, (cells, cells, 3), np.uint8)
    return Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC)


def made(spec: str, picture: Image.Image, draw: str | None = None) -> np.ndarray:
    return np.asarray(annotate(open_annotator(spec), picture, draw))


def gaussian(values: np.ndarray, sigma: float) -> np.ndarray:
    """(H,W,C) float64, each side mirrored about its outermost pixel, the kernel cut off at 4 sigma."""
    reach = round(8 * sigma + 1) // 2
    offsets = np.arange(-reach, reach + 1)
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    for axis in (0, 1):
        padded = np.pad(values, [(reach, reach) if a == axis else (0, 0) for a in range(3)], mode="reflect")
        length = values.shape[axis]
        values = sum(k * np.take(padded, range(i, i + length), axis) for i, k in enumerate(kernel))
    return values


def keys(x: np.ndarray) -> np.ndarray:
    """The cubic of Keys (1981), a = -1/2."""
    x, a = np.abs(x), -0.5
    inner = (a + 2) * x**3 - (a + 3) * x**2 + 1
    outer = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x < 1, inner, np.where(x < 2, outer, 0))


def shrink(values: np.ndarray, cells: int, axis: int) -> np.ndarray:
    """One axis scaled down by the cubic, widened with the scale, weights normalised where the frame cuts it."""
    length = values.shape[axis]
    scale = length / cells
    centres = (np.arange(cells) + 0.5) * scale
    weights = keys((np.arange(length) + 0.5 - centres[:, None]) / scale)
    weights /= weights.sum(axis=1, keepdims=True)
    return np.moveaxis(np.tensordot(weights, values, (1, axis)), 0, axis)


@pytest.mark.parametrize("number", SCENES)
def test_canny_is_opencvs(number: int):
    picture = scene(number)
    assert np.array_equal(made("canny", picture), cv2.Canny(np.asarray(picture), 100, 200))
    assert np.array_equal(made("canny,low=20,high=60", picture), cv2.Canny(np.asarray(picture), 20, 60))
    assert np.array_equal(
        made("canny", picture), np.asarray(condition(sample_scene(0, number), 128, "canny").convert("L"))
    )


@pytest.mark.parametrize("picture", [scene(25), scene(47), clouds(), clouds(33)], ids=["a", "b", "clouds", "small"])
def test_lineart_is_its_formula(picture: Image.Image):
    values = np.asarray(picture, np.float64)
    darker = np.clip((gaussian(values, 6.0) - values).min(axis=2), 0, 255)
    wanted = np.clip(darker / max(16.0, np.median(darker[darker > 8])) * 127, 0, 255)
    assert np.abs(made("lineart", picture) - np.floor(wanted)).max() <= 1, "equal up to the last bit"
    assert wanted.max() > 100, "the map is not empty"


@pytest.mark.parametrize(("size", "cells"), [((128, 128), (8, 8)), ((512, 768), (8, 12)), ((640, 640), (10, 10))])
def test_palette_is_its_formula(size: tuple[int, int], cells: tuple[int, int]):
    picture = scene(25, 768).resize((size[1], size[0]))
    small = shrink(np.asarray(picture, np.float64), cells[1], axis=1)
    small = np.clip(np.rint(shrink(np.clip(small, 0, 255), cells[0], axis=0)), 0, 255)
    wanted = np.repeat(np.repeat(small, size[0] // cells[0], axis=0), size[1] // cells[1], axis=1)
    assert np.abs(made("palette", picture) - wanted).max() <= 1, "Pillow rounds between its two passes"
    assert np.ptp(wanted) > 100


@pytest.mark.parametrize("number", SCENES)
def test_palette_is_the_one_of_the_drawn_scenes(number: int):
    own = condition(sample_scene(0, number), 128, "palette")
    assert np.array_equal(made("palette", scene(number)), np.asarray(own))


def test_random_thresholds_are_a_function_of_the_sample_and_within_their_range():
    picture = clouds(256, cells=64)
    for spec, plain in (("canny,vary=3", "canny"), ("sketch,random_threshold=true", "sketch")):
        maps = [made(spec, picture, f"row {i}") for i in range(20)]
        assert all(np.array_equal(again, first) for again, first in
                   zip((made(spec, picture, f"row {i}") for i in range(20)), maps, strict=True))  # fmt: skip
        assert len({m.tobytes() for m in maps}) > 1
        assert np.array_equal(made(spec, picture), made(plain, picture)), "without a draw the default is used"
    fewest, most = (made(f"sketch,threshold={threshold}", picture).sum() for threshold in (0.8, 0.3))
    assert all(fewest <= m.sum() <= most for m in maps) and fewest < most


def test_sketch_draws_the_dark_side_of_edges_and_no_flat_dark_areas():
    picture = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(picture).rectangle((32, 32, 96, 96), fill="black")
    strokes = made("sketch", picture) > 0
    inside = np.zeros((128, 128), bool)
    inside[32:97, 32:97] = True
    assert strokes.any() and not strokes[~inside].any(), "on the dark side of the edge"
    assert not strokes[36:93, 36:93].any(), "the flat dark middle is empty"
    assert strokes[32:36, 40:88].any(axis=0).all(), "the whole edge is drawn"


def test_strokes_grow_with_the_picture():
    shares = [(made("sketch", scene(25, size)) > 0).mean() for size in (512, 1024)]
    assert shares[1] == pytest.approx(shares[0], rel=0.2)


@pytest.mark.parametrize("number", SCENES)
def test_scribble_stays_near_the_outlines(number: int):
    size = 256
    drawn = made("scribble", scene(number, size)) > 0
    masks = visible_masks(sample_scene(0, number), size).astype(np.uint8)
    edges = np.zeros((size, size), bool)
    for mask in masks:
        edges |= cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    away = cv2.distanceTransform((~edges).astype(np.uint8), cv2.DIST_L2, 5)
    assert drawn.mean() > 0.01
    assert np.mean(away[drawn] <= 6) > 0.97, "within the pen's width and `careless`"


def test_lines_finds_a_turned_rectangles_sides_and_no_circle():
    corners = [(60, 40), (200, 90), (170, 180), (30, 130)]
    picture = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(picture).polygon(corners, fill="navy")
    drawn = made("lines", picture) > 0
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        along = np.linspace(0.1, 0.9, 60)
        x, y = np.rint(x0 + along * (x1 - x0)).astype(int), np.rint(y0 + along * (y1 - y0)).astype(int)
        near = [drawn[b - 2 : b + 3, a - 2 : a + 3].any() for a, b in zip(x, y, strict=True)]
        assert np.mean(near) > 0.9
    dot = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(dot).ellipse((120, 120, 136, 136), fill="navy")
    assert not made("lines,shortest=0.1", dot).any()


def test_tile_is_the_mean_of_each_square_and_blur_keeps_the_mean():
    values = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    picture = Image.fromarray(values)
    means = values.reshape(8, 8, 12, 8, 3).mean(axis=(1, 3))
    wanted = Image.fromarray(np.rint(means).astype(np.uint8)).resize((96, 64), Image.Resampling.BICUBIC)
    assert np.abs(made("tile", picture).astype(int) - np.asarray(wanted)).max() <= 3, "means are rounded twice"
    blurred = made("blur,sigma=0.1", picture)
    assert abs(blurred.mean() - values.mean()) < 2 and blurred.std() < values.std() / 4
    point = np.zeros((65, 65, 3), np.uint8)
    point[32, 32] = 255
    spread = made("blur,sigma=0.03", Image.fromarray(point))[..., 0].astype(float)
    sigma = 0.03 * 65
    assert spread[32, 32] == pytest.approx(255 / (2 * np.pi * sigma**2), rel=0.15)


def test_mask_is_the_shape():
    scores = []
    for number in range(60):
        drawn = sample_scene(0, number, max_shapes=1, patterns=("plain",))
        truth = visible_masks(drawn, 128).any(axis=0)
        found = made("mask", render(drawn, 128)) > 0
        scores.append(np.count_nonzero(found & truth) / np.count_nonzero(found | truth))
        if number == 11:
            break
    assert np.mean(scores) > 0.9, scores
    assert not made("mask", Image.new("RGB", (64, 64), "teal")).any()


def test_normals_of_a_slope_are_its_own():
    rise = 2  # grey levels a pixel, to the right
    depth = np.repeat((np.arange(100) * rise)[None].astype(np.uint8), 100, axis=0)
    slope = 0.5 * 100 * rise / 255  # of relief 0.5 over 100 pixels
    wanted = np.asarray([-slope, 0, 1]) / np.hypot(slope, 1)
    got = made("normal", Image.fromarray(depth).convert("RGB"))[10:-10, 10:-10]
    assert np.abs(got - (wanted + 1) * 127.5).max() <= 1.5
    down = made("normal", Image.fromarray(depth.T).convert("RGB"))[10:-10, 10:-10]  # nearer at the bottom: faces up
    assert np.abs(down - (np.asarray([0, slope, 1]) / np.hypot(slope, 1) + 1) * 127.5).max() <= 1.5


def test_mirrored_normals_are_the_normals_of_the_mirrored_depth():
    depth = condition(sample_scene(0, 25), 128, "depth")
    normals = annotate(open_annotator("normal"), depth)
    turned = ImageOps.mirror(exchange_sides(normals, "normal"))
    assert np.abs(np.asarray(turned).astype(int) - made("normal", ImageOps.mirror(depth))).max() <= 1


def test_normals_of_another_kinds_depth_map():
    """Any kind with a grey map can make the depth; its version is part of the version of the normals."""
    picture = scene()
    through = made("normal,depth=grey", picture)
    assert np.array_equal(through, made("normal", picture.convert("L").convert("RGB")))
    assert open_annotator("normal,depth=grey").facts.version != open_annotator("normal").facts.version
