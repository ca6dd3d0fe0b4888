"""The content and polarity of conditions, and duplicate pictures."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from t2i_adapter.data.shapes import condition, render, sample_scene
from t2i_adapter.doctor import duplicates
from t2i_adapter.doctor.content import BLACK_ON_WHITE, CONTENTS, WHITE_ON_BLACK, find_content, find_polarity


def pixels(kind: str, number: int = 5, size: int = 128) -> np.ndarray:
    return np.asarray(condition(sample_scene(0, number), size, kind))


def jpeg(picture: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def ramp() -> np.ndarray:
    return np.repeat(np.tile(np.arange(128, dtype=np.uint8) * 2, (128, 1))[..., None], 3, axis=2)


@pytest.mark.parametrize(
    ("picture", "kind"),
    [
        (np.full((64, 64, 3), 7, np.uint8), "constant"),
        (pixels("outline"), "two-valued"),
        (ramp(), "grey"),
        (np.asarray(jpeg(Image.fromarray(pixels("outline")), 80)), "grey"),
        (pixels("segmentation"), "colour"),
    ],
)
def test_content(picture: np.ndarray, kind: str) -> None:
    assert CONTENTS[find_content(picture)] == kind


@pytest.mark.parametrize("size", [64, 128, 512])
@pytest.mark.parametrize("kind", ["outline", "canny"])
def test_polarity_of_lines(kind: str, size: int) -> None:
    lines = pixels(kind, size=size)
    soft = cv2.GaussianBlur(lines, (0, 0), 1.0)
    for drawing in (lines, np.asarray(jpeg(Image.fromarray(lines), 80)), soft):
        assert find_polarity(drawing) == WHITE_ON_BLACK
        assert find_polarity(255 - drawing) == BLACK_ON_WHITE


def test_areas_have_no_polarity() -> None:
    disc = cv2.circle(np.zeros((128, 128, 3), np.uint8), (64, 64), 40, (255, 255, 255), -1)
    for picture in (disc, 255 - disc, ramp(), np.zeros((64, 64, 3), np.uint8), pixels("depth")):
        assert find_polarity(picture) == 0


def test_equal_pictures_share_a_hash_and_others_do_not() -> None:
    picture = render(sample_scene(0, 0), 64)
    changed = picture.copy()
    changed.putpixel((3, 3), (1, 2, 3))
    assert duplicates.hash_pixels(picture) == duplicates.hash_pixels(picture.copy())
    flat = Image.new("RGB", (4, 2))
    assert (
        len({duplicates.hash_pixels(p) for p in (picture, changed, flat, flat.transpose(Image.Transpose.ROTATE_90))})
        == 4
    )
    hashes = np.array([5, 9, 5, 1, 9, 5], np.uint64)
    assert sorted(duplicates.equal_groups(hashes)) == [[0, 2, 5], [1, 4]]
    assert list(duplicates.equal_groups(np.empty(0, np.uint64))) == []


@pytest.mark.parametrize(
    "save_again",
    [
        lambda picture: jpeg(picture, 75),
        lambda picture: picture.resize((96, 96), Image.Resampling.BICUBIC),
        lambda picture: jpeg(picture.resize((200, 200), Image.Resampling.BICUBIC), 85),
    ],
)
def test_pictures_saved_again_are_near_duplicates(save_again) -> None:
    pictures = [render(sample_scene(0, number), 128) for number in range(40)]
    pictures += [save_again(picture) for picture in pictures[:20]]
    looks = np.array([duplicates.perceptual_hash(picture) for picture in pictures], np.uint64)
    found = duplicates.confirm_pairs(duplicates.near_pairs(looks, 1000), lambda number: pictures[number])
    assert found == [(number, 40 + number) for number in range(20)]


def test_mirrored_and_inverted_pictures_are_not_near_duplicates() -> None:
    picture = render(sample_scene(0, 0), 128)
    turned = ImageOps.mirror(picture)
    inverted = ImageOps.invert(picture)
    assert duplicates.is_near_duplicate(picture, picture)
    assert not duplicates.is_near_duplicate(picture, turned) and not duplicates.is_near_duplicate(picture, inverted)


def test_near_pairs_of_many_are_fast_and_miss_few() -> None:
    rng = np.random.default_rng(0)
    looks = rng.integers(0, 2**64, 100_000, np.uint64)
    bits = np.uint64(1) << rng.integers(0, 64, (3, 500), np.uint64)
    looks[-500:] = looks[:500] ^ bits[0] ^ bits[1] ^ bits[2]
    found = set(duplicates.near_pairs(looks, 10_000))
    assert sum((number, 99_500 + number) in found for number in range(500)) >= 495
    assert len(found) < 600


def test_equal_hashes_are_not_compared_all_with_all() -> None:
    pairs = duplicates.near_pairs(np.zeros(100_000, np.uint64), 1000)
    assert 1000 <= len(pairs) <= 4000
    assert (
        duplicates.near_pairs(np.zeros(1, np.uint64), 1000) == []
        and duplicates.near_pairs(np.empty(0, np.uint64), 9) == []
    )
