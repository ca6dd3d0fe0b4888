"""`make-data` writes folders that training can read, whole or not at all."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from PIL import Image

from t2i_adapter.cli import main
from t2i_adapter.data import emoji, shapes
from t2i_adapter.verbs import make_data


def shapes_words(out: Path, *more: str) -> list[str]:
    return ["make-data", "shapes", "--out", str(out), "--num", "3", "--num_test", "2", "--size", "32", *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_conditions_are_the_generators() -> None:
    for options, generator in ((make_data.ShapesOptions, shapes), (make_data.EmojiOptions, emoji)):
        assert get_args(get_type_hints(options)["condition"]) == generator.CONDITIONS


def test_shapes_are_written_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "data"
    assert main(shapes_words(out)) == 0
    told = capsys.readouterr().out
    assert "3 pairs" in told and "2 pairs" in told and f"--data {out}" in told
    for split, count in (("train", 3), ("test", 2)):
        rows = [json.loads(line) for line in (out / split / "metadata.jsonl").read_text().splitlines()]
        assert len(rows) == count
        for row in rows:
            assert {"file_name", "conditioning_image_file_name", "text"} <= set(row)
            for column in ("file_name", "conditioning_image_file_name"):
                assert Image.open(out / split / row[column]).size == (32, 32)
    assert sorted(path.name for path in out.parent.iterdir()) == ["data"]  # nothing half-made is left


def test_equal_options_again_do_nothing_and_other_options_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data"
    assert main(shapes_words(out)) == 0
    before = contents(out)
    assert main(shapes_words(out)) == 0
    assert "already holds this dataset" in capsys.readouterr().out
    assert main(shapes_words(out, "--seed", "1")) == 2
    assert "holds another dataset (made with seed 0)" in capsys.readouterr().err
    assert contents(out) == before


def test_seed_and_condition_reach_the_pictures(tmp_path: Path) -> None:
    for name, more in (("a", []), ("b", []), ("c", ["--seed=1"]), ("d", ["--condition=depth"])):
        assert main(shapes_words(tmp_path / name, *more)) == 0
    a, b, c, d = (contents(tmp_path / name) for name in "abcd")
    assert a == b
    assert a["train/00000.png"] != c["train/00000.png"]
    assert a["train/00000.png"] == d["train/00000.png"] and a["train/00000_cond.png"] != d["train/00000_cond.png"]


def test_folders_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    (tmp_path / "empty").mkdir()
    before = contents(tmp_path)
    for out, said in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "full", "is not empty"),
        (tmp_path / "file" / "below", "cannot be made"),
    ):
        assert main(shapes_words(out)) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: --out ") and said in error and error.count("\n") == 1
    assert contents(tmp_path) == before
    assert main(shapes_words(tmp_path / "empty")) == 0  # an empty folder is as good as none


def emoji_package(folder: Path) -> Path:
    """An npm package with 40 icons, so both splits have some."""
    icons = {f"icon-{n}": {"body": f'<circle cx="16" cy="16" r="{4 + n % 10}" fill="#e33"/>'} for n in range(40)}
    data = json.dumps({"icons": icons, "width": 32, "height": 32}).encode()
    with tarfile.open(folder / "package.tgz", "w:gz") as tar:
        member = tarfile.TarInfo("package/icons.json")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    return folder / "package.tgz"


def test_emoji_are_written(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py", reason="the extra [emoji] is not installed")
    words = ["make-data", "emoji", "--out", str(tmp_path / "e"), "--package", str(emoji_package(tmp_path)), "--size=32"]
    assert main([*words, "--condition=canny"]) == 0
    rows = {split: (tmp_path / "e" / split / "metadata.jsonl").read_text().splitlines() for split in ("train", "test")}
    assert len(rows["train"]) + len(rows["test"]) == 40 and 1 <= len(rows["test"]) <= 12


def test_a_damaged_or_missing_package_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.tgz").write_text("not an archive")
    for package in ("bad.tgz", "missing.tgz"):
        words = ["make-data", "emoji", "--out", str(tmp_path / "e"), "--package", str(tmp_path / package)]
        assert main(words) == 2
        assert package in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bad.tgz"]
