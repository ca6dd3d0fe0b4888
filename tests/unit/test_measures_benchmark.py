"""benchmarks/measures.py: the damages are what their names say, and the page shows the newest result."""

from __future__ import annotations

from pathlib import Path

import measures as program
import numpy as np
from PIL import Image

PAGE = Path(__file__).parents[2] / "docs" / "evaluate.md"


def test_the_page_shows_the_tables_of_the_newest_result() -> None:
    assert program.newest_tables() in PAGE.read_text(encoding="utf-8"), (
        "python benchmarks/measures.py --table prints it"
    )


def test_a_shift_moves_every_column_to_the_right() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    moved = np.asarray(program.shift(2)(picture, np.random.default_rng(0)))
    assert np.array_equal(moved[:, 2:], np.asarray(picture)[:, :-2])
    assert np.array_equal(moved[:, 0], np.asarray(picture)[:, 0]) and moved.shape == (8, 8, 3)


def test_only_significant_disorder_is_an_exception() -> None:
    quality = {column: [1.0, 0.9, 0.8, 0.95] for column in program.COLUMNS}
    assert program.exceptions("iou", quality) == []
    noisy = {**quality, "shift 2": [1.1, 0.85, 0.85, 0.9]}
    assert program.exceptions("iou", noisy) == [], "a difference within its interval"
    better = {**quality, "shift 1": [0.5, 0.4, 0.3, 0.45]}
    assert program.exceptions("iou", better) == ["shift 2 better than shift 1", "shift 1 worse than shuffled"]
    assert program.exceptions("canny: condition_error", better) == ["shift 1 better than itself"]
