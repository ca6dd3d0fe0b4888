"""benchmarks/interference.py: how its arms combine features, whose conditions its cases have, and its table."""

from __future__ import annotations

import interference as benchmark
import pytest
import torch
from diffusers import MultiAdapter, T2IAdapter


def features() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 3, 4, 4), 2 * torch.randn(2, 3, 4, 4)]


def test_the_arms_combine_features_as_they_say() -> None:
    a, b = features()
    assert torch.equal(benchmark.combine([a, b], "sum"), a + b)
    torch.testing.assert_close(benchmark.combine([a, b], "sqrt"), (a + b) / 2**0.5)
    rescaled = benchmark.combine([a, b], "rescaled")
    for sample in range(2):
        assert rescaled[sample].norm() == pytest.approx(float(max(a[sample].norm(), b[sample].norm())), rel=1e-5)
        assert torch.cosine_similarity(rescaled[sample].flatten(), (a + b)[sample].flatten(), 0) == pytest.approx(1)


def test_one_adapter_alone_is_the_same_in_all_arms_and_the_sum_is_that_of_diffusers() -> None:
    torch.manual_seed(0)
    adapters = [T2IAdapter(3, [8, 16, 16, 16], 1, 16, "full_adapter_xl").eval() for _ in range(2)]
    pictures = [torch.rand(1, 3, 64, 64) for _ in range(2)]
    with torch.no_grad():
        alone = adapters[1](pictures[1])
        for arm in benchmark.ARMS:
            for ours, own in zip(benchmark.Combined(adapters, arm)(pictures, [0.0, 1.0]), alone, strict=True):
                torch.testing.assert_close(ours, own)
        both = benchmark.Combined(adapters, "sum")(pictures, [1.0, 1.0])
        for ours, theirs in zip(both, MultiAdapter(adapters)(pictures, [1.0, 1.0]), strict=True):
            torch.testing.assert_close(ours, theirs)
        assert not any(stage.any() for stage in benchmark.Combined(adapters, "sum")(pictures, [0.0, 0.0]))


def test_each_condition_has_its_own_map_in_all_of_its_cases() -> None:
    found = benchmark.cases_of(("outline", "palette"))
    assert len(found) == 2 * len(benchmark.CASES)
    assert found["outline", "alone"] == ("own", None) and found["palette", "alone"] == (None, "own")
    assert found["outline", "same"] == found["palette", "same"] == ("own", "own")
    assert found["outline", "other"] == ("own", "other") and found["palette", "empty"] == ("empty", "own")


def test_the_table_states_means_and_differences_from_alone() -> None:
    interval = {"mean": 0.1, "low": -0.1, "high": 0.3}
    entry = {
        "pair": "outline + palette",
        "condition": "outline",
        "score": "edge F1",
        "more_is_better": True,
        "cases": {case: {**interval, "mean": 0.8} for case in (*benchmark.CASES, "none")},
        "better_than_alone": dict.fromkeys(benchmark.CASES[1:], interval),
    }
    color = {**entry, "condition": "palette", "score": "palette CIEDE2000", "more_is_better": False}
    lines = benchmark.table([{**entry, "arm": "sum"}, {**color, "arm": "sum"}, {**entry, "arm": "joint"}]).splitlines()
    more, less = " | ".join(["0.80 (+0.10 ± 0.20)"] * 3), " | ".join(["0.8 (-0.1 ± 0.2)"] * 3)
    assert lines[2:] == [
        f"| outline (edge F1), with palette | sum | 0.80 | {more} |",
        f"|  | joint | 0.80 | {more} |",
        f"| palette (palette CIEDE2000), with outline | sum | 0.8 | {less} |",
    ]
