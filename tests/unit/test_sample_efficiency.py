"""benchmarks/sample_efficiency.py: the options of every arm are valid, and the table shows what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sample_efficiency as program


def points(*ious: float) -> list[dict[str, Any]]:
    return [
        {"samples": 128 * (n + 1), "updates": 8 * (n + 1), "cpu_s": 2.0 * (n + 1), "error": 1 - iou, "iou": [iou, iou]}
        for n, iou in enumerate(ious)
    ]


def test_every_arm_differs_from_the_recipe_by_allowed_options(tmp_path: Path):
    made = {
        name: (program.arm_config(changes, tmp_path, tmp_path, 3), changes.get(program.FIRST))
        for name, changes in program.ARMS.items()
    }
    assert made["chosen"][0].train.seed == 3 and made["chosen"][1] is None
    assert len(set(map(repr, made.values()))) == len(made), "two arms have equal options"


def test_a_crossing_lies_on_the_line_between_two_measurements():
    curve = points(0.6, 0.7, 0.9)
    assert program.crossing(curve, 0.8, "samples") == pytest.approx(128 * 2.5)
    assert program.crossing(curve, 0.8, "cpu_s") == pytest.approx(5.0)
    assert program.crossing(curve, 0.95, "samples") is None
    assert program.crossing(points(0.7, 0.9, 0.6, 0.9), 0.8, "samples") == pytest.approx(192), "the first time"
    assert program.crossing(points(0.85), 0.8, "samples") == 128, "by the first measurement"


def test_the_table_shows_the_numbers_of_each_seed_and_what_was_not_measured():
    runs = [
        {"set": "circles", "arm": "chosen", "seed": 0, "iou": True, "points": points(0.7, 0.9)},
        {"set": "circles", "arm": "chosen", "seed": 1, "iou": True, "points": points(0.5, 0.6)},
        {"set": "circles", "arm": "before", "seed": 0, "iou": False, "points": points(0.1, 0.2)},
    ]
    chosen, before = program.table(runs).splitlines()[2:]
    assert "| 192, not in 256 (256, not in 256) | 3, not in 4 (4, not in 4) | 0.75 (" in chosen
    assert "0.25 (0.10 to 0.40)" in chosen
    assert before.count("not measured") == 3 and " -, 0.90, 0.80 " in before
