"""Every kind of dataset with every fault that people's files have: the pairs are read, or one line says why not.

FAULTS makes samples, each of an image, a condition and a caption. KINDS writes them in a layout.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.object_store import write_tar

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.source import open_source
from t2i_adapter.errors import UserError


class Pair(NamedTuple):
    """A sample: its stem, the ending and format of both pictures, and its caption; None if that is missing.

    `stored` is the stem of its image's file if that differs from the name in the row.
    """

    stem: str
    ending: str = ".png"
    kind: str = "PNG"
    caption: str | None = "x"
    has_condition: bool = True
    stored: str = ""


def picture(kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, kind)
    return buffer.getvalue()


LITTER = ("._a.png", ".DS_Store", "Thumbs.db", "__MACOSX/._a.png")
COMPOSED, DECOMPOSED = (unicodedata.normalize("NFC", "M\u00fcller"), unicodedata.normalize("NFD", "M\u00fcller"))
FAULTS: dict[str, list[Pair]] = {
    "none": [Pair("a"), Pair("b"), Pair("c")],
    "capitals": [Pair("IMG_1", ".PNG"), Pair("IMG_2", ".JPG", "JPEG"), Pair("img_3", ".Jpeg", "JPEG")],
    "formats": [Pair("a", ".avif", "AVIF"), Pair("b", ".bmp", "BMP"), Pair("c", ".tif", "TIFF")],
    "Unicode forms": [Pair("a"), Pair("b"), Pair(COMPOSED, stored=DECOMPOSED)],
    "dots": [Pair("a.v1"), Pair("a.v2"), Pair("b.0.5")],
    "litter": [Pair("a"), Pair("b"), Pair("c")],
    "no condition": [Pair("a"), Pair("b", has_condition=False), Pair("c")],
    "no caption": [Pair("a"), Pair("b", caption=None), Pair("c")],
    "nothing": [],
}


def write_files(folder: Path, pairs: list[Pair], *, apart: bool = False) -> None:
    """Writes STEM.png and STEM_cond.png; apart: images/STEM.png, conditions/STEM.png and images/STEM.txt."""
    images, conditions = (folder / "images", folder / "conditions") if apart else (folder, folder)
    for place in (images, conditions):
        place.mkdir(parents=True, exist_ok=True)
    for pair in pairs:
        (images / f"{pair.stored or pair.stem}{pair.ending}").write_bytes(picture(pair.kind))
        if pair.has_condition:
            name = f"{pair.stem}{pair.ending}" if apart else f"{pair.stored or pair.stem}_cond{pair.ending}"
            (conditions / name).write_bytes(picture(pair.kind))
        if apart and pair.caption is not None:
            (images / f"{pair.stem}.txt").write_text(pair.caption)


def rows_of(pairs: list[Pair]) -> list[dict[str, Any]]:
    return [
        {
            "image": f"{pair.stem}{pair.ending}",
            "conditioning_image": f"{pair.stem}_cond{pair.ending}" if pair.has_condition else None,
            "text": pair.caption,
        }
        for pair in pairs
    ]


def to_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["image", "conditioning_image", "text"], delimiter=";")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_table(folder: Path, pairs: list[Pair], name: str, content: Callable[[list[dict[str, Any]]], str]) -> Path:
    write_files(folder, pairs)
    (folder / name).write_text(content(rows_of(pairs)))
    return folder if name.startswith("metadata") else folder / name


def to_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_paths(folder: Path, pairs: list[Pair]) -> Path:
    write_files(folder, pairs)
    types = pa.schema([(name, pa.string()) for name in ("image", "conditioning_image", "text")])
    pq.write_table(pa.Table.from_pylist(rows_of(pairs), types), folder / "pairs.parquet")
    return folder / "pairs.parquet"


def bytes_table(pairs: list[Pair]) -> pa.Table:
    stored = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [
        {
            "image": {"bytes": picture(pair.kind), "path": f"{pair.stem}{pair.ending}"},
            "conditioning_image": {"bytes": picture(pair.kind), "path": None} if pair.has_condition else None,
            "text": pair.caption,
        }
        for pair in pairs
    ]
    types = pa.schema([("image", stored), ("conditioning_image", stored), ("text", pa.string())])
    return pa.Table.from_pylist(cells, types)


def write_parquet(folder: Path, pairs: list[Pair]) -> Path:
    folder.mkdir(parents=True)
    pq.write_table(bytes_table(pairs), folder / "train-0.parquet")
    return folder


def write_saved(folder: Path, pairs: list[Pair]) -> Path:
    from datasets import Dataset

    Dataset(bytes_table(pairs)).save_to_disk(folder)
    return folder


def write_shard(folder: Path, pairs: list[Pair]) -> Path:
    folder.mkdir(parents=True)
    members: dict[str, bytes] = {}
    for pair in pairs:
        members[f"{pair.stored or pair.stem}{pair.ending}"] = picture(pair.kind)
        if pair.has_condition:
            members[f"{pair.stem}.cond{pair.ending}"] = picture(pair.kind)
        if pair.caption is not None:
            members[f"{pair.stem}.txt"] = pair.caption.encode()
    write_tar(folder / "0.tar", members)
    return folder


def write_paired(folder: Path, pairs: list[Pair]) -> Path:
    write_files(folder, pairs, apart=True)
    return folder


KINDS: dict[str, Callable[[Path, list[Pair]], Path]] = {
    "image folder": lambda folder, pairs: write_table(folder, pairs, "metadata.jsonl", to_lines),
    "image folder, csv": lambda folder, pairs: write_table(folder, pairs, "metadata.csv", to_csv),
    "paired folders": write_paired,
    "json lines": lambda folder, pairs: write_table(folder, pairs, "pairs.jsonl", to_lines),
    "json array": lambda folder, pairs: write_table(folder, pairs, "pairs.json", json.dumps),
    "csv": lambda folder, pairs: write_table(folder, pairs, "pairs.csv", to_csv),
    "parquet of paths": write_paths,
    "parquet": write_parquet,
    "saved dataset": write_saved,
    "tar": write_shard,
}
NO_CONDITION = {"tar": "there is no condition", "paired folders": "no condition"}
NO_CAPTION = {"paired folders": "no caption"}
NOTHING = {"tar": "there are no samples", "paired folders": "there are no pictures"}


def result_of(place: Path) -> tuple[list[str], list[str], str]:
    """Captions of the pairs that are read, messages of the others, and the text for the plan."""
    source = open_source(DataOptions(location=str(place)), seed=0)
    captions, faults = [], []
    for index in range(len(source)):
        try:
            captions.append(source[index].captions[0])
        except UserError as fault:
            assert "\n" not in str(fault)
            faults.append(str(fault))
    assert len({source.key(index) for index in range(len(source))}) == len(source)
    return captions, faults, source.describe()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_pair_is_read_or_named(tmp_path: Path, kind: str, fault: str) -> None:
    place = KINDS[kind](tmp_path / "set", FAULTS[fault])
    if fault == "nothing":
        with pytest.raises(UserError, match=NOTHING.get(kind, "there are no rows")):
            result_of(place)
        return
    if fault == "litter":
        add_litter(tmp_path / "set", kind)
    captions, faults, text = result_of(place)
    if fault == "no condition":
        assert (len(captions), len(faults)) == (2, 1)
        assert NO_CONDITION.get(kind, "column conditioning_image: there is no picture") in faults[0]
    elif fault == "no caption" and "csv" in kind:
        assert captions == ["x", "", "x"], "an empty cell is the empty caption"
    elif fault == "no caption":
        assert (len(captions), len(faults)) == (2, 1)
        assert NO_CAPTION.get(kind, "there is no caption") in faults[0]
    else:
        assert (captions, faults) == (["x"] * 3, [])
    if kind == "tar":
        part = fault.removeprefix("no ") if fault.startswith("no ") else ""
        assert (f"1 sample without a {part} (the first: 0.tar/b)" in text) == bool(part)
        assert ("4 files of a system or hidden, such as ._a.png: skipped" in text) == (fault == "litter")


def add_litter(folder: Path, kind: str) -> None:
    """Puts files of systems beside the pictures, and in a shard."""
    if kind == "tar":
        pairs = FAULTS["litter"]
        members = {f"{pair.stem}{end}": picture() for pair in pairs for end in (".png", ".cond.png")}
        texts = {f"{pair.stem}.txt": b"x" for pair in pairs}
        write_tar(folder / "0.tar", {**members, **texts, **dict.fromkeys(LITTER, b"x")})
        (folder / "._0.tar").write_bytes(b"x")
        return
    for top in (folder, folder / "images", folder / "conditions"):
        for name in LITTER if top.is_dir() else ():
            (top / name).parent.mkdir(exist_ok=True)
            (top / name).write_bytes(b"x")
    if kind == "parquet":
        (folder / "._train-0.parquet").write_bytes(b"x")


JOINED = {
    "json lines": (6, 0, ""),
    "json array": (0, 0, "text follows the array"),
    "csv": (6, 1, "column image: "),
    "tar": (0, 0, "archives 1 and 2 of those that are joined in this file both have a sample a"),
}
"""Kind -> pairs that are read of a file that is joined with itself, rows that are not, and the message."""


@pytest.mark.parametrize("kind", JOINED)
def test_a_file_joined_with_itself_is_read_whole_or_named(tmp_path: Path, kind: str) -> None:
    place = KINDS[kind](tmp_path / "set", FAULTS["none"])
    file = place / "0.tar" if kind == "tar" else place
    file.write_bytes(file.read_bytes() * 2)
    num_read, num_faults, message = JOINED[kind]
    if not num_read:
        with pytest.raises(UserError) as fault:
            result_of(place)
        assert message in str(fault.value)
        return
    captions, faults, _ = result_of(place)
    assert (len(captions), len(faults)) == (num_read, num_faults)
    assert all(message in text for text in faults)


@pytest.mark.parametrize("kind", ["parquet", "tar", "paired folders"])
def test_a_link_to_the_folder_itself_adds_no_pairs(tmp_path: Path, kind: str) -> None:
    folder = KINDS[kind](tmp_path / "set", FAULTS["none"])
    (folder / ("images" if kind == "paired folders" else "") / "again").symlink_to(folder, target_is_directory=True)
    assert result_of(folder)[0] == ["x"] * 3


def test_a_stem_with_two_pictures_is_named_where_stems_make_pairs(tmp_path: Path) -> None:
    """In a table they are two pictures."""
    pairs = [Pair("a"), Pair("a", ".jpg", "JPEG")]
    assert result_of(KINDS["csv"](tmp_path / "csv", pairs))[0] == ["x", "x"]
    for kind, message in (("tar", "sample a has two members for its image"), ("paired folders", "have the same stem")):
        with pytest.raises(UserError, match=message):
            result_of(KINDS[kind](tmp_path / kind, pairs))
    shutil.rmtree(tmp_path / "csv")
