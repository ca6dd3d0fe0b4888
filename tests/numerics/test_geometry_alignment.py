"""Image and condition align to a fraction of a pixel, and the size conditioning is correct."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from t2i_adapter.annotators.mirror import exchange_sides
from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.geometry import Framing, Resample, apply, aspect_gap, cover
from t2i_adapter.data.pair import PairTransform
from t2i_adapter.errors import UserError
from t2i_adapter.types import Sample

SIZES = [(64, 64), (100, 160), (333, 211), (48, 480), (17, 23), (683, 1024)]


@pytest.mark.parametrize("original", SIZES)
@pytest.mark.parametrize("resolution", [32, 64, 128])
def test_the_plan_is_a_centre_crop_of_the_resized_picture(original: tuple[int, int], resolution: int) -> None:
    geometry = cover(original, (resolution, resolution))
    assert Framing(resolution).plan(original, "d", 0) == geometry
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
    picture, geometry = Image.fromarray(noise), cover(original, (32, 32))
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    whole = picture.resize(geometry.resized[::-1], filters[resample])
    (top, left), (height, width) = geometry.top_left, geometry.target
    expected = np.asarray(whole.crop((left, top, left + width, top + height)))
    got = np.asarray(apply(picture, geometry, resample))
    assert np.abs(got.astype(int) - expected.astype(int)).max() <= 1  # one level of Pillow's 8-bit rounding


def test_other_shapes_are_covered_from_the_centre() -> None:
    geometry = cover((100, 100), (32, 64))
    assert (geometry.resized, geometry.top_left) == ((64, 64), (16, 0))


def test_nearest_takes_the_pixel_under_the_centre() -> None:
    columns = np.tile(np.arange(211, dtype=np.uint8), (133, 1))
    geometry = cover((133, 211), (32, 32))
    got = np.asarray(apply(Image.fromarray(columns), geometry, "nearest")).astype(float)
    centres = (geometry.top_left[1] + np.arange(32) + 0.5) * 211 / geometry.resized[1] - 0.5
    assert np.abs(got - centres).max() <= 0.5 + 1e-6


def test_a_picture_of_the_right_size_is_untouched() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for resample in ("bicubic", "bilinear", "nearest"):
        assert (np.asarray(apply(Image.fromarray(noise), cover((64, 64), (64, 64)), resample)) == noise).all()


def checkerboard(size: tuple[int, int], cells: tuple[int, int]) -> Image.Image:
    """A checkerboard of `cells` fields; a pixel's value is the exact share of white in it."""
    fine = 64
    rows, columns = (
        ((np.arange(length * fine) * count // (length * fine)) % 2).reshape(length, fine).mean(axis=1)
        for length, count in zip(size, cells, strict=True)
    )
    board = rows[:, None] * (1 - columns) + (1 - rows[:, None]) * columns
    return Image.fromarray((board * 255).round().astype(np.uint8))


def test_shrinking_does_not_alias() -> None:
    stripes = np.zeros((512, 512), np.uint8)
    stripes[:, ::2] = 255
    for resample in ("bicubic", "bilinear"):
        cut = np.asarray(apply(Image.fromarray(stripes), cover((512, 512), (64, 64)), resample)).astype(int)
        assert np.abs(cut - 127.5).max() <= 6, "lines finer than a pixel become grey"


def test_a_long_thin_picture_is_not_enlarged_as_a_whole() -> None:
    picture = Image.new("RGB", (20_000, 2), "red")
    geometry = cover((2, 20_000), (512, 512))
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


LISTS: list[dict[str, Any]] = [
    {"buckets": "none"},
    {"buckets": "sdxl", "bucket_step": 32},
    {"buckets": "generated", "bucket_step": 32},
]


def test_sdxl_s_own_sizes() -> None:
    sizes = Framing(1024, "sdxl").targets()
    assert len(sizes) == 40
    assert (sizes[0], sizes[-1]) == ((512, 1856), (2048, 512))
    for height, width in sizes:
        assert height % 64 == width % 64 == 0
        assert 0.9 * 1024**2 < height * width <= 1024**2
        assert (width, height) in sizes or (height, width) == (704, 1344)  # the report's list has no 1344 x 704
    assert set(Framing(512, "sdxl", 32).targets()) == {(height // 2, width // 2) for height, width in sizes}
    assert all(side % 64 == 0 for size in Framing(768, "sdxl", 64).targets() for side in size)


@pytest.mark.parametrize(("resolution", "step"), [(1024, 64), (1024, 32), (512, 64), (256, 32), (128, 32), (64, 64)])
def test_generated_sizes_have_at_most_the_square_s_area(resolution: int, step: int) -> None:
    sizes = Framing(resolution, "generated", step).targets()
    assert (resolution, resolution) in sizes
    assert sizes == tuple(sorted({(width, height) for height, width in sizes}))
    for height, width in sizes:
        assert height % step == width % step == 0
        assert resolution**2 - step * max(height, width) < height * width <= resolution**2
        assert max(height, width) <= 4 * min(height, width)


@pytest.mark.parametrize("resolution", [8, 40, 100, 200])
def test_a_resolution_below_or_between_the_steps_has_buckets_too(resolution: int) -> None:
    for buckets in ("sdxl", "generated"):
        assert all(side % 32 == 0 and side > 0 for size in Framing(resolution, buckets, 32).targets() for side in size)


@pytest.mark.parametrize(
    ("original", "target"),
    [
        ((1000, 1000), (1024, 1024)),
        ((3000, 4000), (896, 1152)),
        ((1080, 1920), (768, 1344)),
        ((1920, 1080), (1344, 768)),
        ((100, 5000), (512, 2048)),
        ((5000, 100), (2048, 512)),
        ((1, 1), (1024, 1024)),
    ],
)
def test_a_picture_goes_to_the_size_nearest_in_aspect(original: tuple[int, int], target: tuple[int, int]) -> None:
    assert Framing(1024, "sdxl").target(original) == target


@pytest.mark.parametrize("original", [(300, 211), (211, 300), (97, 640), (512, 512)])
@pytest.mark.parametrize("sizes", LISTS)
@pytest.mark.parametrize("crop", ["center", "random"])
def test_every_view_lies_inside_the_resized_picture_which_just_covers_it(
    original: tuple[int, int], sizes: dict[str, Any], crop: Any
) -> None:
    framing = Framing(128, crop=crop, flip=True, views=6, **sizes)
    assert framing.count == (6 if crop == "random" else 2)
    for view in range(framing.count):
        geometry = framing.plan(original, "d1", view)
        assert geometry.target in framing.targets()
        slack = [whole - part for whole, part in zip(geometry.resized, geometry.target, strict=True)]
        assert min(slack) == 0, "no more is lost than the aspect needs"
        assert all(0 <= at <= most for at, most in zip(geometry.top_left, slack, strict=True))
        scale = max(t / o for t, o in zip(geometry.target, original, strict=True))
        assert all(abs(r - o * scale) <= 0.5 for r, o in zip(geometry.resized, original, strict=True))


def test_random_crops_and_mirrorings_are_functions_of_picture_and_view() -> None:
    framing = Framing(64, crop="random", flip=True, views=4)
    plans = {
        (digest, view): framing.plan((64, 164), digest, view) for digest in map(str, range(100)) for view in range(4)
    }
    assert all(framing.plan((64, 164), *which) == geometry for which, geometry in plans.items())
    lefts = [geometry.top_left[1] for geometry in plans.values()]
    assert (min(lefts), max(lefts)) == (0, 100)
    assert abs(np.mean(lefts) - 50) < 5 * 29.2 / np.sqrt(400)  # five standard errors
    flipped = sum(geometry.flipped for geometry in plans.values())
    assert abs(flipped - 200) < 5 * 10
    assert not any(replace(framing, flip=False).plan((64, 164), "0", view).flipped for view in range(4))


def test_centred_crops_have_a_plain_and_a_mirrored_view() -> None:
    framing = Framing(64, flip=True, views=5)
    plain, mirrored = (framing.plan((64, 100), "d", view) for view in range(2))
    assert mirrored == replace(plain, flipped=True)
    assert not plain.flipped
    assert Framing(64, views=5).count == 1


def test_options_that_change_no_crop_change_no_framing() -> None:
    plain = Framing.of(DataOptions(resolution=64))
    assert plain == Framing(64)
    assert Framing.of(DataOptions(resolution=64, views=3, bucket_step=32, background="black")) == plain
    assert Framing.of(DataOptions(resolution=64, views=3, crop="random")).count == 3
    assert Framing.of(DataOptions(resolution=64, buckets="sdxl", bucket_step=32)).bucket_step == 32


def ramp(size: tuple[int, int]) -> Image.Image:
    """A pixel's colour is its position: red grows from left to right, green from top to bottom."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([(x + 0.5) * 256 / width, (y + 0.5) * 256 / height, 0 * x], -1).astype(np.uint8))


@pytest.mark.parametrize("sizes", LISTS)
@pytest.mark.parametrize("original", [(600, 400), (333, 517)])
def test_the_size_conditioning_is_the_true_position_of_the_crop(
    original: tuple[int, int], sizes: dict[str, Any]
) -> None:
    framing = Framing(128, crop="random", flip=True, views=8, **sizes)
    seen = set()
    for view in range(8):
        part = PairTransform(framing, 3).crop(Sample("row", ramp(original), ramp(original), ("",), "d"), view)
        height, width, top, left, *target = part.geometry.time_ids()
        assert ((height, width), tuple(target)) == (original, part.image.shape[1:])
        red, green = (part.image[channel].astype(float) for channel in (0, 1))
        picture_x, picture_y = red[:, 0].mean() / 256, green[0].mean() / 256  # of the crop's first pixels
        if part.geometry.flipped:
            picture_x = 1 - picture_x  # its place on the mirrored picture
        resized = part.geometry.resized
        assert abs(picture_x * resized[1] - (left + 0.5)) < 1.5 * resized[1] / 256  # one level, and its rounding
        assert abs(picture_y * resized[0] - (top + 0.5)) < 1.5 * resized[0] / 256
        seen.add((part.geometry.flipped, left, top))
    assert {flipped for flipped, *_ in seen} == {True, False}
    assert len(seen) > 4


def displacement(a: np.ndarray, b: np.ndarray) -> float:
    """How far two pictures lie apart, in pixels: the shift that explains their difference, least squares over the
    gradients, the largest of the four quarters'."""
    smooth = [cv2.GaussianBlur(part.astype(float), (0, 0), 2.0) for part in (a, b)]
    height, width = a.shape
    largest = 0.0
    for rows in (slice(0, height // 2), slice(height // 2, None)):
        for columns in (slice(0, width // 2), slice(width // 2, None)):
            one, other = (part[rows, columns][3:-3, 3:-3] for part in smooth)
            down, across = np.gradient((one + other) / 2)
            gradients = np.stack([down.ravel(), across.ravel()], 1)
            shift, *_ = np.linalg.lstsq(gradients, (one - other).ravel(), rcond=None)
            largest = max(largest, float(np.hypot(*shift)))
    return largest


def board_sample(original: tuple[int, int], scale: float, *, shifted: int = 0) -> Sample:
    """A checkerboard and the same as a condition at another scale, its whole picture `shifted` pixels to the right."""
    cells = max(2, round(original[0] / 23)), max(2, round(original[1] / 23))
    size = round(original[0] * scale), round(original[1] * scale)
    condition = np.roll(np.asarray(checkerboard(size, cells)), shifted, axis=1)
    image = checkerboard(original, cells).convert("RGB")
    return Sample("row", image, Image.fromarray(condition).convert("RGB"), ("",), f"{original}{scale}")


@pytest.mark.parametrize("sizes", LISTS)
@pytest.mark.parametrize(("crop", "flip"), [("center", False), ("center", True), ("random", True)])
@pytest.mark.parametrize("original", [(240, 240), (251, 403), (487, 321)])
@pytest.mark.parametrize("scale", [0.5, 1.0, 1.37, 3.0])
def test_image_and_condition_align_through_every_path(
    sizes: dict[str, Any], crop: Any, flip: bool, original: tuple[int, int], scale: float
) -> None:
    framing = Framing(160, crop=crop, flip=flip, views=3, **sizes)
    sample = board_sample(original, scale)
    for view in range(framing.count):
        part = PairTransform(framing, 1).crop(sample, view)
        grey = np.asarray(Image.fromarray(part.image.transpose(1, 2, 0)).convert("L"))
        assert displacement(grey, part.condition[0]) < 0.15  # pixels


@pytest.mark.parametrize("view", [0, 1])
def test_the_measure_sees_one_pixel(view: int) -> None:
    framing = Framing(160, flip=True)
    for pixels in (-2, 2):
        part = PairTransform(framing, 1).crop(board_sample((320, 320), 1.0, shifted=pixels), view)  # of 320; one of 160
        assert 0.8 < displacement(part.image[0], part.condition[0]) < 1.2


def test_the_mirrored_view_is_the_plain_one_mirrored() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (90, 131, 3), dtype=np.uint8)
    sample = Sample("row", Image.fromarray(noise), Image.fromarray(noise[::-1]), ("",), "d")
    plain, mirrored = (PairTransform(Framing(64, flip=True), 3).crop(sample, view) for view in range(2))
    assert np.array_equal(mirrored.image, plain.image[..., ::-1])
    assert np.array_equal(mirrored.condition, plain.condition[..., ::-1])


@pytest.mark.parametrize("channels", [1, 3])
def test_labels_are_never_blended(channels: int) -> None:
    labels = np.random.default_rng(0).choice([0, 7, 200], (90, 120)).astype(np.uint8)
    image = Image.fromarray(labels).convert("RGB")
    sample = Sample("row", image, image, ("",), "d")
    framing = Framing(64, crop="random", flip=True, views=4)
    for view in range(4):
        assert set(np.unique(PairTransform(framing, channels, "labels").crop(sample, view).condition)) == {0, 7, 200}
    assert len(np.unique(PairTransform(framing, channels, "map").crop(sample, 0).condition)) > 3


def test_a_normal_map_s_x_changes_its_sign_with_the_picture() -> None:
    """The mirrored normal map of a ball is the normal map of a ball."""
    y, x = (np.mgrid[:129, :129] - 64) / 60
    inside = x**2 + y**2 < 1
    z = np.sqrt(np.clip(1 - x**2 - y**2, 0, 1))
    normals = np.where(inside[..., None], np.stack([x, -y, z], -1), [0, 0, 1])
    ball = Image.fromarray(np.rint((normals + 1) * 127.5).astype(np.uint8))
    sample = Sample("row", ball, ball, ("",), "d")
    plain, mirrored = (
        PairTransform(Framing(128, flip=True), 3, "normal").crop(sample, view).condition.astype(int)
        for view in range(2)
    )
    assert np.abs(plain - mirrored).max() <= 2  # 127.5 has no whole level: 127 and 128 change places
    as_it_was = PairTransform(Framing(128, flip=True), 3, "map").crop(sample, 1).condition.astype(int)
    assert np.abs(plain - as_it_was).max() > 200


POSE_COLORS = [
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85),
    (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255),
    (255, 0, 255), (255, 0, 170), (255, 0, 85),
]  # fmt: skip
"""Of joint k and of limb k, in OpenPose's drawings."""
LIMBS = [
    ("neck", "r_shoulder"), ("neck", "l_shoulder"), ("r_shoulder", "r_elbow"), ("r_elbow", "r_wrist"),
    ("l_shoulder", "l_elbow"), ("l_elbow", "l_wrist"), ("neck", "r_hip"), ("r_hip", "r_knee"), ("r_knee", "r_ankle"),
    ("neck", "l_hip"), ("l_hip", "l_knee"), ("l_knee", "l_ankle"), ("neck", "nose"), ("nose", "r_eye"),
    ("r_eye", "r_ear"), ("nose", "l_eye"), ("l_eye", "l_ear"),
]  # fmt: skip
WALKER = {
    "nose": (130, 40), "neck": (125, 70), "r_shoulder": (95, 75), "r_elbow": (70, 105), "r_wrist": (40, 90),
    "l_shoulder": (155, 78), "l_elbow": (190, 110), "l_wrist": (180, 150), "r_hip": (105, 140), "r_knee": (80, 185),
    "r_ankle": (85, 235), "l_hip": (145, 142), "l_knee": (150, 190), "l_ankle": (200, 225), "r_eye": (120, 28),
    "l_eye": (145, 30), "r_ear": (105, 35), "l_ear": (165, 38),
}  # fmt: skip
"""Joint -> (x, y) of an asymmetric body, in the order of the joints."""


def draw_pose(joints: dict[str, tuple[int, int]], dim: float) -> np.ndarray:
    """256 px: limbs at `dim` of their colour, and joints upon them."""
    canvas = np.zeros((256, 256, 3), np.uint8)
    for number, (a, b) in enumerate(LIMBS):
        cv2.line(canvas, joints[a], joints[b], [int(value * dim) for value in POSE_COLORS[number]], 5)
    for number, name in enumerate(WALKER):
        cv2.circle(canvas, joints[name], 5, POSE_COLORS[number], -1)
    return canvas


@pytest.mark.parametrize("dim", [0.6, 0.5])
def test_a_mirrored_pose_is_the_drawing_of_the_mirrored_body(dim: float) -> None:
    other_side = {"l": "r", "r": "l"}
    twin = {name: other_side[name[0]] + name[1:] if name[1] == "_" else name for name in WALKER}
    mirrored_body = {twin[name]: (255 - x, y) for name, (x, y) in WALKER.items()}
    drawing, expected = (draw_pose(body, dim) for body in (WALKER, mirrored_body))
    sample = Sample("row", Image.fromarray(drawing), Image.fromarray(drawing), ("",), "d")
    got = PairTransform(Framing(256, flip=True), 3, "pose").crop(sample, 1).condition.transpose(1, 2, 0)
    drawn = expected.any(-1) | got.any(-1)
    wrong = (np.abs(got.astype(int) - expected.astype(int)).max(-1) > 2)[drawn].mean()
    assert wrong < 0.02, "the rims of lines, which OpenCV does not draw alike on both sides"
    unchanged = PairTransform(Framing(256, flip=True), 3, "map").crop(sample, 1).condition.transpose(1, 2, 0)
    assert (np.abs(unchanged.astype(int) - expected.astype(int)).max(-1) > 2)[drawn].mean() > 0.6


def test_pose_colours_turn_back_by_a_second_mirroring_and_others_never_turn() -> None:
    drawing = draw_pose(WALKER, 0.6)
    drawing[:40, :40] = 255  # face points
    drawing[:40, 40:80] = 90
    picture = Image.fromarray(drawing)
    once = exchange_sides(picture, "pose")
    assert np.array_equal(np.asarray(exchange_sides(once, "pose")), drawing)
    assert np.array_equal(np.asarray(once)[:40, :80], drawing[:40, :80])
    assert not np.array_equal(np.asarray(once), drawing)


def test_a_sample_without_a_condition_is_an_error_that_names_it() -> None:
    sample = Sample("train/00017.png", Image.new("RGB", (64, 64)), None, ("",), "d")
    with pytest.raises(UserError, match=r"train/00017.png: has no condition picture.*--data.condition"):
        PairTransform(Framing(64), 3).crop(sample, 0)
