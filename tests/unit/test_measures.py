"""Metrics by kind of the condition, metrics of all pictures, the second judge and CLIP, with known answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny import END, WORDS, clip_vocabulary, make_tokenizer, text_config

from t2i_adapter.annotators.registry import annotate, kinds, open_annotator
from t2i_adapter.annotators.skeleton import Skeleton
from t2i_adapter.config.tree import AdapterOptions, BaseOptions
from t2i_adapter.data.shapes import render, sample_scene, write_dataset
from t2i_adapter.errors import UserError
from t2i_adapter.evaluation.clip import clip_score
from t2i_adapter.evaluation.color import ciede2000, srgb_to_lab
from t2i_adapter.evaluation.evaluate import Evaluation
from t2i_adapter.evaluation.headline import METRICS
from t2i_adapter.evaluation.kinds import (
    TOLERANCES_PX,
    class_counts,
    compare,
    curve_key,
    depth_agreement,
    family,
    ms_ssim,
    nearest_class,
    normal_angle,
    own_palette,
    palette_difference,
)
from t2i_adapter.evaluation.measures import Measures
from t2i_adapter.evaluation.metrics import Truth, lines_f1, picture_excess
from t2i_adapter.evaluation.pairs import Pair
from t2i_adapter.evaluation.people import match, people_agreement, similarity
from t2i_adapter.evaluation.pooled import frechet_distance, kernel_distance, mean_distance, mean_iou
from t2i_adapter.evaluation.second_judge import SECOND, open_second, second_opinion
from t2i_adapter.export.adapter import save_adapter
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.open import open_base
from t2i_adapter.verbs.evaluate import EvaluateOptions, run

RNG = np.random.default_rng(3)
SIDE = 64


def u8(values: Any) -> np.ndarray:
    return np.asarray(values, np.uint8)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def drawn_pair(number: int, spec: str) -> Pair:
    target = render(sample_scene(4, number), SIDE)
    condition = annotate(open_annotator(spec), target)
    return Pair(f"row {number}", "a circle", condition, target, Truth(np.ones((SIDE, SIDE), bool)), "scene")


FAMILIES = {
    "lines": {"canny", "sketch", "scribble", "lines"},
    "edges": {"lineart", "softedge", "pidinet", "teed", "lineart-net", "mlsd"},
    "regions": {"mask", "person"},
    "depth": {"depth"},
    "labels": {"segmentation"},
    "palette": {"palette"},
    "normal": {"normal", "normal-bae"},
    "pose": {"pose", "dwpose"},
    "other": {"grey", "tile", "blur", "sam"},
}


@pytest.mark.parametrize("kind", [kind for names in FAMILIES.values() for kind in sorted(names)])
def test_every_kind_has_its_comparison(kind: str) -> None:
    specs = {"depth": "depth,revision=" + "0" * 40, "teed": "teed,model=fal-ai/teed"}
    found = family(open_annotator(specs.get(kind, kind)))
    assert kind in FAMILIES[found]
    assert set().union(*FAMILIES.values()) == set(kinds())


def test_the_curve_is_f1_at_each_tolerance_and_counts_a_shift_in_pixels() -> None:
    wanted = np.zeros((SIDE, SIDE), np.uint8)
    wanted[:, [10, 40]] = 255
    moved = np.roll(wanted, 2, axis=1)
    values = compare("lines", moved, wanted, 2)
    assert [values[curve_key(t)] for t in TOLERANCES_PX] == [0, 0, 1, 1]
    assert values["condition_f1"] == lines_f1(moved > 0, wanted > 0, 1.0) == 0, "2 px of 128 are 1 px of 64"
    for tolerance in TOLERANCES_PX:
        sparse = np.asarray(noise(SIDE, SIDE) > 250)
        other = np.asarray(noise(SIDE, SIDE) > 250)
        assert compare("lines", 255 * sparse.astype(np.uint8), 255 * other.astype(np.uint8), 2)[
            curve_key(tolerance)
        ] == pytest.approx(brute_f1(sparse, other, tolerance))


def brute_f1(a: np.ndarray, b: np.ndarray, tolerance: float) -> float:
    """F1 from the distances between all pairs of points."""
    distances = np.linalg.norm(np.argwhere(a)[:, None] - np.argwhere(b)[None], axis=2)
    precision, recall = (np.mean(distances.min(axis=axis) <= tolerance) for axis in (1, 0))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_exact_f1_agrees_with_torchmetrics() -> None:
    from torchmetrics.functional.classification import binary_f1_score

    a, b = noise(SIDE, SIDE) > 127, noise(SIDE, SIDE) > 127
    found = compare("lines", 255 * a.astype(np.uint8), 255 * b.astype(np.uint8), 2)["f1_exact"]
    assert found == pytest.approx(float(binary_f1_score(torch.from_numpy(a), torch.from_numpy(b).int())), abs=1e-6)


@pytest.mark.parametrize(("side", "scales"), [(176, 5), (175, 4), (99, 4)])
def test_ms_ssim_agrees_with_an_independent_statement(side: int, scales: int) -> None:
    wanted = np.asarray(render(sample_scene(1, 2), side).convert("L"))
    got = np.clip(wanted + RNG.normal(0, 20, wanted.shape), 0, 255).astype(np.uint8)
    found = ms_ssim(got, wanted)
    assert found is not None and 0.3 < found < 0.99
    assert found == pytest.approx(plain_ms_ssim(got / 255, wanted / 255, scales), abs=1e-4)
    assert ms_ssim(wanted, wanted) == pytest.approx(1)
    color = ms_ssim(np.stack([got] * 3, axis=2), np.stack([wanted] * 3, axis=2))
    assert color == pytest.approx(found, abs=1e-4), "three equal channels"


def plain_ms_ssim(a: np.ndarray, b: np.ndarray, scales: int) -> float:
    """Wang, Simoncelli, Bovik 2003, with the weights of the first scales divided by their sum."""
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[:scales]
    value = 1.0
    for scale, weight in enumerate(weights / weights.sum()):
        window = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
        window /= window.sum()

        def blur(x: np.ndarray, window: np.ndarray = window) -> np.ndarray:
            for axis in (0, 1):
                x = np.apply_along_axis(np.convolve, axis, x, window, "valid")
            return x

        last = scale == scales - 1
        if last:
            a, b = (np.pad(x, 5, mode="reflect") for x in (a, b))  # as torchmetrics does at the last scale
        ma, mb = blur(a), blur(b)
        va, vb, vab = blur(a * a) - ma * ma, blur(b * b) - mb * mb, blur(a * b) - ma * mb
        contrast = (2 * vab + 0.03**2) / (va + vb + 0.03**2)
        luminance = (2 * ma * mb + 0.01**2) / (ma**2 + mb**2 + 0.01**2)
        value *= np.mean(contrast * luminance if last else contrast) ** weight
        h, w = (n // 2 * 2 for n in a.shape)
        a, b = (x[:h, :w].reshape(h // 2, 2, w // 2, 2).mean(axis=(1, 3)) for x in (a, b))
    return float(value)


def test_ms_ssim_of_a_map_that_is_too_small_is_a_line_and_no_value() -> None:
    assert ms_ssim(noise(98, 200), noise(98, 200)) is None
    pair = drawn_pair(0, "lineart")
    measures = Measures([open_annotator("lineart")], [pair])
    assert "ms_ssim" not in measures.picture(pair.target, pair)
    measures.picture(pair.target, pair)
    assert measures.missing == ["ms_ssim: not measured: the pictures are too small for it."]


def test_a_missing_package_is_a_line_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    pair = drawn_pair(0, "lineart")
    measures = Measures([open_annotator("lineart")], [pair])
    big = Image.fromarray(noise(128, 128, 3))
    pair = Pair("big", "a", annotate(open_annotator("lineart"), big), big, Truth(np.ones((128, 128), bool)), "picture")
    assert {"condition_error"} <= set(measures.picture(big, pair)) and "ms_ssim" not in measures.picture(big, pair)
    (line,) = measures.missing
    assert line.startswith("ms_ssim: not measured: needs torchmetrics") and "[metrics]" in line


def test_depth_is_free_of_scale_and_shift_but_not_of_the_direction() -> None:
    wanted = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    closer = (wanted // 2 + 60).astype(np.uint8)
    values = depth_agreement(closer, wanted)
    assert values["depth_error"] < 0.003, "half the contrast, shifted: only rounding is left"
    assert values["depth_spearman"] > 0.999
    assert values["depth_rmse_255"] == pytest.approx(np.sqrt(np.mean((closer.astype(float) - wanted) ** 2)))
    inverted = depth_agreement(255 - wanted, wanted)
    assert inverted["depth_spearman"] == pytest.approx(-1)
    assert inverted["depth_error"] == pytest.approx(wanted.std() / 255), "the best scale that is not negative is 0"
    flat = depth_agreement(np.full_like(wanted, 9), wanted)
    assert flat["depth_spearman"] == 0 and flat["depth_error"] == pytest.approx(wanted.std() / 255)


def test_depth_agrees_with_least_squares_and_with_torchmetrics() -> None:
    from torchmetrics.functional.regression import spearman_corrcoef

    got, wanted = noise(40, 30), noise(40, 30)
    wanted = (wanted // 2 + got // 2).astype(np.uint8)  # many ties
    columns = np.stack([got.ravel() / 255, np.ones(got.size)], axis=1)
    (_, rest, *_) = np.linalg.lstsq(columns, wanted.ravel() / 255)
    values = depth_agreement(got, wanted)
    assert values["depth_error"] == pytest.approx(np.sqrt(rest[0] / got.size))
    theirs = spearman_corrcoef(torch.from_numpy(got.ravel()).double(), torch.from_numpy(wanted.ravel()).double())
    assert values["depth_spearman"] == pytest.approx(float(theirs), abs=1e-6)


def test_differences_do_not_wrap_around() -> None:
    """1 - 2 in uint8 is 255."""
    low, high = np.full((64, 64), 1, np.uint8), np.full((64, 64), 2, np.uint8)
    assert compare("edges", low, high, 256)["condition_error"] == pytest.approx(1 / 255)
    assert depth_agreement(low, high)["depth_rmse_255"] == pytest.approx(1)


def test_palette_is_the_mean_difference_of_the_cells() -> None:
    cells = noise(4, 4, 3)
    wanted = np.kron(cells, np.ones((16, 16, 1), np.uint8))
    other = wanted.copy()
    other[:16, :16] = (255, 0, 0)
    one = float(ciede2000(srgb_to_lab(cells[0, 0]), srgb_to_lab(u8([255, 0, 0]))))
    assert palette_difference(wanted, wanted) == 0
    assert palette_difference(other, wanted) == pytest.approx(one / 16)


def test_normals_are_compared_by_their_angle() -> None:
    def facing(x: float, z: float) -> np.ndarray:
        return np.broadcast_to(np.rint((np.array([x, 0, z]) + 1) * 127.5).astype(np.uint8), (8, 8, 3))

    front, side = facing(0, 1), facing(np.sin(np.radians(30)), np.cos(np.radians(30)))
    assert normal_angle(front, front) == pytest.approx(0, abs=0.01)
    assert normal_angle(side, front) == pytest.approx(30, abs=0.5)


def test_classes_are_the_nearest_colours() -> None:
    palette = u8([[0, 0, 0], [200, 0, 0], [0, 200, 0]])
    values = u8([[[9, 3, 0], [180, 30, 0]], [[0, 250, 9], [201, 0, 0]]])
    assert nearest_class(values, palette).tolist() == [[0, 1], [2, 1]]
    assert nearest_class(u8([[0, 255]]), u8([[0, 0, 0], [255, 255, 255]])).tolist() == [[0, 1]]
    picture = Image.new("RGB", (100, 100), "red")
    picture.putpixel((0, 0), (1, 2, 3))
    assert own_palette([picture, Image.new("L", (9, 9), 7)]).tolist() == [[255, 0, 0], [7, 7, 7]]


def test_miou_is_that_of_one_confusion_matrix() -> None:
    from torchmetrics.functional.classification import multiclass_jaccard_index

    wanted = RNG.integers(0, 5, (12, 20, 20))
    wanted[:3] %= 2
    got = np.where(RNG.random(wanted.shape) < 0.7, wanted, RNG.integers(0, 6, wanted.shape))  # class 5 is in none
    counts = np.stack([class_counts(a, b, 8) for a, b in zip(got, wanted, strict=True)])  # 6 and 7 do not occur
    found = mean_iou(counts, seed=0)
    ious = [np.sum((got == c) & (wanted == c)) / np.sum((got == c) | (wanted == c)) for c in range(6)]
    assert ious[5] == 0 and found.mean == pytest.approx(np.mean(ious))
    theirs = multiclass_jaccard_index(torch.from_numpy(got), torch.from_numpy(wanted), num_classes=8)
    assert found.mean == pytest.approx(float(theirs), abs=1e-6)
    by_picture = np.mean([mean_iou(one[None], 0).mean for one in counts])
    assert found.mean != pytest.approx(by_picture, abs=1e-3)
    assert found.low < found.mean < found.high
    assert mean_iou(np.repeat(counts[:1], 9, axis=0), 0).low == pytest.approx(mean_iou(counts[:1], 0).mean)


def body(**joints: tuple[float, float]) -> np.ndarray:
    """A standing figure, 100 px high, with some joints replaced."""
    points = np.full((18, 2), np.nan)
    points[[0, 1, 2, 5, 8, 11, 10, 13]] = [
        (50, 10),
        (50, 20),
        (40, 20),
        (60, 20),
        (42, 60),
        (58, 60),
        (42, 100),
        (58, 100),
    ]
    for name, place in joints.items():
        points[int(name[1:])] = place
    return points


def person(points: np.ndarray) -> Skeleton:
    return Skeleton(points, (None, None), None)


def test_oks_is_cocos_formula() -> None:
    assert similarity(body(), body()) == 1
    area = 20 * 90  # the box around the visible joints
    moved = body(j0=(55, 10))
    one = np.exp(-(5**2) / (2 * area * (2 * 0.026) ** 2))
    assert similarity(moved, body()) == pytest.approx((one + 6) / 7), "seven joints, the neck does not count"
    assert similarity(body(j0=(np.nan, np.nan)), body()) == pytest.approx(6 / 7), "a joint that is missing counts 0"


def test_people_are_matched_and_their_joints_counted() -> None:
    first, second = person(body()), person(np.add(body(), (100, 0)))
    assert people_agreement([second, first], [first, second]) == {"pose_oks": 1, "people_matched": 1, "pose_pck": 1}
    assert people_agreement([first], [first, second]) == {"pose_oks": 0.5, "people_matched": 0.5, "pose_pck": 0.5}
    assert people_agreement([], [first]) == {"pose_oks": 0, "people_matched": 0, "pose_pck": 0}
    assert people_agreement([first], []) == {}
    # The torso is 40 px long: 4 px off is in its place, 5 px off is not.
    near, far = person(body(j10=(42, 104))), person(body(j10=(42, 105)))
    assert people_agreement([near], [first])["pose_pck"] == 1
    assert people_agreement([far], [first])["pose_pck"] == pytest.approx(7 / 8)
    assert match(np.array([[0.9, 0.8], [0.95, 0.1]])) == {1: 0, 0: 1}
    assert match(np.array([[0.0]])) == {}


def test_excess_of_clipping_and_of_chroma_counts_upwards_only() -> None:
    dull = np.full((8, 8, 3), (120, 100, 100), np.uint8)
    loud = dull.copy()
    loud[:2] = (255, 0, 0)
    values = picture_excess(loud, dull)
    assert values["clipped"] == pytest.approx(0.25) and values["saturation"] > 10
    assert picture_excess(dull, loud) == picture_excess(dull, dull) == {"clipped": 0, "saturation": 0}


def test_diversity_is_the_mean_distance_of_the_pictures() -> None:
    black, white = Image.new("RGB", (32, 32)), Image.new("RGB", (32, 32), "white")
    assert mean_distance([black, black]) == 0
    assert mean_distance([black, white]) == pytest.approx(100, abs=0.01), "the lightness of white"
    assert mean_distance([black, black, white]) == pytest.approx(100 * 2 / 3, abs=0.01)


def test_kid_agrees_with_torchmetrics_and_its_interval_with_leaving_one_out() -> None:
    from torchmetrics.image.kid import poly_mmd

    rng = torch.Generator().manual_seed(0)
    wanted = torch.randn(30, 8, generator=rng, dtype=torch.float64)
    groups = [torch.randn(30, 8, generator=rng, dtype=torch.float64) + 0.3 for _ in range(2)]
    found = kernel_distance(groups, wanted)
    assert found.mean == pytest.approx(np.mean([float(poly_mmd(wanted, group)) for group in groups]))
    rows = torch.arange(30)
    rest = [np.mean([float(poly_mmd(wanted[rows != n], group[rows != n])) for group in groups]) for n in range(30)]
    assert found.high - found.mean == pytest.approx(1.96 * np.sqrt(29 * np.var(rest)))
    same = kernel_distance([torch.randn(30, 8, generator=rng, dtype=torch.float64)], wanted)
    assert same.low < 0 < same.high and found.low > 0


def test_fid_agrees_with_the_formula_in_numpy() -> None:
    rng = torch.Generator().manual_seed(1)
    wanted, got = torch.randn(200, 5, generator=rng), 2 * torch.randn(200, 5, generator=rng) + 1
    (ma, mb), (ca, cb) = zip(*((x.mean(axis=0), np.cov(x.T)) for x in (wanted.numpy(), got.numpy())), strict=True)
    root = np.sqrt(np.linalg.eigvals(ca @ cb).real).sum()
    found = frechet_distance([got], wanted)
    assert found.mean == pytest.approx(float(np.sum((ma - mb) ** 2) + np.trace(ca + cb) - 2 * root), rel=1e-4)
    assert found.low < found.mean < found.high


def mean_color(pictures: Sequence[Image.Image]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.asarray(p, np.float64)).mean(dim=(0, 1)) / 255 for p in pictures])


LABELS = """
from dataclasses import dataclass
from PIL import Image
from t2i_adapter.annotators.registry import Facts

@dataclass(frozen=True)
class Halves:
    facts = Facts(channels=3, kind="labels")
    def __call__(self, image, rng):
        return image.convert("L").point([0] * 128 + [255] * 128).convert("RGB")
"""


def test_pooled_measures_what_needs_all_pictures(tmp_path: Path) -> None:
    (tmp_path / "halves.py").write_text(LABELS)
    spec = f"{tmp_path}/halves.py:Halves"
    pairs = [drawn_pair(number, spec) for number in range(20)]
    measures = Measures([open_annotator(spec)], pairs, features=mean_color)
    targets = [pair.target for pair in pairs]
    columns = {
        "adapter": [[target, target.rotate(180)] for target in targets],
        "other_condition": [[a, b] for a, b in zip(targets[1:] + targets[:1], targets[2:] + targets[:2], strict=True)],
        "target": [[target] for target in targets],
    }
    found = measures.pooled(columns, pairs)
    assert set(found) == {"condition_miou", "diversity", "kid"} <= set(METRICS)
    assert found["condition_miou"]["target"].mean == 1
    assert 1 > found["condition_miou"]["adapter"].mean > found["condition_miou"]["other_condition"].mean
    assert set(found["diversity"]) == set(found["kid"]) == {"adapter", "other_condition"}
    assert measures.missing == ["fid: not measured: needs 2000 pairs or more, got 20."]
    few = Measures([], pairs[:3], features=mean_color)
    assert few.pooled({"adapter": [[target] for target in targets[:3]]}, pairs[:3]) == {}
    assert [line.split(":")[0] for line in few.missing] == ["kid", "fid"]


def test_without_the_network_of_kid_a_line_says_so() -> None:
    from t2i_adapter.evaluation.pooled import inception_features

    pairs = [drawn_pair(number % 3, "canny") for number in range(20)]
    measures = Measures([], pairs, features=inception_features)
    try:
        import torch_fidelity  # noqa: F401
    except ImportError:
        assert measures.pooled({"adapter": [[pair.target] for pair in pairs]}, pairs) == {}
        assert "kid, fid: not measured: need torchmetrics and torch-fidelity" in measures.missing[-1]
    else:
        pytest.skip("torch-fidelity is installed, and its network would be downloaded")


@pytest.mark.parametrize("spec", ["canny", "lineart", "mask", "palette", "normal", "tile", "grey", "scribble"])
def test_every_metric_of_a_kind_has_words_and_its_best_value_for_the_target(spec: str) -> None:
    pair = drawn_pair(1, spec)
    second = open_second("auto", open_annotator(spec))
    measures = Measures([open_annotator(spec), *([second] if second else [])], [pair])
    best = measures.picture(pair.target, pair)
    worse = measures.picture(render(sample_scene(9, 77), SIDE), pair)
    assert set(best) == set(worse) <= set(METRICS)
    keys = [key for key in best if key not in ("iou", "edge_f1", "clipped", "saturation")]
    assert len(keys) >= 1 + (second is not None)
    for key in keys:
        assert best[key] == pytest.approx(float(METRICS[key].higher_is_better), abs=1e-5)
        assert (worse[key] < best[key]) == METRICS[key].higher_is_better


def test_labels_are_compared_as_classes(tmp_path: Path) -> None:
    (tmp_path / "halves.py").write_text(LABELS)
    spec = f"{tmp_path}/halves.py:Halves"
    pairs = [drawn_pair(number, spec) for number in range(3)]
    measures = Measures([open_annotator(spec)], pairs)
    values = measures.picture(Image.new("RGB", (SIDE, SIDE), "white"), pairs[0])
    share = np.mean(np.asarray(pairs[0].condition) > 127)
    assert values["label_accuracy"] == pytest.approx(share) and 0 < share < 1
    found = measures.pooled({"adapter": [[pair.target] for pair in pairs]}, pairs)["condition_miou"]["adapter"]
    assert (found.low, found.mean, found.high) == (1, 1, 1)


def test_the_second_judge_is_another_formula_that_needs_no_download() -> None:
    for first, second in SECOND.items():
        assert first in kinds() and first != open_annotator(second).name
        assert not open_annotator(second).facts.weights
        assert open_annotator(second).fingerprint != open_annotator(first.replace("teed", "canny,low=1")).fingerprint
    canny = open_annotator("canny")
    assert open_second("none", canny) is None and open_second("auto", None) is None
    assert open_second("auto", open_annotator("mask")) is None
    chosen = open_second("sketch", canny)
    assert chosen is not None and chosen.name == "sketch"
    with pytest.raises(UserError, match="--second_judge canny: is the first judge"):
        open_second("canny", canny)
    with pytest.raises(UserError, match="--second_judge canny: there is no first judge.*--judge"):
        open_second("canny", None)


def evaluation_of(own: list[float], other: list[float], key: str) -> Evaluation:
    values = {key: {"adapter": own, "other_condition": other}}
    return Evaluation([], [], [], {}, values, {})


def test_the_second_opinion_follows_the_paired_interval() -> None:
    second, noise_ = open_annotator("lineart"), RNG.normal(0, 0.01, 20)
    low, high = [0.2 + e for e in noise_], [0.3 + e for e in noise_[::-1]]
    assert " agrees: its RMS difference" in second_opinion(evaluation_of(low, high, "second_condition_error"), second)
    assert " agrees: its F1" in second_opinion(evaluation_of(high, low, "second_condition_f1"), second)
    assert " disagrees: " in second_opinion(evaluation_of(low, high, "second_condition_f1"), second)
    assert "undecided" in second_opinion(evaluation_of(low, low[::-1], "second_condition_f1"), second)
    assert second_opinion(evaluation_of(low, high, "iou"), second) == ""


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPVisionConfig
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("clip")
    vocab, merges = clip_vocabulary([*WORDS.split()])
    eyes = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    eyes.image_size, eyes.patch_size, eyes.projection_dim = 32, 8, 16
    words = text_config(vocab, 16, "quick_gelu")
    torch.manual_seed(0)
    config = CLIPConfig(text_config=words.to_dict(), vision_config=eyes.to_dict(), projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    CLIPProcessor(images, make_tokenizer(vocab, merges, END)).save_pretrained(folder)
    return folder


def test_clip_score_is_the_cosine_of_both_vectors(tiny_clip: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    network = CLIPModel.from_pretrained(tiny_clip).eval()
    processor: Any = CLIPProcessor.from_pretrained(tiny_clip, backend="pil")
    scores = []
    for number, prompt in enumerate(["a red circle", "the blue square with white background", "a green circle"]):
        image = render(sample_scene(2, number), SIDE)
        with torch.no_grad():
            inputs = processor(text=[prompt], images=[image], return_tensors="pt")
            eye = network.visual_projection(network.vision_model(inputs["pixel_values"]).pooler_output)[0].numpy()
            word = network.text_projection(network.text_model(inputs["input_ids"]).pooler_output)[0].numpy()
        cosine = float(eye @ word / np.linalg.norm(eye) / np.linalg.norm(word))
        scores.append(100 * cosine)
        assert clip_score(str(tiny_clip), image, prompt) == pytest.approx(max(0, 100 * cosine), abs=1e-3)
    assert max(scores) > 0
    long = " ".join(["red"] * 200)
    assert clip_score(str(tiny_clip), render(sample_scene(2, 0), SIDE), long) >= 0, "a long prompt is cut off"
    pair = drawn_pair(0, "canny")
    assert "clip_score" in Measures([], [pair], clip=str(tiny_clip)).picture(pair.target, pair)


def test_a_folder_without_a_clip_model_is_an_error_that_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--clip .*: is no CLIP model"):
        clip_score(str(tmp_path), Image.new("RGB", (8, 8)), "a")


def test_poses_are_compared_by_joints_where_the_annotator_returns_them() -> None:
    from t2i_adapter.annotators import weights

    pytest.importorskip("ai_edge_litert", reason="needs sdxl-t2i-adapter[pose]")
    if not weights.have("pose"):
        pytest.skip(f"the networks are not here: {weights.COMMAND} pose")
    photo = Image.open(Path(__file__).parents[1] / "assets" / "astronaut.jpg").convert("RGB").resize((256, 256))
    judge = open_annotator("pose,hands=false,face=false")
    pair = Pair("a", "b", annotate(judge, photo), photo, Truth(np.ones((256, 256), bool)), "picture")
    measures = Measures([judge], [pair])
    same, moved = measures.picture(photo, pair), measures.picture(photo.rotate(0, translate=(40, 0)), pair)
    assert same["pose_oks"] == same["pose_pck"] == same["people_matched"] == 1
    assert moved["pose_oks"] < 0.9 and moved["pose_pck"] < 0.5


def test_the_verb_measures_by_kind_and_prints_the_second_opinion_and_what_is_missing(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "shapes", num=3, split="test", size=64)
    torch.manual_seed(0)
    network = build_adapter(AdapterOptions(), open_base(BaseOptions(name=str(tiny_base))).unet_config)
    save_adapter(
        network, tmp_path / "adapter", metadata={"base": {"name": str(tiny_base)}, "resolution": 64}, fp16=False
    )
    run(
        EvaluateOptions(
            adapter=(str(tmp_path / "adapter"),),
            data=str(tmp_path / "shapes"),
            condition="lineart",
            num=3,
            pictures=2,
            steps=1,
            quality=True,
            out=str(tmp_path / "out"),
        )
    )
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert {"condition_error", "second_condition_f1", "diversity", "clipped"} <= set(result["metrics"]) <= set(METRICS)
    assert result["metrics"]["condition_error"]["target"]["mean"] == 0
    assert set(result["metrics"]["diversity"]) == {"adapter", "other_condition", "no_adapter"}
    assert result["settings"]["second_judge"]["name"] == "canny"
    assert [line.split(":")[0] for line in result["settings"]["not_measured"]] == ["ms_ssim", "kid", "fid"]
    printed = capsys.readouterr().out
    assert "A judge that training never saw (canny)" in printed and "ms_ssim: not measured" in printed
    page = (tmp_path / "out" / "report.html").read_text()
    assert "chroma above the target" in page and '<p class="note">ms_ssim: not measured' in page
    assert '<p class="note">A judge that training never saw (canny)' in page


@pytest.mark.parametrize("spec", ["palette", "normal"])
def test_colour_maps_of_an_adapter_of_one_channel_are_compared_as_grey(spec: str) -> None:
    colored = drawn_pair(0, spec)
    grey = replace(colored, condition=colored.condition.convert("L"))
    values = Measures([open_annotator(spec)], [grey]).picture(grey.target, grey)
    assert values["condition_error"] == 0 and "condition_color" not in values and "normal_angle" not in values
