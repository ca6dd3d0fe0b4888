"""A user's own kind: the documentation's program as it is written, from a file and from an installed package."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.doc_pages import code

from t2i_adapter.annotators.registry import annotate, kinds, open_annotator
from t2i_adapter.cli import main
from t2i_adapter.errors import UserError

ROOT = Path(__file__).parents[2]

PROGRAM = code(ROOT / "docs" / "add-a-condition.md", '"""The picture in a few tones, for adapters that shade."""')


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "tones.py"
    file.write_text(PROGRAM)
    return file


def test_it_has_30_lines_at_most():
    lines = [line for line in PROGRAM.splitlines() if line.strip()]
    assert 20 < len(lines) <= 30 and isinstance(ast.parse(PROGRAM), ast.Module)


def test_it_works_as_the_page_describes(own: Path, picture: Image.Image, tmp_path: Path):
    picture.save(tmp_path / "photo.png")
    assert main(["annotate", f"{own}:Tones,tones=3", str(tmp_path / "photo.png"), "-o", str(tmp_path / "map.png")]) == 0
    values = np.asarray(Image.open(tmp_path / "map.png"))
    grey = np.asarray(picture.convert("L"))
    assert set(np.unique(values)) == {0, 128, 255}
    assert np.array_equal(values == 255, grey > 191) and np.array_equal(values == 0, grey < 64)
    varied = {annotate(open_annotator(f"{own}:Tones,vary=true"), picture, f"row {i}").tobytes() for i in range(4)}
    assert len(varied) > 1
    with pytest.raises(UserError, match="tones=1; allowed is 2 to 64"):
        open_annotator(f"{own}:Tones,tones=1")


def test_an_installed_package_gives_it_a_name(
    own: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """As pip installs it: the module, and beside it the distribution's entry points."""
    about = own.parent / "my_tones-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-tones\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[t2i_adapter.annotators]\ntones = tones:Tones\n")
    assert "tones" not in kinds()
    monkeypatch.syspath_prepend(str(own.parent))
    assert kinds()[-1] == "tones"
    same = open_annotator(f"{own}:Tones,tones=5")
    assert annotate(open_annotator("tones,tones=5"), picture).tobytes() == annotate(same, picture).tobytes()
    assert main(["conditions"]) == 0
    assert "The picture in a few flat tones of grey." in capsys.readouterr().out
