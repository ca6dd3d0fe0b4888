"""Tar shards as people make them: names, endings, litter, joined and compressed archives. Each sample is paired, or one
line says why it is not."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import shutil
import subprocess
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.object_store import write_tar

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.names import PICTURE_ENDINGS
from t2i_adapter.data.picture import FORMATS
from t2i_adapter.data.source import Source, open_source
from t2i_adapter.errors import UserError


def picture(color: str = "red", kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(buffer, kind)
    return buffer.getvalue()


def sample(stem: str, caption: str = "") -> dict[str, bytes]:
    return {
        f"{stem}.png": picture(),
        f"{stem}.cond.png": picture("black"),
        f"{stem}.txt": (caption or stem).encode("utf-8", "replace"),
    }


def open_at(place: object, **options: Any) -> Source:
    return open_source(DataOptions(location=str(place), kind="tar", **options), seed=0)


def fault_of(place: object, **options: Any) -> str:
    with pytest.raises(UserError) as fault:
        open_at(place, **options)
    assert "\n" not in str(fault.value)
    return str(fault.value)


def read(source: Source) -> list[tuple[str, str]]:
    """(stem, caption) of all samples, each decoded."""
    return [(one.key.partition("/")[2], one.captions[0]) for one in (source[i] for i in range(len(source)))]


COMPOSED, DECOMPOSED = "M\u00fcller", unicodedata.normalize("NFD", "M\u00fcller")
MEMBERS: dict[str, tuple[dict[str, bytes], list[str], str]] = {
    "endings in capitals": (
        {"IMG.JPG": picture(kind="JPEG"), "IMG.COND.PNG": picture(), "IMG.TXT": b"x"},
        ["IMG"],
        "",
    ),
    "Unicode forms": (
        {
            f"{COMPOSED}.png": picture(),
            f"{DECOMPOSED}.cond.png": picture(),
            f"{DECOMPOSED}.txt": b"x",
        },
        [COMPOSED],
        "",
    ),
    "bytes that are not UTF-8": (sample("caf\udce9"), ["caf\\xe9"], ""),
    "system litter": (
        {
            **sample("a"),
            **dict.fromkeys(("._a.png", "__MACOSX/._a.png", ".DS_Store", "PaxHeaders.3/a.png", "Thumbs.db"), b"x"),
        },
        ["a"],
        "5 files of a system or hidden, such as ._a.png: skipped",
    ),
    "dots in all stems": ({**sample("a.v1"), **sample("a.v2"), **sample("b.v2")}, ["a.v1", "a.v2", "b.v2"], ""),
    "dots in some stems": ({**sample("a"), **sample("a.v2")}, ["a", "a.v2"], ""),
    "numbers as stems": ({**sample("x_0.5"), **sample("x_0.25")}, ["x_0.5", "x_0.25"], ""),
    "other pictures of a sample": (
        {**sample("a"), **sample("b"), "a.canny.png": picture(), "b.canny.png": picture(), "a.meta.json": b"{}"},
        ["a", "b"],
        "members that are not used: .canny.png (2), .meta.json (1)",
    ),
    "other pictures of a stem with dots": (
        {**sample("a.v1"), "a.v1.canny.png": picture()},
        ["a.v1"],
        "members that are not used: .v1.canny.png (1)",
    ),
    "files of another use": (
        {**sample("a"), "README.txt": b"x", "LICENSE": b"x", "info.json": b"{}"},
        ["a"],
        "members that are not used: .txt (1), no ending (1), .json (1)",
    ),
}
"""Fault -> members, the stems that are read, and what the plan adds."""


@pytest.mark.parametrize("name", MEMBERS)
def test_members_are_paired_or_counted(tmp_path: Path, name: str) -> None:
    members, stems, note = MEMBERS[name]
    source = open_at(write_tar(tmp_path / "0.tar", members))
    assert [stem for stem, _ in read(source)] == stems
    assert source.describe().partition("read as tar shards")[2] == (f"\n  {note}" if note else "")


@pytest.mark.parametrize("kind", FORMATS)
def test_every_decoded_format_is_read_from_a_shard(tmp_path: Path, kind: str) -> None:
    """Each ending that Pillow has for a format makes one sample, so a new format cannot be left out."""
    Image.init()
    endings = [ending for ending, owner in Image.registered_extensions().items() if owner == kind]
    endings = [ending for ending in endings if ending in PICTURE_ENDINGS]
    assert endings
    if kind not in Image.SAVE:
        pytest.skip(f"this build of Pillow writes no {kind}")
    members = {}
    for number, ending in enumerate(endings):
        data = picture(kind=kind)
        members |= {f"{number}{ending}": data, f"{number}.cond{ending.upper()}": data, f"{number}.txt": b"x"}
    assert len(read(open_at(write_tar(tmp_path / "0.tar", members)))) == len(endings)


def test_the_columns_name_may_have_capitals(tmp_path: Path) -> None:
    members = {"a.png": picture(), "a.Depth.png": picture(), "a.txt": b"x"}
    place = write_tar(tmp_path / "0.tar", members)
    assert read(open_at(place, conditioning_image_column="Depth")) == [("a", "x")]


def test_captions_may_have_another_ending_or_be_left_out(tmp_path: Path) -> None:
    members = {"a.png": picture(), "a.cond.png": picture(), "a.Caption": b"x"}
    place = write_tar(tmp_path / "0.tar", members)
    assert read(open_at(place, captions=".caption")) == [("a", "x")]
    assert read(open_at(place, captions="none")) == [("a", "")]
    assert "no member ends in .text or .json" in fault_of(place, captions=".text")


MISSING = {
    "condition": (
        {"a.png": picture(), "a.depth.png": picture(), "a.txt": b"x"},
        "no sample has a condition: no member ends in .cond.png or .conditioning_image.png "
        "(or .jpg, .webp, ...); the other members: .depth.png (1). --data.conditioning_image_column NAME reads",
    ),
    "image": ({"a.cond.png": picture(), "a.txt": b"x"}, "no sample has an image: no member ends in .png"),
    "caption": (
        {"a.png": picture(), "a.cond.png": picture(), "a.caption": b"x"},
        "no sample has a caption: no member ends in .txt or .json; the other members: .caption (1).",
    ),
    "picture": (
        {"a.jxl": b"x", "a.txt": b"x"},
        "there are no samples: no member ends in .png or .image.png (or .jpg, .webp, ...); "
        "the other members: .jxl (1), .txt (1)",
    ),
    "conditions of a packed data folder": (
        {"images/a.png": picture(), "images/a.txt": b"x", "conditions/a.png": picture()},
        "If the archive holds a data folder, unpack it and name the folder.",
    ),
}


@pytest.mark.parametrize("part", MISSING)
def test_a_part_that_all_samples_miss_is_named_when_the_shard_is_opened(tmp_path: Path, part: str) -> None:
    members, line = MISSING[part]
    assert line in fault_of(write_tar(tmp_path / "0.tar", members))


def test_the_likely_key_of_the_captions_is_named_when_the_shard_is_opened(tmp_path: Path) -> None:
    """The .json of img2dataset hold the caption under "caption"."""
    members = {}
    for stem in "ab":
        about = {"url": "https://example.org/a.jpg", "caption": f"a {stem}", "width": 16}
        members |= {f"{stem}.png": picture(), f"{stem}.cond.png": picture(), f"{stem}.json": json.dumps(about).encode()}
    place = write_tar(tmp_path / "0.tar", members)
    line = f"--data.caption_column text: the .json of {place} have no such key; there are: url, caption, width."
    assert fault_of(place) == f"{line} Perhaps: --data.caption_column caption"
    assert read(open_at(place, caption_column="caption")) == [("a", "a a"), ("b", "a b")]
    assert read(open_at(place, captions="none")) == [("a", ""), ("b", "")]
    place = write_tar(tmp_path / "1.tar", {**members, "b.json": b'{"text": "x"}'})
    assert len(open_at(place)) == 2, "one of the first .json has the key"


def test_archives_joined_in_one_file_are_all_read(tmp_path: Path) -> None:
    parts = [write_tar(tmp_path / f"{stem}.tar", sample(stem)) for stem in "abc"]
    joined = tmp_path / "joined.tar"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert read(open_at(joined)) == [("a", "a"), ("b", "b"), ("c", "c")]


def test_a_stem_in_two_joined_archives_is_named(tmp_path: Path) -> None:
    place = write_tar(tmp_path / "0.tar", sample("a"))
    place.write_bytes(place.read_bytes() * 2)
    line = "archives 1 and 2 of those that are joined in this file both have a sample a."
    assert line in fault_of(place)


def test_bytes_after_the_archive_are_named(tmp_path: Path) -> None:
    place = write_tar(tmp_path / "0.tar", sample("a"))
    place.write_bytes(place.read_bytes() + b"x" * 600)
    assert f"{place}: 600 bytes follow the end of the archive and are not a tar archive." in fault_of(place)


def zstd(data: bytes) -> bytes:
    if not shutil.which("zstd"):
        pytest.skip("the program zstd is not installed")
    return subprocess.run(["zstd", "-qc"], input=data, stdout=subprocess.PIPE, check=True, timeout=60).stdout


COMPRESSED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "x.tar.gz": (gzip.compress, "gzip -dc x.tar.gz > x.tar"),
    "x.tgz": (gzip.compress, "gzip -dc x.tgz > x.tar"),
    "x.tar": (gzip.compress, "gzip -dc x.tar > plain.tar"),
    "x.tar.bz2": (bz2.compress, "bzip2 -dc x.tar.bz2 > x.tar"),
    "x.tar.xz": (lzma.compress, "xz -dc x.tar.xz > x.tar"),
    "x.tar.zst": (zstd, "zstd -dc x.tar.zst > x.tar"),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_a_compressed_archive_is_refused_with_the_command_that_unpacks_it(tmp_path: Path, name: str) -> None:
    compress, command = COMPRESSED[name]
    plain = write_tar(tmp_path / "plain", sample("a"))
    (tmp_path / name).write_bytes(compress(plain.read_bytes()))
    assert fault_of(tmp_path / name).endswith(f"Unpack it: {command}")
    if shutil.which(command.split()[0]):
        subprocess.run(command, shell=True, cwd=tmp_path, check=True, timeout=60)
        assert read(open_at(tmp_path / command.split()[-1])) == [("a", "a")]


def test_a_tgz_of_pairs_is_refused_with_the_command_that_unpacks_it(tmp_path: Path) -> None:
    place = tmp_path / "pairs.tgz"
    place.write_bytes(gzip.compress(write_tar(tmp_path / "plain", sample("a")).read_bytes()))
    with pytest.raises(UserError) as fault:
        open_source(DataOptions(location=str(place)), seed=0)
    assert "is no emoji package" in str(fault.value)
    assert str(fault.value).endswith("gzip -dc pairs.tgz > pairs.tar")


def test_a_zip_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("a.png", picture())
    assert "is a zip archive. Unpack it (unzip FILE -d FOLDER) and name the folder." in fault_of(tmp_path / "x.zip")


def test_shards_of_a_folder_have_any_case_and_litter_is_no_shard(tmp_path: Path) -> None:
    folder = tmp_path / "[2] {a}"
    folder.mkdir()
    write_tar(folder / "0.TAR", sample("a"))
    (folder / "._0.tar").write_bytes(b"Mac OS X")
    assert read(open_at(folder)) == [("a", "a")]


def test_a_shard_without_samples_among_others_is_counted(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"README.md": b"x"})
    write_tar(tmp_path / "1.tar", sample("a"))
    source = open_at(tmp_path)
    assert read(source) == [("a", "a")]
    assert "\n  1 shard without samples (the first: 0.tar)" in source.describe()


def test_a_split_of_a_folder_is_never_another_splits_shards(tmp_path: Path) -> None:
    for name in ("train-0.tar", "val-0.tar", "7.tar"):
        write_tar(tmp_path / name, sample(name[0]))
    assert read(open_at(tmp_path)) == [("t", "t")]
    assert read(open_at(tmp_path, split="validation")) == read(open_at(tmp_path, split="val")) == [("v", "v")]
    assert fault_of(tmp_path, split="test").startswith("--data.split ")
    assert fault_of(tmp_path, split="test").endswith("has no split 'test'; there are: train, validation.")
    (tmp_path / "train-0.tar").unlink()
    assert read(open_at(tmp_path)) == [("7", "7")]
    (tmp_path / "7.tar").unlink()
    assert fault_of(tmp_path).endswith("has no split 'train'; there are: validation.")
