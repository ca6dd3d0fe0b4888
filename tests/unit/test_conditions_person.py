"""The person mask on a known figure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2i_adapter.annotators import weights
from t2i_adapter.annotators.registry import annotate, open_annotator
from t2i_adapter.errors import UserError

pytest.importorskip("ai_edge_litert", reason="needs sdxl-t2i-adapter[pose]")
with_weights = pytest.mark.skipif(
    not weights.have("person"), reason=f"the network is not here: {weights.COMMAND} person"
)
ASTRONAUT = Path(__file__).parents[1] / "assets" / "astronaut.jpg"  # NASA, public domain


@with_weights
def test_finds_the_astronaut():
    mask = np.asarray(annotate(open_annotator("person"), Image.open(ASTRONAUT).convert("RGB"))) / 255
    assert set(np.unique(mask)) == {0, 1}
    inside = {"face": (0.24, 0.44), "chest": (0.62, 0.42), "sleeve": (0.70, 0.15)}
    outside = {"sky": (0.10, 0.60), "flag": (0.20, 0.08), "rocket": (0.35, 0.80)}
    for name, (y, x) in {**inside, **outside}.items():
        assert mask[int(y * mask.shape[0]), int(x * mask.shape[1])] == (name in inside), name
    assert 0.3 < mask.mean() < 0.7


@with_weights
@pytest.mark.parametrize(("width", "height"), [(97, 61), (1, 1)])
def test_any_size_and_the_same_each_time(width: int, height: int):
    image = Image.open(ASTRONAUT).convert("RGB").resize((width, height))
    first, second = (annotate(open_annotator("person,threshold=0"), image) for _ in range(2))
    assert first.tobytes() == second.tobytes()


@with_weights
def test_threshold_zero_returns_the_probability():
    image = Image.open(ASTRONAUT).convert("RGB")
    likely = np.asarray(annotate(open_annotator("person,threshold=0"), image))
    assert np.unique(likely).size > 50
    np.testing.assert_array_equal(np.asarray(annotate(open_annotator("person"), image)) > 0, likely >= 128)


def test_faults_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="threshold=1; allowed is 0 up to, but not including, 1"):
        open_annotator("person,threshold=1")
    monkeypatch.setenv(weights.FOLDER, str(tmp_path / "nowhere"))
    from t2i_adapter.annotators.runtime import open_tflite

    open_tflite.cache_clear()
    with pytest.raises(UserError, match="no such file; download it with"):
        annotate(open_annotator("person"), Image.new("RGB", (8, 8)))
