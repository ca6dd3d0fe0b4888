"""Parquet shards of unlike columns and types, and folders of them: equal to what `datasets` reads, or one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.sources import fault_of, open_at
from support.tiny import write_circles

from t2i_adapter.data.parquet import ParquetTable
from t2i_adapter.data.shard_files import split_of


@pytest.fixture
def cells(tmp_path: Path) -> dict[str, Any]:
    """A row with pictures as `datasets` stores them."""
    folder = write_circles(tmp_path / "circles", num=1) / "train"
    image, condition = (folder / name for name in ("00000.png", "00000_outline.png"))
    return {
        "image": {"bytes": image.read_bytes(), "path": "a.png"},
        "conditioning_image": {"bytes": condition.read_bytes(), "path": None},
        "text": "x",
    }


def write(folder: Path, **shards: dict[str, Any]) -> Path:
    """Writes one row a shard; "train_0" is train-0.parquet, and "val__0" val/0.parquet."""
    for name, row in shards.items():
        path = folder / f"{name.replace('__', '/').replace('_', '-')}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({column: [cell] for column, cell in row.items()}), path)
    return folder


BOTH = pytest.mark.parametrize("pattern", ["", "*.parquet"], ids=["folder", "glob"])


@BOTH
def test_a_shard_without_a_used_column_is_named_with_the_column(
    tmp_path: Path, cells: dict[str, Any], pattern: str
) -> None:
    other = {"image": cells["image"], "conditioning_image": cells["conditioning_image"], "caption": "x"}
    folder = write(tmp_path / "shards", train_0=cells, train_1=other)
    message = fault_of(folder / pattern)
    assert message.startswith(f"--data.caption_column text: {folder}/train-1.parquet has no such column")
    assert "train-0.parquet has it; the first has: image, conditioning_image, caption." in message
    assert "train-0.parquet has no such column" in fault_of(folder / pattern, caption_column="caption")
    assert len(open_at(folder / pattern, captions="none")) == 2


@BOTH
def test_shards_of_unlike_types_and_unused_columns_are_read(
    tmp_path: Path, cells: dict[str, Any], pattern: str
) -> None:
    plain = {**cells, "image": cells["image"]["bytes"], "text": ["x", "y"], "more": 1}
    large = {**cells, "image": pa.scalar(cells["image"]["bytes"], pa.large_binary()).as_py()}
    folder = write(tmp_path / "shards", train_0=cells, train_1=plain, train_2=large)
    source = open_at(folder / pattern)
    assert [source[i].captions for i in range(3)] == [("x",), ("x", "y"), ("x",)]
    assert len({source[i].digest for i in range(3)}) == 1


@BOTH
def test_a_shard_without_rows_is_counted_and_needs_no_columns(
    tmp_path: Path, cells: dict[str, Any], pattern: str
) -> None:
    folder = write(tmp_path / "shards", train_1=cells)
    pq.write_table(pa.table({"index": pa.array([], pa.int64())}), folder / "train-0.parquet")
    source = open_at(folder / pattern)
    assert [source[i].captions for i in range(len(source))] == [("x",)]
    assert source.describe().endswith("\n  1 shard without rows (the first: train-0.parquet)")


def test_a_column_twice_is_named_if_it_is_used(tmp_path: Path, cells: dict[str, Any]) -> None:
    columns = {name: pa.array([cell]) for name, cell in cells.items()}
    names, arrays = [*columns, "more", "more"], [*columns.values(), pa.array([1]), pa.array([2])]
    pq.write_table(pa.Table.from_arrays(arrays, names=names), tmp_path / "0.parquet")
    assert open_at(tmp_path / "0.parquet")[0].meta == {"more": 1}
    pq.write_table(pa.Table.from_arrays(arrays, names=[*names[:3], "text", "more"]), tmp_path / "0.parquet")
    assert "0.parquet has this column 2 times. Rename the others." in fault_of(tmp_path / "0.parquet")


@pytest.mark.parametrize("as_text", [True, False], ids=["text", "picture without bytes"])
def test_the_stamp_of_a_picture_that_a_later_shard_names_follows_its_file(
    tmp_path: Path, cells: dict[str, Any], as_text: bool
) -> None:
    """The first shard holds its pictures, the second names them."""
    cell = "b.png" if as_text else {"bytes": None, "path": "b.png"}
    named = {**cells, "image": cell, "conditioning_image": cell}
    folder = write(tmp_path / "shards", train_0=cells, train_1=named)
    Image.new("RGB", (64, 64), "red").save(folder / "b.png")
    source = open_at(folder / "*.parquet")
    assert source[1].image.getpixel((0, 0)) == (255, 0, 0)
    stamps = [source.stamp(i) for i in range(2)]
    assert None not in stamps
    os.utime(folder / "b.png", ns=(1, 1))
    assert open_at(folder / "*.parquet").stamp(0) == stamps[0]
    assert open_at(folder / "*.parquet").stamp(1) != stamps[1]


SPLIT_NAMES = {
    "train-0.parquet": "train",
    "data/train-00000-of-00001.parquet": "train",
    "data/small.set-00000-of-00001.parquet": "small.set",
    "small-00000-of-00001.parquet": None,
    "val/0.parquet": "validation",
    "set_dev/0.parquet": "validation",
    "photos-test_3.parquet": "test",
    "TEST.parquet": "test",
    "contest-0.parquet": None,
    "0.parquet": None,
}


@pytest.mark.parametrize("path", SPLIT_NAMES)
def test_the_split_of_a_shard_is_that_of_datasets(path: str, tmp_path: Path, cells: dict[str, Any]) -> None:
    assert split_of(path) == SPLIT_NAMES[path]
    if path != path.lower():
        return  # `datasets` knows small letters only
    place = tmp_path / "set" / path
    place.parent.mkdir(parents=True)
    pq.write_table(pa.table({"text": ["x"]}), place)
    found = datasets.load_dataset(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    assert [str(split) for split in found] == [SPLIT_NAMES[path] or "train"]


def test_a_folder_of_parquet_is_what_datasets_reads(tmp_path: Path, cells: dict[str, Any]) -> None:
    folder = write(tmp_path / "set", train_0=cells, train_1={**cells, "text": "y"}, test_0={**cells, "text": "z"})
    for split, captions in (("train", ["x", "y"]), ("test", ["z"])):
        source = open_at(folder, split=split)
        theirs = datasets.load_dataset(str(folder), split=split, cache_dir=str(tmp_path / "cache"))
        assert list(theirs["text"]) == [source[i].captions[0] for i in range(len(source))] == captions
        assert theirs[0]["image"]["bytes"] == cells["image"]["bytes"]
        assert np.asarray(source[0].image).shape == (64, 64, 3)
    assert fault_of(folder, split="dev").startswith("--data.split dev: ")


def test_a_folder_with_configurations_is_left_to_datasets(tmp_path: Path, cells: dict[str, Any]) -> None:
    folder = write(tmp_path / "set", first__train_0=cells, second__train_0={**cells, "text": "y"})
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("first", "second"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    source = open_at(folder, dataset_config_name="second", cache_dir=str(tmp_path / "cache"))
    assert [source[i].captions for i in range(len(source))] == [("y",)]
    assert "cannot be read" in fault_of(folder, cache_dir=str(tmp_path / "cache"))


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    for name in ("0.parquet", "0.tar"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        assert fault_of(tmp_path / name).endswith(
            "is a pointer of Git LFS, not the file. Download the files: git lfs pull"
        )


def test_a_saved_dataset_is_of_its_own_split_only(tmp_path: Path, cells: dict[str, Any]) -> None:
    rows = datasets.Dataset.from_dict({name: [cell] for name, cell in cells.items()})
    rows.save_to_disk(tmp_path / "saved")
    assert open_at(tmp_path / "saved")[0].captions == ("x",)
    assert "has no split 'test'; there are: train." in fault_of(tmp_path / "saved", split="test")
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"x")
    assert fault_of(tmp_path / "saved").startswith(f"folder {tmp_path}/saved cannot be read: ")


OPEN = """
import sys
from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.source import open_source
from t2i_adapter.errors import UserError
try:
    open_source(DataOptions(location=sys.argv[1], dataset_config_name=sys.argv[2] or None, cache_dir=sys.argv[3]), 0)
except UserError as fault:
    print(fault)
"""


@pytest.mark.parametrize("config", ["", "default"], ids=["read here", "read by datasets"])
def test_nothing_but_the_one_line_is_printed_about_unlike_columns(
    tmp_path: Path, cells: dict[str, Any], config: str
) -> None:
    folder = write(tmp_path / "set", train_0=cells, train_1={**cells, "caption": "x"}, train_2={"caption": "x"})
    words = [sys.executable, "-c", OPEN, str(folder), config, str(tmp_path / "cache")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    assert ("train-2.parquet has no such column" if not config else "its files have unlike columns, ") in done.stdout


def test_parquet_tables_are_not_read_through_datasets(tmp_path: Path, cells: dict[str, Any]) -> None:
    source = open_at(write(tmp_path / "set", train_0=cells))
    assert isinstance(source._rows, ParquetTable)
