"""The caption of a draw is a function of the draw's own choices and the options."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from t2i_adapter.batches.choices import choose_caption, shuffle_tags
from t2i_adapter.config.tree import DataOptions


def choose(*captions: str, pick: float = 0.0, drop: float = 0.5, tags: int = 0, **options: Any) -> str:
    return choose_caption(captions, DataOptions(**options), pick=pick, drop=drop, tags=tags)


def test_without_options_the_caption_is_unchanged() -> None:
    assert choose("a, b ,c") == "a, b ,c"
    assert choose("") == ""


@pytest.mark.parametrize(("pick", "expected"), [(0.0, "a"), (0.333, "a"), (0.334, "b"), (0.667, "c"), (0.9999, "c")])
def test_one_of_several_is_picked_each_as_often(pick: float, expected: str) -> None:
    assert choose("a", "b", "c", pick=pick) == expected


def test_a_share_is_dropped_and_takes_the_prefix_with_it() -> None:
    captions = [
        choose("a", drop=drop, proportion_empty_prompts=0.3, caption_prefix="x ") for drop in (0.0, 0.29, 0.3, 0.9)
    ]
    assert captions == ["", "", "x a", "x a"]


def test_the_prefix_stands_before_every_caption_but_the_empty_one() -> None:
    assert choose("a disc", caption_prefix="sks, ") == "sks, a disc"
    assert choose("", caption_prefix="sks, ") == ""


def test_shuffled_tags_are_the_same_tags_and_the_first_keep_their_place() -> None:
    tags = [f"tag {number}" for number in range(8)]
    caption = ", ".join(tags)
    orders = {choose(caption, tags=seed, shuffle_tags=True, keep_tags=2) for seed in range(50)}
    assert len(orders) > 40, "another order nearly every time"
    for order in orders:
        assert order.split(", ")[:2] == tags[:2]
        assert sorted(order.split(", ")) == tags
    assert choose(caption, tags=7, shuffle_tags=True) == choose(caption, tags=7, shuffle_tags=True)


def test_every_tag_comes_to_every_place_as_often() -> None:
    counts = np.zeros((4, 4))
    for seed in range(2000):
        for place, tag in enumerate(shuffle_tags("0, 1, 2, 3", 0, seed).split(", ")):
            counts[int(tag), place] += 1
    assert np.abs(counts - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)  # five standard deviations


@pytest.mark.parametrize(
    ("caption", "keep", "expected"),
    [("a disc", 0, "a disc"), ("", 0, ""), (" a ,, b ,", 5, "a, b"), (", ,", 0, ""), ("a, b, c", 3, "a, b, c")],
)
def test_odd_lists_of_tags(caption: str, keep: int, expected: str) -> None:
    assert shuffle_tags(caption, keep, 3) == expected


def test_the_prefix_is_not_shuffle_tags() -> None:
    for seed in range(10):
        assert choose("a, b, c", tags=seed, shuffle_tags=True, caption_prefix="x, ").startswith("x, ")
