"""The metrics on pictures whose answer is known, and the segmenter."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from t2i_adapter.data.shapes import render, sample_scene, visible_masks
from t2i_adapter.evaluation.color import ciede2000, srgb_to_lab
from t2i_adapter.evaluation.evaluate import derangement, picture_seeds
from t2i_adapter.evaluation.foreground import foreground_mask
from t2i_adapter.evaluation.metrics import (
    NamedColor,
    Truth,
    bootstrap,
    color_error,
    condition_agreement,
    edge_f1,
    iou,
    measure,
    outline,
)


def disc(x: float = 64, y: float = 64, radius: float = 30, size: int = 128) -> np.ndarray:
    rows, columns = np.mgrid[0:size, 0:size]
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


EMPTY = np.zeros((128, 128), bool)


def test_iou() -> None:
    assert iou(disc(), disc()) == 1
    assert iou(disc(30, 30, 20), disc(95, 95, 20)) == 0
    left, right = EMPTY.copy(), EMPTY.copy()
    left[:, :60], right[:, 30:90] = True, True
    assert iou(left, right) == pytest.approx(30 / 90)
    assert iou(EMPTY, EMPTY) == 1
    assert iou(EMPTY, disc()) == 0


def test_edge_f1_and_its_tolerance() -> None:
    assert edge_f1(disc(), disc(), 2) == 1
    assert edge_f1(disc(66), disc(), 2) == 1, "two pixels aside, everywhere within two"
    assert edge_f1(disc(72), disc(), 2) < 0.6
    assert edge_f1(disc(72), disc(), 2) < edge_f1(disc(72), disc(), 4) < 1
    assert edge_f1(EMPTY, EMPTY, 2) == 1
    assert edge_f1(EMPTY, disc(), 2) == 0
    # Half of the outline is right, all of what is drawn is right: F1 = 2 * 1 * .5 / 1.5
    half = disc().copy()
    half[:, :64] = False
    half_only = edge_f1(half, half, 0.5)
    assert half_only == 1
    line, longer = EMPTY.copy(), EMPTY.copy()
    line[20, 20:60], longer[20, 20:100] = True, True
    assert edge_f1(line, longer, 0.5) == pytest.approx(2 * 1 * 0.5 / 1.5)


def test_the_frame_is_not_part_of_an_outline() -> None:
    mask = EMPTY.copy()
    mask[:, :50] = True
    assert outline(mask).sum() == 128, "only the side that faces the background"


def test_color_error_is_zero_for_the_same_colors_at_any_place() -> None:
    image = np.zeros((128, 128, 3), np.uint8)
    image[:, :64], image[:, 64:] = (255, 0, 0), (0, 0, 255)
    everywhere = np.ones((128, 128), bool)
    red, blue = NamedColor((255, 0, 0), 0.5), NamedColor((0, 0, 255), 0.5)
    assert color_error(image, everywhere, (red, blue)) == pytest.approx(0, abs=1e-6)
    assert color_error(image[:, ::-1], everywhere, (red, blue)) == pytest.approx(0, abs=1e-6)
    between = ciede2000(srgb_to_lab(np.uint8([255, 0, 0])), srgb_to_lab(np.uint8([0, 0, 255])))
    wanted = (NamedColor((255, 0, 0), 1.0),)
    assert color_error(image[:, 64:], everywhere[:, 64:], wanted) == pytest.approx(float(between))
    assert color_error(image[:, 64:], np.zeros((128, 64), bool), wanted) == pytest.approx(float(between)), "no object"
    # Red should fill three quarters and fills a half: its median pixel is still red.
    assert color_error(image, everywhere, (NamedColor((255, 0, 0), 0.75),)) == pytest.approx(0, abs=1e-6)
    assert color_error(image, everywhere, (NamedColor((255, 0, 0), 1.0), blue)) > 10, "half is not enough for all"


def test_measure_of_a_flat_picture_with_nothing_on_it() -> None:
    flat = np.full((128, 128, 3), 90, np.uint8)
    assert not foreground_mask(flat).any()
    values = measure(flat, Truth(disc(), (NamedColor((90, 90, 90), 1.0),), NamedColor((90, 90, 90), 1.0)))
    assert values["iou"] == values["edge_f1"] == 0
    assert set(measure(flat, Truth(disc()))) == {"iou", "edge_f1"}, "colours only where they are known"


def drawn(ground: str, fill: str, box: tuple[int, int, int, int] = (30, 40, 80, 100)) -> Image.Image:
    picture = Image.new("RGB", (128, 128), ground)
    ImageDraw.Draw(picture).ellipse(box, fill=fill)
    return picture


@pytest.mark.parametrize(
    ("ground", "fill"), [("white", "black"), ("black", "navy"), ("white", "snow"), ("red", "lime"), ("gray", "pink")]
)
def test_foreground_of_any_colors(ground: str, fill: str) -> None:
    picture = drawn(ground, fill)
    truth = np.asarray(drawn("black", "white").convert("L")) > 127
    found = foreground_mask(np.asarray(picture))
    if fill == "snow":  # 2 in Lab from white: below the threshold on purpose
        assert not found.any()
    else:
        assert iou(found, truth) > 0.97


def test_an_object_may_touch_the_frame() -> None:
    found = foreground_mask(np.asarray(drawn("white", "purple", (-30, 20, 50, 100))))
    truth = np.asarray(drawn("black", "white", (-30, 20, 50, 100)).convert("L")) > 127
    assert iou(found, truth) > 0.97


def test_specks_and_noise_are_background() -> None:
    noise = np.random.default_rng(0).normal(0, 4, (128, 128, 3))
    picture = np.clip(np.asarray(drawn("green", "yellow")) + noise, 0, 255).astype(np.uint8)
    picture[5:8, 5:8] = 255
    truth = np.asarray(drawn("black", "white").convert("L")) > 127
    assert iou(foreground_mask(picture), truth) > 0.97


@pytest.mark.parametrize(
    # Means and minima measured on 400 scenes of another seed, less a margin: see docs/evaluate.md.
    ("pattern", "mean", "least"),
    [("plain", 0.98, 0.93), ("striped", 0.96, 0.85), ("dotted", 0.96, 0.85), ("floral", 0.96, 0.85)],
)
def test_the_segmenter_finds_the_shapes_of_true_pictures(pattern: str, mean: float, least: float) -> None:
    found = []
    for index in range(40):
        scene = sample_scene(11, index, patterns=(pattern,))
        truth = visible_masks(scene, 128).any(axis=0)
        found.append(iou(foreground_mask(np.asarray(render(scene, 128))), truth))
    assert np.mean(found) > mean
    assert min(found) > least


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(5, 2, 400)
    estimate = bootstrap(values.tolist(), seed=0)
    half = 1.96 * values.std(ddof=1) / 20
    assert estimate.mean == pytest.approx(values.mean())
    # 10,000 resamples leave an error of about 1 % of the half-width on a 2.5 % quantile; 5 % is far beyond it.
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.05 * half)
    assert bootstrap(values.tolist(), seed=0) == estimate
    assert bootstrap(values.tolist(), seed=1) != estimate
    assert bootstrap([0.5] * 8, seed=0).to_json() == {"mean": 0.5, "ci95": [0.5, 0.5]}


@pytest.mark.parametrize("count", [2, 3, 64])
def test_every_pair_gets_anothers_condition(count: int) -> None:
    others = derangement(count, seed=0)
    assert sorted(others) == list(range(count))
    assert all(other != i for i, other in enumerate(others))
    assert derangement(count, seed=0) == others


def test_seeds_differ_and_do_not_depend_on_the_count() -> None:
    assert len(set(picture_seeds(100, 0))) == 100
    assert picture_seeds(100, 0)[:5] == picture_seeds(5, 0)
    assert not set(picture_seeds(5, 0)) & set(picture_seeds(5, 1))
    assert all(0 <= seed < 2**63 for seed in picture_seeds(100, 0))


def test_a_single_odd_pixel_is_background_and_raises_nothing():
    picture = np.full((32, 32, 3), 200, np.uint8)
    for size in (1, 2, 3, 5):
        spotted = picture.copy()
        spotted[10 : 10 + size, 12 : 12 + size] = (10, 20, 200)
        assert foreground_mask(spotted).sum() <= size * size


def test_two_valued_conditions_agree_within_the_tolerance() -> None:
    def lines(*columns: int) -> np.ndarray:
        drawn = np.zeros((128, 128), np.uint8)
        drawn[:, list(columns)] = 255
        return drawn

    assert condition_agreement(lines(20, 90), lines(20, 90), 2) == {"condition_f1": 1.0}
    assert condition_agreement(lines(22, 88), lines(20, 90), 2) == {"condition_f1": 1.0}
    assert condition_agreement(lines(23, 87), lines(20, 90), 2) == {"condition_f1": 0.0}
    half = condition_agreement(lines(20), lines(20, 90), 2)["condition_f1"]
    assert half == pytest.approx(2 / 3), "precision 1, recall a half"
    three = condition_agreement(np.stack([lines(20)] * 3, axis=2), np.stack([lines(20, 90)] * 3, axis=2), 2)
    assert three == {"condition_f1": pytest.approx(half)}
    assert condition_agreement(lines(), lines(), 2) == {"condition_f1": 1.0}
    assert condition_agreement(lines(5), lines(), 2) == {"condition_f1": 0.0}


def test_other_conditions_differ_by_their_values() -> None:
    grey = np.full((8, 8), 51, np.uint8)
    assert condition_agreement(grey, grey, 256) == {"condition_error": 0.0}
    assert condition_agreement(grey, np.zeros_like(grey), 256)["condition_error"] == pytest.approx(0.2)
    color = np.zeros((8, 8, 3), np.uint8)
    color[..., 0] = 255
    assert condition_agreement(color, np.zeros_like(color), 256)["condition_error"] == pytest.approx((1 / 3) ** 0.5)
