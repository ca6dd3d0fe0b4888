"""How a person names an annotator, and what becomes of it in a cut sample."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from t2i_adapter.annotators.edges import Canny
from t2i_adapter.annotators.registry import TABLE, annotate, find_plugin, open_annotator
from t2i_adapter.data.geometry import Framing
from t2i_adapter.data.pair import PairTransform
from t2i_adapter.errors import UserError
from t2i_adapter.types import ImageRecord, Sample

LOCAL = [name for name in TABLE if not find_plugin(name).facts.weights and not find_plugin(name).facts.needs]


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Coloured discs on a gradient, RGB; size is (height, width)."""
    height, width = size
    canvas = np.zeros((height, width, 3), np.uint8)
    canvas[..., 0] = np.linspace(0, 120, width, dtype=np.uint8)
    generator = np.random.default_rng(seed)
    for _ in range(4):
        centre, color = (
            (int(generator.integers(width)), int(generator.integers(height))),
            generator.integers(80, 256, 3),
        )
        cv2.circle(canvas, centre, min(size) // 4, color.tolist(), -1)
    return Image.fromarray(canvas)


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_row_makes_the_condition_of_the_cut_image(name: str, channels: int) -> None:
    sample = Sample("row", picture((90, 130)), None, ("",), "d")
    framing = Framing(64, "generated", 32, crop="random", flip=True, views=3)
    annotator = open_annotator(name)
    for view in range(3):
        part = PairTransform(framing, channels, annotator=annotator).crop(sample, view)
        seen = Image.fromarray(part.image.transpose(1, 2, 0))
        expected = np.asarray(annotate(annotator, seen).convert("L" if channels == 1 else "RGB"))
        assert part.condition.shape == (channels, *part.geometry.target)
        assert np.array_equal(part.condition.transpose(1, 2, 0).squeeze(), expected)


def test_what_is_drawn_by_chance_is_a_function_of_the_draw() -> None:
    values = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    image = Image.fromarray(values).resize((390, 270))  # gradients around the thresholds
    annotator = open_annotator("canny,vary=1")
    maps = {np.asarray(annotate(annotator, image, draw)).tobytes() for draw in ("5/0", "5/1", "6/0", "6/1")}
    assert len(maps) == 4
    assert np.asarray(annotate(annotator, image, "5/0")).tobytes() in maps


@pytest.mark.parametrize(
    ("spec", "chance"),
    [
        ("canny", False),
        ("canny,vary=0.5", True),
        ("sketch", False),
        ("sketch,random_threshold=true", True),
        ("normal", False),
        ("lineart", False),
    ],
)
def test_a_kind_tells_whether_its_options_leave_anything_to_chance(spec: str, chance: bool) -> None:
    annotator = open_annotator(spec)
    assert annotator.chance is chance
    assert pickle.loads(pickle.dumps(annotator)).chance is chance


def test_a_cut_keeps_the_image_where_the_condition_is_left_to_chance() -> None:
    sample = Sample("row", picture((90, 130)), None, ("",), "d")
    part = PairTransform(Framing(64, flip=True, views=2), 1, annotator=open_annotator("canny,vary=1")).crop(sample, 1)
    assert part.geometry.flipped
    assert np.array_equal(part.condition, part.image)
    seen = Image.fromarray(part.image.transpose(1, 2, 0))
    for channels in (1, 3):
        transform = PairTransform(Framing(64), channels, annotator=open_annotator("canny,vary=1"))
        stored = ImageRecord(None, part.condition, part.geometry)
        drawn = transform.random_condition(stored, "5/17").condition
        expected = np.asarray(annotate(open_annotator("canny,vary=1"), seen, "5/17"))
        assert drawn.shape == (channels, 64, 64) and all(np.array_equal(plane, expected) for plane in drawn)


def test_a_fingerprint_is_the_same_each_time_and_another_for_each_change(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = open_annotator("canny").fingerprint
    assert open_annotator(" canny , low = 100 ").fingerprint == plain
    changed = {open_annotator(spec).fingerprint for spec in ("canny,low=50", "canny,high=300", "grey")}
    monkeypatch.setattr(Canny, "facts", replace(Canny.facts, version=Canny.facts.version + 1))
    changed.add(open_annotator("canny").fingerprint)
    assert len(changed | {plain}) == 5


OWN = '''
from __future__ import annotations
from dataclasses import dataclass
from PIL import ImageOps
from t2i_adapter.annotators.registry import Facts

@dataclass(frozen=True)
class Inverse:
    """The image's negative.

    `shrink`: returns too small a picture.
    """

    facts = Facts(channels=3)
    shrink: bool = False

    def __call__(self, image, rng):
        return ImageOps.invert(image.resize((8, 8)) if self.shrink else image)
'''


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "inverse_of_mine.py"
    file.write_text(OWN)
    return file


def is_inverse(spec: str) -> bool:
    image = picture((40, 40))
    return np.array_equal(np.asarray(annotate(open_annotator(spec), image)), 255 - np.asarray(image))


def test_an_annotator_from_a_file_is_known_by_its_content(own: Path, tmp_path: Path) -> None:
    spec = f"{own}:Inverse"
    assert is_inverse(spec)
    assert annotate(pickle.loads(pickle.dumps(open_annotator(spec))), picture((9, 9))).size == (9, 9)
    moved = tmp_path / "elsewhere.py"
    moved.write_text(OWN)
    assert open_annotator(f"{moved}:Inverse").fingerprint == open_annotator(spec).fingerprint
    moved.write_text(OWN + "# edited\n")
    assert open_annotator(f"{moved}:Inverse").fingerprint != open_annotator(spec).fingerprint


def test_an_annotator_from_a_module_or_an_entry_point(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    assert is_inverse(f"{own.stem}:Inverse")
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[t2i_adapter.annotators]\ninverse = {own.stem}:Inverse\n")
    assert is_inverse("inverse")
    with pytest.raises(UserError, match="no such annotator; there are: canny, .*, inverse. Name your own"):
        open_annotator("nothing")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cany", "condition cany: no such annotator; there are: canny, "),
        ("canny,hihg=3", "there is no option 'hihg'; there are: low, high"),
        ("grey,low=3", "there is no option 'low'; there are: none"),
        ("canny,low=much", "canny: low=much: allowed is a number"),
        ("canny,low=300", "canny: low=300, high=200; needed is 0 <= low <= high"),
        ("not_a_module:Class", "not_a_module cannot be imported: No module named"),
        ("t2i_adapter.annotators.edges:Cany", "t2i_adapter.annotators.edges has no class Cany"),
        ("nowhere.py:Class", "nowhere.py: no such file"),
        ("pathlib:Path", "Path must be a dataclass with a line `facts = Facts(...)`"),
    ],
)
def test_what_is_wrong_with_a_name_is_said(spec: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        open_annotator(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_condition_of_another_size_is_refused(own: Path) -> None:
    with pytest.raises(UserError, match="returned RGB, 8x8, for an image of 40x40; needed is RGB of the image's size"):
        annotate(open_annotator(f"{own}:Inverse,shrink=true"), picture((40, 40)))


def test_a_grey_condition_in_three_channels_is_one_in_memory() -> None:
    image = picture((90, 130))
    own = PairTransform(Framing(64), 3).crop(Sample("row", image, image.convert("L"), ("",), "d"), 0).condition
    made = (
        PairTransform(Framing(64), 3, annotator=open_annotator("canny"))
        .crop(Sample("row", image, None, ("",), "d"), 0)
        .condition
    )
    for condition in (own, made):
        assert condition.shape == (3, 64, 64)
        assert condition.strides[0] == 0
    in_colour = (
        PairTransform(Framing(64), 3)
        .crop(Sample("row", image, image.convert("L").convert("RGB"), ("",), "d"), 0)
        .condition
    )
    assert np.array_equal(own, in_colour)
