"""Paired differences, the ranking of adapters and its intervals, and the names of adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from PIL import Image

from t2i_adapter.evaluation import compare as compared
from t2i_adapter.evaluation.adapters import adapter_names
from t2i_adapter.evaluation.compare import (
    column_difference,
    compare,
    control_differences,
    evaluation_of,
    paired_interval,
)
from t2i_adapter.evaluation.evaluate import Evaluation
from t2i_adapter.evaluation.metrics import Truth, bootstrap
from t2i_adapter.evaluation.pairs import Pair
from t2i_adapter.statistics import mean_interval, pairs_needed

Rows = Mapping[str, Sequence[float | None]]


def evaluation(columns: Rows, metric: str = "iou") -> Evaluation:
    """An evaluation with these values of one metric; column -> one value a pair."""
    count = len(next(iter(columns.values())))
    picture = Image.new("RGB", (8, 8))
    pair = Pair("row", "prompt", picture.convert("L"), picture, Truth(np.ones((8, 8), bool)), "scene")
    estimates = {name: bootstrap([v for v in row if v is not None], 0, 100) for name, row in columns.items()}
    pictures = {name: [picture] * count for name in columns if name != "target"}
    return Evaluation(
        [pair] * count, [0] * count, [*range(1, count), 0], pictures, {metric: columns}, {metric: estimates}
    )


def several(values: Mapping[str, Sequence[float]], metric: str = "iou") -> Evaluation:
    return evaluation({f"adapter-{name}": row for name, row in values.items()}, metric)


def test_the_interval_of_few_pairs_is_as_wide_as_students() -> None:
    differences = np.random.default_rng(0).normal(0.1, 1, 8)
    got, wanted = paired_interval(list(differences), seed=0), mean_interval(differences)
    assert got.mean == pytest.approx(wanted.mean)
    assert (got.high - got.low) / (wanted.high - wanted.low) == pytest.approx(1, abs=0.1)
    plain = bootstrap(list(differences), 0)
    assert (plain.high - plain.low) / (wanted.high - wanted.low) < 0.85, "the plain percentile interval is too narrow"


def test_the_interval_does_not_depend_on_how_many_resamples_are_drawn_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    differences = [0.1, -0.2, 0.3, 0.05, 0.0]
    before = paired_interval(differences, seed=3)
    monkeypatch.setattr(compared, "_DRAWN_AT_A_TIME", 35)
    assert paired_interval(differences, seed=3) == before


@pytest.mark.parametrize(("metric", "sign"), [("iou", 1), ("condition_error", -1)])
def test_a_ranking_separates_what_is_shown_and_joins_what_is_not(metric: str, sign: int) -> None:
    draw = np.random.default_rng(1)
    base = draw.uniform(0.3, 0.7, 24)
    values = {
        "low": list(base - sign * 0.2 + draw.normal(0, 0.01, 24)),
        "top": list(base + draw.normal(0, 0.03, 24)),
        "near": list(base - sign * 0.002 + draw.normal(0, 0.03, 24)),
    }
    result = compare(several(values, metric), list(values))
    assert set(result.names[:2]) == {"top", "near"} and result.names[2] == "low"
    assert result.groups == [list(result.names[:2]), ["low"]]
    assert [place.rank for place in result.places] == [1, 1, 3]
    assert result.places[0].to_first is None
    last = result.places[2].to_first
    assert last is not None and last.is_shown and math.copysign(1, last.estimate.mean) == -sign
    # The spread between pairs is ten times as large as what the differences keep of it.
    middle = result.places[1].to_first
    assert middle is not None and not middle.is_shown and middle.estimate.high - middle.estimate.low < 0.06
    differences = [a - b for a, b in zip(values[result.names[1]], values[result.names[0]], strict=True)]
    assert middle.needed == pairs_needed(differences, 0.02, 0.05 / 3)
    assert "cannot be told apart, and are ahead of the others" in result.title
    content = result.to_json()
    assert [row["name"] for row in content["ranking"]] == list(result.names)
    assert content["differences_to_first"][metric]["low"]["ci95"] == [last.estimate.low, last.estimate.high]


def test_equal_adapters_are_told_apart_in_at_most_one_comparison_of_twenty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compared, "RESAMPLES", 1000)
    draw, wrong, runs = np.random.default_rng(5), 0, 100
    for _ in range(runs):
        base = draw.uniform(0, 1, 16)
        values = {name: list(base + draw.normal(0, 0.1, 16)) for name in "abcd"}
        result = compare(several(values), list(values))
        wrong += len(result.groups) > 1
    assert wrong / runs <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / runs)


def test_an_adapter_and_its_controls_are_compared_pair_by_pair() -> None:
    columns: Rows = {
        "adapter": [0.5, 0.7, None, 0.9],
        "other_condition": [0.4, 0.5, 0.1, 0.6],
        "no_adapter": [None, None, None, 0.1],
        "target": [1.0] * 4,
    }
    found = control_differences(evaluation(columns))
    assert set(found["iou"]) == {"other_condition"}, "one pair is not enough for an interval"
    difference = found["iou"]["other_condition"]
    assert difference.pairs == 3 and difference.estimate.mean == pytest.approx(0.2)
    assert difference.needed == pairs_needed([0.1, 0.2, 0.3], 0.02)
    color = column_difference(evaluation(columns, "object_color"), "object_color", "adapter", "other_condition")
    assert color is not None and color.least == 1, "colours have another unit"


def test_the_evaluation_of_one_of_several_has_the_plain_columns() -> None:
    rows: Rows = {name: [0.1, 0.2] for name in ("adapter-a", "other_condition-a", "adapter-b", "no_adapter", "target")}
    single = evaluation_of(evaluation(rows), "a")
    assert list(single.values["iou"]) == ["adapter", "other_condition", "no_adapter", "target"]
    assert list(single.pictures) == ["adapter", "other_condition", "no_adapter"]


@pytest.mark.parametrize(
    ("adapters", "names"),
    [
        (["runs/a"], ["a"]),
        (["runs/a", "runs/b"], ["a", "b"]),
        (["/home/me/runs/a/adapter", "/home/me/runs/b/adapter"], ["a", "b"]),
        (["x/final", "y/best"], ["final", "best"]),
        (["me/sdxl-canny", "you/sdxl-canny"], ["me", "you"]),
        (["a/1/x", "a/2/x", "b/1/x"], ["a-1", "a-2", "b-1"]),
        (["runs/a", "runs/a/checkpoint-100"], ["a", "checkpoint-100"]),
        (["ä b", "ä?b"], ["_b-1", "_b-2"]),
        (["."], ["adapter"]),
    ],
)
def test_names_are_the_parts_of_the_paths_that_differ(adapters: list[str], names: list[str]) -> None:
    assert adapter_names(adapters) == names
