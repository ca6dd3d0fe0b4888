"""benchmarks/control_runs.py: the datasets with a fault, what is read from metrics.jsonl, and the table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import control_runs as program
import numpy as np
import pytest
from PIL import Image

from t2i_adapter.data.shapes import write_dataset
from t2i_adapter.flags import parse_train


def interval(mean: float, half: float = 0.01) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def look(step: int, use: float | None, benefit: float, seconds: float) -> dict[str, Any]:
    """A look; after the condition is read, the use is not measured."""
    gain = {"pairs": 16, "on": "held-out", "look": 1, "benefit": interval(benefit), "training_benefit": interval(0.5)}
    found = None if use is None else interval(use)
    return {"step": step, "gain": {**gain, "use": found, "bands": [], "seconds": seconds, "share": seconds / 50}}


def score(step: int, mean: float) -> dict[str, Any]:
    columns = {"adapter": interval(mean), "target": interval(0.9), "difference": interval(mean - 0.2)}
    return {"step": step, "score": {"metric": "condition_f1", "pictures": 4, **columns, "seconds": 1.0}}


ROWS = [
    {"step": 10, "loss": 0.2},
    look(100, 0.02, 0.1, 1.0),
    {"step": 100, "advice": {"kind": "read", "text": "It reads.", "numbers": {}}},
    score(100, 0.3),
    look(400, None, 0.5, 2.0),
    score(400, 0.8),
    {"step": 410, "warning": "slow"},
]


def test_the_looks_of_a_run_are_collected():
    found = program.collect(ROWS)
    assert found["updates"] == 410 and found["read_at"] == 100
    assert [entry["step"] for entry in found["gain"]] == [100, 400]
    assert [entry["adapter"]["mean"] for entry in found["score"]] == [0.3, 0.8]
    assert found["advice"] == [{"step": 100, "kind": "read", "text": "It reads."}] and found["warnings"] == ["slow"]
    assert found["looks_seconds"] == 3.0 and found["share"] == pytest.approx(0.04)


def test_a_run_without_looks_has_an_empty_record():
    found = program.collect([{"step": 3, "loss": 0.1}])
    assert found["gain"] == [] and found["share"] is None and found["read_at"] is None
    assert not program.is_as_expected("read", found)
    assert "| short | 3 | never | not measured |" in program.table({"short": found})


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [(["read"], {"read"}), (["not_read"], {"not_read"}), (["read", "plateau"], {"read", "plateau"}), ([], set())],
)
def test_only_the_expected_statements_count(kinds: list[str], expected: set[str]):
    found = {"advice": [{"kind": kind} for kind in kinds]}
    assert {kind for kind in ("read", "not_read", "plateau") if program.is_as_expected(kind, found)} == expected


@pytest.mark.parametrize(("held_out", "other", "told"), [(-0.4, 0.2, True), (0.5, 0.2, False), (-0.4, 0.05, False)])
def test_another_polarity_is_a_low_benefit_and_no_control(held_out: float, other: float, told: bool):
    found = program.collect([look(50, 0.1, held_out, 1.0)]) | {"metric": "condition_f1"}
    columns = {"adapter": {"mean": 0.2, "ci95": [0.1, 0.3]}, "other_condition": {"mean": other}}
    assert program.is_as_expected("inverted", {**found, "evaluation": {"condition_f1": columns}}) == told


def test_the_table_shows_the_first_and_the_last_look():
    row = program.table({"canny": program.collect(ROWS)}).splitlines()[2]
    assert row.startswith("| canny | 410 | 100 | 0.020 (0.010 to 0.030) | 0.500 (0.490 to 0.510) | 0.300 (")
    assert row.endswith("| 0.600 (0.590 to 0.610) | read (100) | 4.0 % |  |  |")


@pytest.mark.parametrize(
    ("to_first", "rise"),
    [
        ({"early": {"mean": -0.2, "ci95": [-0.3, -0.1]}}, (0.2, [0.1, 0.3])),
        ({"adapter": {"mean": -0.2, "ci95": [-0.3, -0.1]}}, (-0.2, [-0.3, -0.1])),
    ],
)
def test_the_rise_is_the_last_adapter_minus_the_early_one(to_first: dict[str, Any], rise: tuple[float, list[float]]):
    found = program.rise_since_early(to_first, "adapter")
    assert (found["mean"], found["ci95"]) == rise


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data", num=5, split="train", size=32)
    return write_dataset(tmp_path / "data", num=3, split="test", size=32).parent


def conditions(data: Path, split: str) -> list[str]:
    lines = (data / split / "metadata.jsonl").read_text().splitlines()
    return [json.loads(line)[program.CONDITION] for line in lines]


def test_no_row_of_shuffled_pairs_keeps_its_condition(data: Path):
    before = {split: conditions(data, split) for split in ("train", "test")}
    program.shuffle_conditions(data)
    for split, own in before.items():
        now = conditions(data, split)
        assert sorted(now) == sorted(own)
        assert all(one != other for one, other in zip(now, own, strict=True))


def test_only_held_out_conditions_are_inverted(data: Path):
    def pixels() -> dict[str, np.ndarray]:
        return {str(file.relative_to(data)): np.asarray(Image.open(file)) for file in data.glob("*/*.png")}

    before = pixels()
    program.invert_held_out_conditions(data)
    inverted = {f"test/{name}" for name in conditions(data, "test")}
    for name, now in pixels().items():
        assert np.array_equal(now, 255 - before[name] if name in inverted else before[name]), name


@pytest.mark.parametrize("name", program.RUNS)
def test_the_flags_of_each_run_are_known(name: str, tmp_path: Path):
    options = argparse.Namespace(work=tmp_path, steps=40, scenes=8, pairs=8, budget=0.05, threads=1)
    words = program.training_words(program.RUNS[name], tmp_path / "data", tmp_path / "run", options)
    config = parse_train(words[1:], "train").config
    run = program.RUNS[name]
    assert config.train.max_steps == round(40 * run.length) and config.validation.held_out == (run.pairs or 8)
