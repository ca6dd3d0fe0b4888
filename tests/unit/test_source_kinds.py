"""Every layout: detection, equal pairs in all of them, pickling, chosen and skipped rows, stamps."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.object_store import Rows, read_rows, write_manifest, write_paired, write_parquet_shards, write_tar_shards
from support.sources import fault_of, open_at
from support.tiny import write_circles

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data import emoji, shapes
from t2i_adapter.data.formats import LAYOUTS, detect
from t2i_adapter.data.source import Source

NUM = 6


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_circles(tmp_path / "data", num=NUM)


@pytest.fixture
def rows(data: Path) -> Rows:
    return read_rows(data / "train")


def pairs(source: Source) -> set[tuple[str, tuple[str, ...]]]:
    return {(one.digest, one.captions) for one in (source.identify(i) for i in range(len(source)))}


def manifest_beside(rows: Rows, suffix: str) -> Path:
    names = [{**row, "image": row["image"].name, "condition": row["condition"].name} for row in rows]
    return write_manifest(rows[0]["image"].parent / f"pairs{suffix}", names)


def test_every_layout_gives_the_same_pairs_also_in_another_process(data: Path, rows: Rows, tmp_path: Path) -> None:
    expected = pairs(open_at(data))
    places = {
        "folder": data,
        "paired": write_paired(tmp_path / "paired", rows),
        "manifest": manifest_beside(rows, ".jsonl"),
        "tar": write_tar_shards(tmp_path / "tar", rows),
        "parquet": write_parquet_shards(tmp_path / "parquet", rows) / "*.parquet",
    }
    for kind, place in places.items():
        opened = open_at(place)
        assert opened.describe().endswith(f", read as {LAYOUTS[kind].what}")
        source: Source = pickle.loads(pickle.dumps(opened))
        assert pairs(source) == pairs(opened) == expected, kind
        for index in range(NUM):
            sample, known = source[index], source.identify(index)
            assert (sample.key, sample.captions, sample.digest) == (source.key(index), known.captions, known.digest)
            assert source.identify(index, "given") == type(known)(known.captions, "given")
        assert len({source.key(index) for index in range(NUM)}) == NUM
        assert source.annotate is None


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_manifest_of_paths_absolute_paths_and_file_addresses(
    data: Path, rows: Rows, tmp_path: Path, suffix: str
) -> None:
    expected = pairs(open_at(data))
    assert pairs(open_at(manifest_beside(rows, suffix))) == expected
    assert pairs(open_at(write_manifest(tmp_path / f"absolute{suffix}", rows))) == expected
    named = [{**row, **{part: row[part].as_uri() for part in ("image", "condition")}} for row in rows]
    assert pairs(open_at(write_manifest(tmp_path / f"elsewhere{suffix}", named))) == expected


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_manifests_relative_paths_stay_in_its_folder(rows: Rows, suffix: str) -> None:
    rows[1]["image"] = Path("../secret.png")
    place = write_manifest(rows[0]["image"].parent / f"pairs{suffix}", rows)
    assert "leaves the data folder" in fault_of(place, 1)
    assert fault_of(place, 1).endswith("write the absolute path of a file elsewhere.")


def test_csv_has_empty_captions_and_quoted_breaks_and_names_errors(rows: Rows) -> None:
    rows[0]["text"], rows[1]["text"] = "", 'two\nlines, "quoted"'
    place = manifest_beside(rows, ".csv")
    assert [open_at(place).identify(i).captions for i in (0, 1)] == [("",), ('two\nlines, "quoted"',)]
    place.write_text("image,conditioning_image,text\na,b,c\na,b\n")
    assert f"{place}, line 3: has 2 fields, and the header has 3" in fault_of(place, 1)
    place.write_text("image,text\na,b\n")
    assert "has no such column; there are: image, text. --data.condition canny makes" in fault_of(place)


def test_a_wrong_column_type_is_named(rows: Rows) -> None:
    place = rows[0]["image"].parent / "pairs.jsonl"
    place.write_text(json.dumps({"image": 7, "conditioning_image": "x.png", "text": "x"}) + "\n")
    assert fault_of(place) == f"{place}, line 1, column image: holds int; allowed are pictures, paths or bytes."


def test_paired_folders_name_missing_and_repeated_files(rows: Rows, tmp_path: Path) -> None:
    folder = write_paired(tmp_path / "paired", rows)
    (folder / "images" / "00001.txt").unlink()
    assert f"{folder}/images/00001.png: has no caption: " in fault_of(folder, 1)
    assert open_at(folder)[0].captions == (rows[0]["text"],)
    (folder / "conditions" / "00002.png").unlink()
    assert "00002.png: has no condition: there is no" in fault_of(folder, 2)
    shutil.copy(rows[0]["condition"], folder / "conditions" / "00003.webp")
    assert "00003.png: has several conditions" in fault_of(folder, 3)
    shutil.copy(rows[0]["image"], folder / "images" / "00000.jpg")
    assert "00000.jpg and 00000.png have the same stem" in fault_of(folder)
    shutil.rmtree(folder / "conditions")
    (folder / "images" / "00000.jpg").unlink()
    assert "there are no condition pictures" in fault_of(folder)
    assert open_at(folder, condition="canny")[0].condition is None


def test_the_txt_beside_an_image_is_one_caption(rows: Rows, tmp_path: Path) -> None:
    folder = write_paired(tmp_path / "paired", rows)
    (folder / "images" / "00000.txt").write_text("red, circle\nsecond line\n")
    (folder / "images" / "00001.txt").write_text("")
    source = open_at(folder)
    assert [source.identify(i, "").captions for i in (0, 1)] == [("red, circle\nsecond line",), ("",)]


def test_an_annotator_needs_no_condition_column(data: Path, rows: Rows) -> None:
    metadata = data / "train" / "metadata.jsonl"
    lines = [{"file_name": row["image"].name, "text": row["text"]} for row in rows]
    metadata.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "--data.conditioning_image_column conditioning_image" in fault_of(data)
    source = open_at(data, condition="canny")
    assert source[0].condition is None and source.annotate == "canny"
    assert source.identify(0).digest == source[0].digest


def test_the_layout_is_detected_by_content_then_by_name(data: Path, tmp_path: Path) -> None:
    options = DataOptions(location="x")
    for location, kind in {
        str(data): "folder",
        str(data / "train"): "folder",
        "shapes": "shapes",
        "shapes:5000": "shapes",
        "s3://bucket/{00..12}.tar": "tar",
        "data/*.parquet": "parquet",
        "http://127.0.0.1/pairs.csv": "manifest",
        "pairs.jsonl": "manifest",
        "emoji.tgz": "emoji",
    }.items():
        assert detect(location, options) == (location, kind), location
    assert detect("lambdalabs/pairs", options) == ("lambdalabs/pairs", "hub")
    assert detect("lambdalabs/some.tar", replace(options, streaming=True)) == ("lambdalabs/some.tar", "hub")
    assert "no such folder" in fault_of(tmp_path / "nowhere")
    assert "the layout is unknown" in fault_of("http://127.0.0.1/pairs")
    assert "no such file" in fault_of(tmp_path / "nowhere.jsonl")
    assert "there is no train/metadata.jsonl" in fault_of(tmp_path, kind="folder")
    (tmp_path / "empty").mkdir()
    assert "there are no pictures in it" in fault_of(tmp_path / "empty", kind="paired")


def test_a_split_of_paired_folders(rows: Rows, tmp_path: Path) -> None:
    write_paired(tmp_path / "set" / "test", rows[:2])
    assert len(open_at(tmp_path / "set", split="test")) == 2
    assert "has no split 'train'; there are: test." in fault_of(tmp_path / "set")


def test_a_split_of_shards_in_one_folder(rows: Rows, tmp_path: Path) -> None:
    write_tar_shards(tmp_path / "tar" / "train", rows, shards=3)
    write_tar_shards(tmp_path / "tar" / "test", rows[:1], shards=1)
    assert open_at(tmp_path / "tar").shards == (2, 2, 2)
    assert len(open_at(tmp_path / "tar", split="test")) == 1


def test_skip_takes_keys_with_and_without_a_line_and_reports_unknown_ones(data: Path, tmp_path: Path) -> None:
    skip = tmp_path / "skip.txt"
    skip.write_text("train/00001.png (line 2)\n\ntrain/00004.png\nnobody\n")
    source = open_at(data, skip=str(skip))
    assert [source.key(i) for i in range(len(source))] == [f"train/{i:05d}.png (line {i + 1})" for i in (0, 2, 3, 5)]
    assert source.shards == (4,)
    assert "4 of 6 pairs" in source.describe()
    assert f"; {skip} skips 2 rows and lists 1 keys that no row has, such as 'nobody'" in source.describe()
    chosen = open_at(data, skip=str(skip), max_train_samples=2)
    assert {chosen.key(i) for i in range(2)} <= {source.key(i) for i in range(4)}
    assert "--data.skip nowhere: cannot be read" in fault_of(data, skip="nowhere")
    skip.write_text("".join(f"train/{i:05d}.png\n" for i in range(NUM)))
    assert "skips all 6 rows" in fault_of(data, skip=str(skip))


def test_a_row_that_is_not_json_can_be_skipped(data: Path, tmp_path: Path) -> None:
    metadata = data / "train" / "metadata.jsonl"
    lines = metadata.read_text().splitlines()
    metadata.write_text("\n".join([lines[0], "{oops", *lines[2:]]))
    key = open_at(data).key(1)
    (tmp_path / "skip.txt").write_text(key)
    source = open_at(data, skip=str(tmp_path / "skip.txt"))
    assert [source[i].key for i in range(len(source))] == [f"train/{i:05d}.png (line {i + 1})" for i in (0, 2, 3, 4, 5)]


def test_shards_of_chosen_rows_add_up(rows: Rows, tmp_path: Path) -> None:
    place = write_tar_shards(tmp_path / "tar", rows, shards=3)
    for count in range(1, NUM + 1):
        source = open_at(place, max_train_samples=count)
        assert sum(source.shards) == len(source) == count
        assert 0 not in source.shards


@pytest.mark.parametrize(
    ("background", "rgb"), [("white", (255, 255, 255)), ("#102030", (16, 32, 48)), ("red", (255, 0, 0))]
)
def test_the_background_shows_through(data: Path, background: str, rgb: tuple[int, int, int]) -> None:
    Image.new("RGBA", (64, 64), (9, 9, 9, 0)).save(data / "train" / "00000.png")
    assert open_at(data, background=background)[0].image.getpixel((3, 3)) == rgb


@pytest.mark.parametrize("background", ["nocolor", "#12", "#11223344"])
def test_an_unknown_background_colour(data: Path, background: str) -> None:
    assert fault_of(data, background=background).startswith(f"--data.background {background}: allowed is a colour's")


def test_stamps_follow_the_files_and_not_the_reading(data: Path, rows: Rows, tmp_path: Path) -> None:
    tar = write_tar_shards(tmp_path / "tar", rows)
    parquet = write_parquet_shards(tmp_path / "parquet", rows)
    cases = [
        (data, rows[0]["condition"]),
        (tar, tar / "0000.tar"),
        (parquet / "*.parquet", parquet / "train-00000-of-00002.parquet"),
    ]
    for place, changed in cases:
        first, again = open_at(place), open_at(place)
        first[0]
        stamps = [first.stamp(i) for i in range(NUM)]
        assert None not in stamps and len(set(stamps)) == NUM
        assert [again.stamp(i) for i in range(NUM)] == stamps
        changed.write_bytes(changed.read_bytes())
        assert open_at(place).stamp(0) != stamps[0]


def test_shapes_are_those_of_make_data(tmp_path: Path) -> None:
    shapes.write_dataset(tmp_path / "written", num=3, size=64)
    written, drawn = open_at(tmp_path / "written"), open_at("shapes:3", resolution=64)
    for index in range(3):
        a, b = written[index], drawn[index]
        assert a.condition is not None and b.condition is not None
        assert (a.image.tobytes(), a.condition.tobytes()) == (b.image.tobytes(), b.condition.tobytes())
        assert (a.captions, a.meta) == (b.captions, b.meta)
        assert drawn.identify(index).digest == b.digest
    assert len(open_at("shapes")) == 2000
    assert open_at("shapes:3", resolution=64, split="test")[0].captions != drawn[0].captions
    assert "allowed is shapes, or for example shapes:5000" in fault_of("shapes:many")
    assert "unknown split 'other'" in fault_of("shapes", split="other")


def test_a_rendered_pairs_digest_depends_on_what_determines_its_pixels() -> None:
    digests = [
        open_at("shapes:3", **options)[0].digest
        for options in ({"resolution": 64}, {"resolution": 32}, {"resolution": 64, "condition": "depth"})
    ]
    assert len(set(digests)) == 3
    annotated = open_at("shapes:3", resolution=64, condition="grey")
    assert (annotated.annotate, annotated[0].condition) == ("grey", None)
    assert open_at("shapes:3", resolution=64, condition="canny").annotate is None  # of its own making


def emoji_package(path: Path, **files: Any) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}.json")
            data = json.dumps(content).encode()
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_emoji_are_rendered_from_their_package(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py", reason="the extra [emoji] is not installed")
    disc = {"body": '<circle cx="16" cy="16" r="12" fill="#f00"/>'}
    icons = {"height": 32, "icons": {f"thing-{i}": disc for i in range(20)}}
    categories = {"categories": {"Food & Drink": [f"thing-{i}" for i in range(20)]}}
    package = emoji_package(tmp_path / "icons.tgz", icons=icons, metadata=categories)
    source = open_at(package, resolution=48, background="blue")
    sample = source[0]
    name = sample.key
    words = name.replace("-", " ")
    assert sample.captions == (
        f"flat emoji of a {words} on a blue background",
        words,
        f"{words}, food and drink, flat emoji",
    )
    assert (sample.image.getpixel((24, 24)), sample.image.getpixel((0, 0))) == ((255, 0, 0), (0, 0, 255))
    assert sample.condition is not None
    lines = np.asarray(sample.condition)
    assert sample.condition.size == (48, 48) and 0 < (lines > 0).mean() < 0.2
    splits = [open_at(package, split=split) for split in emoji.SPLITS]
    keys = [{split.key(i) for i in range(len(split))} for split in splits]
    assert keys[0] | keys[1] == set(icons["icons"]) and not keys[0] & keys[1]
    assert open_at(package, condition="canny", resolution=48)[0].condition is None
    hexed = open_at(package, resolution=48, background="#00ff00")[0].captions[0]
    assert hexed == f"flat emoji of a {words}"
    assert "has no split 'dev'" in fault_of(package, split="dev")


def test_the_sample_of_emoji_in_the_assets_is_whole() -> None:
    assets = Path(__file__).resolve().parents[1] / "assets" / "emoji"
    train, test = open_at(assets), open_at(assets, split="test")
    assert (len(train), len(test)) == (56, 8)
    for source in (train, test):
        for index in range(0, len(source), 7):
            sample = source[index]
            assert sample.condition is not None
            assert sample.image.size == sample.condition.size == (256, 256)
    assert "MIT License" in (assets / "LICENSE").read_text()


def test_a_manifest_holds_no_python_object_per_row(tmp_path: Path) -> None:
    count = 100_000
    line = '{{"image": "{0:06d}.png", "conditioning_image": "c{0:06d}.png", "text": "a picture of thing {0}"}}\n'
    (tmp_path / "pairs.jsonl").write_text("".join(line.format(number) for number in range(count)))
    source = open_at(tmp_path / "pairs.jsonl")
    assert len(source) == count
    assert source.identify(count - 1, "known").captions == (f"a picture of thing {count - 1}",)
    # 24 bytes for where its line lies; a dict of three strings would take some 500
    assert len(pickle.dumps(source)) < 30 * count
