"""Pairs whose conditions are equal, shuffled or inverted are told from whole ones, with a judge and without."""

from __future__ import annotations

import pytest
from PIL import Image, ImageOps
from support.tiny import write_circles

from t2i_adapter.annotators.registry import annotate, open_annotator
from t2i_adapter.doctor.pairing import check_pairs

CANNY = open_annotator("canny")
Pictures = list[Image.Image]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pictures, Pictures]:
    """12 conditions, canny's lines, and their pictures."""
    folder = write_circles(tmp_path_factory.mktemp("pairs"), num=12, size=128) / "train"
    targets = [Image.open(folder / f"{index:05d}.png").convert("RGB") for index in range(12)]
    return [annotate(CANNY, target) for target in targets], targets


@pytest.mark.parametrize("judge", [CANNY, None])
def test_whole_pairs_have_no_fault(pairs: tuple[Pictures, Pictures], judge: object) -> None:
    assert check_pairs(*pairs, judge, "white on black") == {}  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("judge", [CANNY, None])
def test_shuffled_conditions_are_found(pairs: tuple[Pictures, Pictures], judge: object) -> None:
    conditions, targets = pairs
    moved = conditions[5:] + conditions[:5]
    assert check_pairs(moved, targets, judge).keys() == {"unpaired"}  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("judge", "polarity"), [(CANNY, None), (None, "white on black")])
def test_inverted_conditions_are_found(pairs: tuple[Pictures, Pictures], judge: object, polarity: str | None) -> None:
    conditions, targets = pairs
    inverted = [ImageOps.invert(condition) for condition in conditions]
    found = check_pairs(inverted, targets, judge, polarity)  # pyright: ignore[reportArgumentType]
    assert found.keys() == {"inverted"}


def test_equal_conditions_are_found(pairs: tuple[Pictures, Pictures]) -> None:
    assert check_pairs([pairs[0][0]] * 12, pairs[1], CANNY).keys() == {"equal"}
