"""Datasets read by the `datasets` library: pictures as features, bytes or paths."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from support.hub_server import serve
from support.tiny import write_circles

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.source import Source, open_source
from t2i_adapter.errors import UserError


def open_named(name: object, **options: Any) -> Source:
    return open_source(DataOptions(location=str(name), **options), seed=0)


@pytest.fixture
def circles(tmp_path: Path) -> Path:
    return write_circles(tmp_path / "circles", num=3) / "train"


def columns(circles: Path, as_cell: Any) -> dict[str, list[Any]]:
    """Three rows whose picture cells `as_cell` makes from the files' paths."""
    return {
        "image": [as_cell(circles / f"{i:05d}.png") for i in range(3)],
        "conditioning_image": [as_cell(circles / f"{i:05d}_outline.png") for i in range(3)],
        "text": ["red circle", "blue circle", ""],
    }


def write_parquet(folder: Path, rows: dict[str, list[Any]], features: Features | None = None) -> Path:
    folder.mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


PICTURES = Features({"image": Image(), "conditioning_image": Image(), "text": Value("string")})


def test_every_way_of_storing_a_picture_gives_the_same_pair(circles: Path, tmp_path: Path) -> None:
    expected = open_named(circles)[1]
    cells = columns(circles, lambda p: {"bytes": p.read_bytes(), "path": p.name})
    saved = tmp_path / "saved"
    DatasetDict(train=Dataset.from_dict(cells, features=PICTURES)).save_to_disk(saved)
    names = [
        write_parquet(tmp_path / "decoded", cells, PICTURES),
        write_parquet(tmp_path / "undeclared", cells),
        write_parquet(tmp_path / "bytes", columns(circles, lambda path: path.read_bytes())),
        saved,
    ]
    for name in names:
        sample = open_named(name)[1]
        assert sample.digest == expected.digest, name
        assert sample.image.tobytes() == expected.image.tobytes()
        assert sample.key in ("row 1", "train-00000-of-00001.parquet, row 1")
        assert sample.captions == ("blue circle",)


def test_rows_of_a_parquet_file_may_not_point_elsewhere(circles: Path, tmp_path: Path) -> None:
    linked = write_parquet(tmp_path / "linked", columns(circles, str), PICTURES)
    with pytest.raises(UserError, match=r"row 1, column image: '.*' leaves the data folder"):
        open_named(linked)[1]


def test_paths_are_relative_to_the_data_folder(circles: Path) -> None:
    rows = columns(circles, lambda path: path.name)
    (circles / "metadata.jsonl").unlink()
    Dataset.from_dict(rows).to_csv(circles / "rows.csv")
    for picture in circles.glob("*.png"):
        picture.rename(picture.with_suffix(".PNG_"))  # else `datasets` takes the folder for an image folder
    rows["image"] = [name.replace(".png", ".PNG_") for name in rows["image"]]
    rows["conditioning_image"] = [name.replace(".png", ".PNG_") for name in rows["conditioning_image"]]
    rows["text"][2] = "x"  # csv reads an empty field as null
    Dataset.from_dict(rows).to_csv(circles / "rows.csv")
    source = open_named(circles)
    assert source[0].image.size == (64, 64)
    assert source.describe() == f"3 pairs from {circles}/rows.csv, read as a manifest"


def test_a_null_caption_names_its_row(circles: Path, tmp_path: Path) -> None:
    rows = columns(circles, str)
    rows["text"][1] = None
    folder = write_parquet(tmp_path / "null", rows, PICTURES)
    with pytest.raises(UserError, match=r"00001.parquet, row 1, column text: there is no caption"):
        open_named(folder).identify(1, "known")


def test_wrong_column_type_split_and_column(circles: Path, tmp_path: Path) -> None:
    rows = columns(circles, str)
    rows["image"] = [1, 2, 3]
    folder = write_parquet(tmp_path / "numbers", rows)
    with pytest.raises(UserError, match="row 0, column image: holds int; allowed are pictures, paths or bytes"):
        open_named(folder)[0]
    with pytest.raises(UserError, match="has no split 'test'; there are: train"):
        open_named(folder, split="test")
    with pytest.raises(UserError, match="--data.caption_column nope: .* there are: image, conditioning_image, text"):
        open_named(folder, caption_column="nope")


def test_damaged_bytes_name_row_and_column(circles: Path, tmp_path: Path) -> None:
    rows = columns(circles, lambda path: path.read_bytes())
    rows["conditioning_image"][2] = rows["conditioning_image"][2][:100]
    folder = write_parquet(tmp_path / "damaged", rows)
    with pytest.raises(UserError, match="row 2, column conditioning_image: damaged picture"):
        open_named(folder)[2]


READ = """
from t2i_adapter.config.tree import DataOptions
from t2i_adapter.errors import UserError
from t2i_adapter.data.source import open_source
for name in ("fusing/script", "fusing/folder", "fusing/nothing"):
    try:
        source = open_source(DataOptions(location=name), 0)
        print(source.describe(), source[1].digest)
    except UserError as fault:
        print(fault)
"""


def test_hub_data_sets_as_folder_and_as_loading_script(circles: Path, tmp_path: Path) -> None:
    """Downloads from a hub on loopback. A script is not run: the hub's parquet copy is read instead."""
    script, copy = tmp_path / "script", tmp_path / "copy" / "default"
    script.mkdir()
    (script / "script.py").write_text("raise SystemExit('a data set ran code')")
    copy.mkdir(parents=True)
    write_parquet(copy / "train", columns(circles, lambda path: {"bytes": path.read_bytes(), "path": path.name}))
    repositories = {
        ("fusing/script", "main"): script,
        ("fusing/script", "refs/convert/parquet"): tmp_path / "copy",
        ("fusing/folder", "main"): circles.parent,
    }
    with serve(repositories) as address:
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        run = subprocess.run(
            [sys.executable, "-c", READ], env=environment, capture_output=True, text=True, timeout=120, check=True
        )
    digest = open_named(circles)[1].digest
    as_script, as_folder, absent = run.stdout.splitlines()
    assert as_script == f"3 pairs from fusing/script (split train), read as a dataset {digest}"
    assert as_folder == f"3 pairs from fusing/folder (split train), read as a dataset {digest}"
    assert absent.startswith("dataset fusing/nothing cannot be read: Dataset 'fusing/nothing' doesn't exist")
    assert "fusing/script is a loading script, which is not run" in run.stderr


def test_an_unknown_hub_id_is_one_line() -> None:
    with pytest.raises(UserError, match="dataset nobody/nothing cannot be read") as fault:
        open_named("nobody/nothing")
    assert "\n" not in str(fault.value)


def test_a_folder_without_data_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds 0 pictures, 0 texts, in no layout that training reads") as fault:
        open_named(tmp_path)
    assert "\n" not in str(fault.value)
