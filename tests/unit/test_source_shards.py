"""Tar and parquet shards: their samples, and an error for each kind of damage."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.object_store import Rows, read_rows, write_parquet_shards, write_tar, write_tar_shards
from support.sources import fault_of, open_at
from support.tiny import write_circles

from t2i_adapter.data.tar_index import split_name
from t2i_adapter.errors import UserError


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    return read_rows(write_circles(tmp_path / "circles", num=4) / "train")


@pytest.fixture
def members(rows: Rows) -> dict[str, bytes]:
    """The members of a shard with one complete sample, "a"."""
    return {"a.png": rows[0]["image"].read_bytes(), "a.cond.png": rows[0]["condition"].read_bytes(), "a.txt": b"circle"}


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.png", ("a", ".png")),
        ("./a.cond.png", ("a", ".cond.png")),
        ("deep/v1.0/a.b.txt", ("deep/v1.0/a", ".b.txt")),
        ("u\u0308.png", ("\u00fc", ".png")),
        ("caf\udce9.png", ("caf\\xe9", ".png")),
        ("README", ("README", "")),
    ],
)
def test_names_split_at_the_base_names_first_dot(name: str, parts: tuple[str, str]) -> None:
    assert split_name(name) == parts


def test_captions_of_txt_and_json_and_other_columns(tmp_path: Path, members: dict[str, bytes]) -> None:
    about = {"text": ["one", "two"], "license": "CC0", "box": [1, 2]}
    picture = members["a.png"]
    more = {
        "b.conditioning_image.png": members["a.cond.png"],
        "b.WEBP": as_webp(picture),
        "b.json": json.dumps(about).encode(),
        "b.unknown": b"left alone",
        "sub/c.image.jpg": picture,
        "sub/c.cond.png": members["a.cond.png"],
        "sub/c.txt": b"",
    }
    place = write_tar(tmp_path / "0.tar", {**members, **more})
    source = open_at(place)
    assert [source.identify(i, "").captions for i in range(3)] == [("circle",), ("one", "two"), ("",)]
    assert [source.key(i) for i in range(3)] == ["0.tar/a", "0.tar/b", "0.tar/sub/c"]
    assert source[1].meta == {"license": "CC0"}
    assert source[1].image.size == source[0].image.size


def as_webp(data: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


@pytest.mark.parametrize("cut", [100, 700, 2200, -9000, -1])
def test_a_truncated_tar_is_named(tmp_path: Path, rows: Rows, cut: int) -> None:
    place = write_tar_shards(tmp_path, rows, shards=1) / "0000.tar"
    with tarfile.open(place) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    place.write_bytes(place.read_bytes()[: cut if cut > 0 else end if cut == -1 else end + cut])
    message = fault_of(place)
    assert message.startswith(f"{place}: truncated")


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "sub/../../a.png", "..\\a.png"])
def test_members_that_lead_out_are_refused(tmp_path: Path, members: dict[str, bytes], name: str) -> None:
    place = write_tar(tmp_path / "0.tar", {**members, name: b"x"})
    assert fault_of(place) == f"{place}: member {name!r} leads out of the archive, which is not allowed."


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    place = tmp_path / "0.tar"
    with tarfile.open(place, "w") as tar:
        member = tarfile.TarInfo("a.png")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    assert "member 'a.png' is a link or a device" in fault_of(place)


def test_duplicate_stems_are_named(tmp_path: Path, members: dict[str, bytes]) -> None:
    place = write_tar(tmp_path / "0.tar", {**members, "a.jpg": members["a.png"]})
    assert f"{place}: sample a has two members for its image, a.png and a.jpg" in fault_of(place)


def test_the_same_stems_in_two_shards_have_keys_of_their_own(tmp_path: Path, members: dict[str, bytes]) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "0.tar", members)
    source = open_at(tmp_path / "{one,two}" / "0.tar")
    assert [source.key(i) for i in range(2)] == [f"{tmp_path}/{folder}/0.tar/a" for folder in ("one", "two")]


@pytest.mark.parametrize(
    ("lacks", "part"),
    [
        ("a.txt", "sample a, its .txt or the text of its .json: there is no caption"),
        ("a.png", "sample a: there is no image: no member ends in .png or .image.png (or .jpg, .webp, ...)"),
        ("a.cond.png", "sample a: there is no condition: no member ends in .cond.png or .conditioning_image.png"),
    ],
)
def test_a_missing_member_is_named_and_counted_and_other_samples_are_read(
    tmp_path: Path, members: dict[str, bytes], lacks: str, part: str
) -> None:
    other = {name.replace("a", "b", 1): data for name, data in members.items()}
    del members[lacks]
    place = write_tar(tmp_path / "0.tar", {**members, **other})
    assert part in fault_of(place)
    assert open_at(place)[1].captions == ("circle",)
    what = {"a.txt": "a caption", "a.png": "an image", "a.cond.png": "a condition"}[lacks]
    assert open_at(place).describe().endswith(f"\n  1 sample without {what} (the first: 0.tar/a)")


@pytest.mark.parametrize(
    ("content", "part"),
    [(b"{oops", "its .json is not JSON"), (b"[1]", "its .json holds list"), (b'"\xff"', "not UTF-8 text")],
)
def test_a_bad_json_member_is_named(tmp_path: Path, members: dict[str, bytes], content: bytes, part: str) -> None:
    del members["a.txt"]
    place = write_tar(tmp_path / "0.tar", {**members, "a.json": content})
    assert f"{place}, sample a: " in fault_of(place) and part in fault_of(place)


def test_a_shard_without_samples_and_damaged_bytes(tmp_path: Path, members: dict[str, bytes]) -> None:
    place = write_tar(tmp_path / "0.tar", {"README": b"x"})
    assert "there are no samples" in fault_of(place)
    place = write_tar(tmp_path / "1.tar", {**members, "a.png": members["a.png"][:60]})
    assert f"{place}, sample a, image: damaged picture" in fault_of(place)


def test_an_index_is_cached_until_the_shard_changes(tmp_path: Path, members: dict[str, bytes]) -> None:
    place, kept = write_tar(tmp_path / "0.tar", members), tmp_path / "kept"
    for count in (1, 1):
        open_at(place, prepared_dir=str(kept))
        assert len(list((kept / "indices").iterdir())) == count
    write_tar(place, {**members, "b.png": members["a.png"]})
    assert len(open_at(place, prepared_dir=str(kept))) == 2


def test_parquet_rows_over_shards_and_row_groups(tmp_path: Path, rows: Rows) -> None:
    many = [{**row, "text": f"{index}"} for index, row in enumerate(rows * 5)]
    source = open_at(write_parquet_shards(tmp_path, many, shards=3, group=3) / "*.parquet")
    assert source.shards == (7, 7, 6)
    expected = [str(number) for shard in range(3) for number in range(shard, 20, 3)]
    assert [source.identify(i, "").captions[0] for i in range(20)] == expected
    assert [source.identify(i, "").captions[0] for i in (19, 0, 7, 13)] == [expected[i] for i in (19, 0, 7, 13)]
    assert source.key(8) == "train-00001-of-00003.parquet, row 1"


def test_captions_are_read_without_their_pictures(tmp_path: Path, rows: Rows) -> None:
    place = write_parquet_shards(tmp_path, rows, shards=1) / "train-00000-of-00001.parquet"
    source = open_at(place)
    column = pq.read_metadata(place).row_group(0).column(0)
    assert column.path_in_schema == "image.bytes"
    with place.open("r+b") as file:  # the first pictures are spoilt, the footer and the captions are not
        file.seek(column.dictionary_page_offset or column.data_page_offset)
        file.write(bytes(column.total_compressed_size))
    assert source.identify(0, "known").captions == (rows[0]["text"],)
    with pytest.raises(UserError, match="or a damaged one"):
        source.identify(0)


def test_a_damaged_parquet_file_and_another_format(tmp_path: Path, rows: Rows) -> None:
    folder = write_parquet_shards(tmp_path / "p", rows)
    shard = folder / "train-00001-of-00002.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    assert fault_of(folder / "*.parquet").startswith(f"{shard}: not a parquet file, or a damaged one: ")
    shard.write_bytes(bytes(len(whole) // 2) + whole[len(whole) // 2 :])
    assert fault_of(folder / "*.parquet", index=3).startswith(f"{shard}: not a parquet file, or a damaged one: ")
    shard.write_bytes(b"")
    assert fault_of(folder / "*.parquet").startswith(f"{shard}: not a parquet file")


def test_wrong_types_and_missing_pictures_in_parquet(tmp_path: Path, rows: Rows) -> None:
    picture = rows[0]["image"].read_bytes()
    columns = {"image": [1, 2], "conditioning_image": [picture, None], "text": ["x", "y"]}
    pq.write_table(pa.table(columns), tmp_path / "numbers.parquet")
    assert "row 0, column image: holds int" in fault_of(tmp_path / "numbers.parquet")
    columns["image"] = [picture, picture]
    pq.write_table(pa.table(columns), tmp_path / "null.parquet")
    assert "row 1, column conditioning_image: there is no picture" in fault_of(tmp_path / "null.parquet", 1)
    elsewhere = [{"bytes": None, "path": str(rows[0]["image"])}, {"bytes": None, "path": None}]
    pq.write_table(pa.table({**columns, "image": elsewhere}), tmp_path / "paths.parquet")
    assert open_at(tmp_path / "paths.parquet", condition="canny").stamp(0) is not None
    assert open_at(tmp_path / "paths.parquet")[0].image.size == (64, 64)
    assert "row 1, column image: there is no picture" in fault_of(tmp_path / "paths.parquet", 1)
    pq.write_table(pa.table({**columns, "text": [None, 3]}), tmp_path / "captions.parquet")
    assert "row 0, column text: there is no caption" in fault_of(tmp_path / "captions.parquet")
    assert "--data.caption_column nope: " in fault_of(tmp_path / "null.parquet", caption_column="nope")


def test_a_shard_that_shrinks_while_it_is_read(tmp_path: Path, rows: Rows) -> None:
    place = write_tar_shards(tmp_path, rows, shards=1) / "0000.tar"
    source = open_at(place)
    with place.open("r+b") as file:
        file.truncate(3000)
    with pytest.raises(UserError, match="is shorter than when it was indexed"):
        source[3]


def test_a_shard_is_read_in_place(tmp_path: Path, rows: Rows) -> None:
    folder, kept = write_tar_shards(tmp_path / "tar", rows), tmp_path / "kept"
    open_at(folder, prepared_dir=str(kept))[0]
    assert sorted(path.name for path in kept.iterdir()) == ["indices"]
    shutil.rmtree(kept)
