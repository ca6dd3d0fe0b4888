"""A path in a row, an archive, a record or a link never leads out of its folder to read, write or remove a file."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.runs import train_words

from t2i_adapter.cli import main
from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.source import open_source
from t2i_adapter.errors import UserError
from t2i_adapter.models.record import Metadata
from t2i_adapter.verbs.cache import RemoveOptions, rm
from t2i_adapter.verbs.make_data import EmojiOptions, make_emoji


def picture(color: str = "red", size: tuple[int, int] = (64, 64), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A picture outside every dataset."""
    folder = tmp_path / "private"
    folder.mkdir()
    (folder / "secret.png").write_bytes(picture())
    return folder / "secret.png"


def fault_of(place: Path, tmp_path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as fault:
        data = DataOptions(location=str(place), prepared_dir=str(tmp_path / "cache"), **options)
        open_source(data, seed=0)[0]
    return str(fault.value)


def write_rows(folder: Path, path: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cond.png").write_bytes(picture("black"))
    row = {"file_name": path, "conditioning_image_file_name": "cond.png", "text": "a"}
    (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")


ESCAPES: dict[str, Callable[[Path], str]] = {
    "absolute": lambda outside: str(outside),
    "parent": lambda outside: "../../private/secret.png",
    "in and out": lambda outside: "x/../../../private/secret.png",
    "file address": lambda outside: f"file://{outside}",
    "zero byte": lambda outside: f"{outside}\0.png",
    "chained file systems": lambda outside: f"simplecache::file://{outside}",
    "another scheme": lambda outside: "ssh://127.0.0.1/secret.png",
}


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_row_of_an_image_folder_stays_in_it(tmp_path: Path, outside: Path, escape: str):
    write_rows(tmp_path / "data" / "train", ESCAPES[escape](outside))
    message = fault_of(tmp_path / "data", tmp_path)
    assert "line 1, column image" in message


BY_DESIGN = ("absolute", "file address")
"""Forms in which a manifest on this machine, which the user has named, may name any file."""


@pytest.mark.parametrize("escape", [name for name in ESCAPES if name not in BY_DESIGN])
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_row_of_a_manifest_stays_in_its_folder(tmp_path: Path, outside: Path, escape: str, suffix: str):
    message = read_manifest(tmp_path, ESCAPES[escape](outside), suffix)
    assert "column image" in message or "is UTF-16 text, or not text" in message


@pytest.mark.parametrize("form", BY_DESIGN)
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_manifest_may_name_files_elsewhere_by_their_absolute_paths(
    tmp_path: Path, outside: Path, form: str, suffix: str
):
    assert read_manifest(tmp_path, ESCAPES[form](outside), suffix) == ""


@pytest.mark.parametrize("form", BY_DESIGN)
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_table_found_in_a_folder_that_the_user_named_stays_in_it(
    tmp_path: Path, outside: Path, form: str, suffix: str
):
    """A folder may come from somebody else, so its table may not name this machine's files."""
    message = read_manifest(tmp_path, ESCAPES[form](outside), suffix, names_folder=True)
    assert "column image" in message and "Rows of a table that you name yourself may" in message


@pytest.mark.parametrize("kind", ["parquet", "hub"])
def test_a_parquet_file_found_in_a_folder_that_the_user_named_stays_in_it(tmp_path: Path, outside: Path, kind: str):
    folder = tmp_path / "data"
    folder.mkdir()
    cells = {"image": [str(outside)], "conditioning_image": [str(outside)], "text": ["a"]}
    for name, image in (("text", [str(outside)]), ("struct", [{"bytes": None, "path": str(outside)}])):
        pq.write_table(pa.table({**cells, "image": image}), folder / "0.parquet")
        assert "leaves the data folder" in fault_of(folder, tmp_path, kind=kind), name


def read_manifest(tmp_path: Path, path: str, suffix: str, *, names_folder: bool = False) -> str:
    """The error from reading a manifest of one row whose image is `path`; "" if it is read.

    names_folder: the user names the manifest's folder.
    """
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "cond.png").write_bytes(picture("black"))
    if suffix == "jsonl":
        text = json.dumps({"image": path, "conditioning_image": "cond.png", "text": "a"})
    else:
        text = f'image,conditioning_image,text\n"{path}",cond.png,a\n'
    (folder / f"rows.{suffix}").write_text(text + "\n")
    place = folder if names_folder else folder / f"rows.{suffix}"
    data = DataOptions(location=str(place), prepared_dir=str(tmp_path / "cache"))
    try:
        open_source(data, seed=0)[0]
    except UserError as fault:
        return str(fault)
    return ""


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(content), kind, link
    tar.addfile(member, io.BytesIO(content))


MEMBERS: dict[str, Callable[[tarfile.TarFile, Path], None]] = {
    "absolute": lambda tar, outside: add(tar, str(outside), picture()),
    "parent": lambda tar, outside: add(tar, "../x.png", picture()),
    "hidden parent": lambda tar, outside: add(tar, "a/../../x.png", picture()),
    "backslashes": lambda tar, outside: add(tar, "..\\x.png", picture()),
    "symbolic link": lambda tar, outside: add(tar, "x.png", kind=tarfile.SYMTYPE, link=str(outside)),
    "hard link": lambda tar, outside: add(tar, "x.png", kind=tarfile.LNKTYPE, link=str(outside)),
    "device": lambda tar, outside: add(tar, "x.png", kind=tarfile.CHRTYPE),
    "pipe": lambda tar, outside: add(tar, "x.png", kind=tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("member", MEMBERS)
def test_a_tar_member_that_leads_out_is_refused(tmp_path: Path, outside: Path, member: str):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "a.png", picture())
        add(tar, "a.cond.png", picture("black"))
        add(tar, "a.txt", b"a")
        MEMBERS[member](tar, outside)
    before = sorted(tmp_path.rglob("*"))
    message = fault_of(tmp_path / "0.tar", tmp_path)
    assert "leads out of the archive" in message or "is a link or a device" in message
    assert sorted(path for path in tmp_path.rglob("*") if "cache" not in str(path)) == before


@pytest.mark.timeout(60)
def test_a_tar_member_of_negative_size_does_not_loop(tmp_path: Path):
    """The reader would come back to such a member without end."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "a.bin", b"x" * 512)
    header = bytearray(buffer.getvalue()[:512])
    header[124:136] = b"\xff" * 4 + struct.pack(">q", -1024)  # base 256, negative
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    (tmp_path / "0.tar").write_bytes(bytes(header) + b"x" * 512 + bytes(1024))
    assert str(tmp_path / "0.tar") in fault_of(tmp_path / "0.tar", tmp_path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", ["pipe", "folder", "device"])
def test_only_a_regular_file_is_read_as_a_picture(tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]):
    """Reading a pipe without a writer, or /dev/zero, would never end."""
    write_rows(tmp_path / "data" / "train", "x.png")
    place = tmp_path / "data" / "train" / "x.png"
    if what == "pipe":
        os.mkfifo(place)
    elif what == "folder":
        place.mkdir()
    else:
        place.symlink_to("/dev/zero")
    assert "is a folder, a pipe or a device" in fault_of(tmp_path / "data", tmp_path)
    assert main(["annotate", "canny", str(place), "--out", str(tmp_path / "map.png")]) == 2
    assert "is a folder, a pipe or a device" in capsys.readouterr().err


def test_the_record_of_an_adapter_is_published_without_this_machines_folders():
    record = Metadata(
        base={"name": "/home/someone/models/base.safetensors", "vae": "~/vae", "config": None},
        data={"name": "https://host/a/0.tar?X-Signature=abcdef0123"},
        training={"list": ["/etc/passwd", "../x"]},
    ).without_local_paths()
    text = json.dumps(record.to_dict())
    assert not any(word in text for word in ("/home", "someone", "~", "/etc", "..", "abcdef0123", "host"))


@pytest.mark.parametrize("name", ["../../outside", "/etc", "a/../../b"])
def test_a_path_in_an_adapters_record_writes_nothing(
    tmp_path: Path, tiny_data: Path, name: str, capsys: pytest.CaptureFixture
):
    """The base in t2i_adapter.json is opened as a base or refused; no file is made at its path."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "t2i_adapter.json").write_text(json.dumps({"schema": 1, "base": {"name": name}}))
    before = sorted(tmp_path.rglob("*"))
    picture_file = str(tiny_data / "train" / "00000.png")
    words = ["generate", "--adapter", str(adapter), "--prompt", "a", "--image", picture_file]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert sorted(path for path in tmp_path.rglob("*") if path.name != "out") == before


def test_a_cache_folder_that_is_a_link_is_removed_as_a_link(tmp_path: Path, outside: Path):
    """`cache rm --all` removes the link, not the files that it points to."""
    cache = tmp_path / "cache"
    (cache / "images").mkdir(parents=True)
    (cache / "images" / ("a" * 32)).symlink_to(outside.parent)
    (cache / "stamps").symlink_to(outside.parent)
    rm(RemoveOptions(prepared_dir=str(cache), all=True, yes=True))
    assert outside.is_file()


ICON = {"icons": {"apple": {"body": '<path fill="red" d="M0 0h32v32H0z"/>'}}, "width": 32, "height": 32}


def icons(tmp_path: Path, body: str, **entry: Any) -> Path:
    file = tmp_path / "icons.json"
    file.write_text(json.dumps({**ICON, "icons": {"apple": {"body": body, **entry}}}))
    return file


SVG = {
    "a file": '<image width="32" height="32" href="{outside}"/>',
    "a file, old style": '<image width="32" height="32" xlink:href="{outside}"/>',
    "a filter's file": '<filter id="a"><feImage href="{outside}"/></filter>',
    "a file by use": '<use href="{outside}#a"/>',
    "a style's file": '<rect fill="url({outside}#a)"/>',
    "an entity": '<!DOCTYPE x [<!ENTITY a SYSTEM "{outside}">]><path d="M0 0"/>&a;',
    "a processing instruction": '<?xml-stylesheet href="{outside}"?>',
    "another document": '</svg><svg viewBox="0 0 9 9">',
    "a script": "<script>1</script>",
    "a long one": "<g></g>" * 50_000,
}


@pytest.mark.parametrize("svg", SVG)
def test_an_icon_reaches_nothing_outside_itself(tmp_path: Path, outside: Path, svg: str):
    file = icons(tmp_path, SVG[svg].format(outside=outside))
    with pytest.raises(UserError, match="icon 'apple'"):
        make_emoji(EmojiOptions(out=tmp_path / "data", package=file, size=32))


@pytest.mark.parametrize("side", [10**9, -1, 0, '1 1" onload="x', None, float("nan"), True, [1]])
def test_an_icons_size_is_bounded(tmp_path: Path, side: Any):
    with pytest.raises(UserError, match="icon 'apple' is"):
        make_emoji(EmojiOptions(out=tmp_path / "data", package=icons(tmp_path, "<g/>", width=side), size=32))


def test_a_package_that_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from t2i_adapter.data import emoji

    monkeypatch.setattr(emoji, "_MAX_UNPACKED", 2**20)
    with tarfile.open(tmp_path / "x.tgz", "w:gz") as tar:
        add(tar, "package/zeros", bytes(2**21))
        add(tar, "package/icons.json", json.dumps(ICON).encode())
    with pytest.raises(UserError, match="unpacks to more than"):
        make_emoji(EmojiOptions(out=tmp_path / "data", package=tmp_path / "x.tgz", size=32))


# The output folder ----------------------------------------------------------------------------------------------------


THREE_STEPS = ("--train.max_steps", "3", "--checkpoint.every", "1", "--checkpoint.keep", "1")


def test_links_in_the_output_folder_are_not_followed_for_writing_or_removal(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, outside: Path
):
    """A run's folder may come from somebody else, who may have put links into it."""
    out = tmp_path / "run"
    out.mkdir()
    precious = outside.parent
    for name in ("checkpoint-1", ".checkpoint-2.writing", ".saving-x"):
        (out / name).symlink_to(precious)
    (precious / "notes.txt").write_text("mine")
    files = ("options.yaml", ".lock", "metrics.jsonl", "README.md", "t2i_adapter.json", "config.json")
    for name in files:
        (out / name).symlink_to(precious / "notes.txt")
    code = main(train_words(tiny_base, tiny_data, out, *THREE_STEPS, "--checkpoint.resume", "latest"))
    assert (precious / "notes.txt").read_text() == "mine"
    assert outside.is_file()
    assert code in (0, 2)


def test_a_symlinked_output_folder_is_the_folder_itself(tiny_base: Path, tiny_data: Path, tmp_path: Path):
    real = tmp_path / "disk" / "run"
    real.mkdir(parents=True)
    (real / "keep.txt").write_text("mine")
    (tmp_path / "run").symlink_to(real)
    assert main(train_words(tiny_base, tiny_data, tmp_path / "run", *THREE_STEPS)) == 0
    assert (real / "keep.txt").read_text() == "mine" and (tmp_path / "run").is_symlink()
    assert (real / "checkpoint-3").is_dir() and not (real / "checkpoint-1").exists()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["/dev/zero", "../../private/secret.png", "/etc/passwd", "t2iadapter/../../x"])
def test_a_checkpoint_that_lists_files_elsewhere_is_damaged(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, outside: Path, name: str
):
    from t2i_adapter.training import checkpoint

    out = tmp_path / "run"
    if not (made := tmp_path.parent / "made").exists():
        assert main(train_words(tiny_base, tiny_data, made, *THREE_STEPS)) == 0
    shutil.copytree(made, out)
    folder = out / "checkpoint-3"
    state = json.loads((folder / "state.json").read_text())
    state["files"][name] = "0" * 64
    state.pop("sha256", None)
    (folder / "state.json").write_text(json.dumps(state))
    assert checkpoint.damage(folder)
