"""Fluent Emoji: safe reading of the package, splits, rendering and outlines, on a small package of our own."""

import io
import json
import sys
import tarfile

import emoji as benchmark
import numpy as np
import pytest
from PIL import Image

from t2i_adapter.data import emoji
from t2i_adapter.errors import UserError

DISC = '<circle cx="16" cy="16" r="12" fill="#f00"/>'
NAMES = [f"thing-{letter}{i}" for i in range(4) for letter in "abcd"]
ICONS = {"prefix": "x", "height": 32, "icons": {name: {"body": DISC} for name in NAMES}}


@pytest.fixture
def package(tmp_path):
    file = tmp_path / "icons.json"
    file.write_text(json.dumps(ICONS))
    return file


def tgz(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_reads_json_folder_and_archive(package, tmp_path):
    archive = tgz(tmp_path / "x.tgz", {"package/README.md": b"no", "package/icons.json": package.read_bytes()})
    expected = emoji.read_icons(package)
    assert [icon.name for icon in expected] == sorted(NAMES)
    assert emoji.read_icons(package.parent) == emoji.read_icons(archive) == expected


def test_archive_writes_nothing_and_follows_no_path(tmp_path):
    inside = tmp_path / "deep"
    inside.mkdir()
    archive = tgz(inside / "x.tgz", {"../icons.json": b"{}", "package/../../icons.json": b"{}"})
    with pytest.raises(UserError, match=r"icons\.json"):
        emoji.read_icons(archive)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["x.tgz"]


def test_archive_s_links_are_not_followed(package, tmp_path):
    with tarfile.open(tmp_path / "x.tgz", "w:gz") as tar:
        link = tarfile.TarInfo("package/icons.json")
        link.type, link.linkname = tarfile.SYMTYPE, str(package)
        tar.addfile(link)
    with pytest.raises(UserError, match=r"icons\.json"):
        emoji.read_icons(tmp_path / "x.tgz")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"not json", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"[]", "icons"),
        (b'{"icons": {}}', "icons"),
        (b'{"icons": {"../up": {"body": "x"}}}', "up"),
        (b'{"icons": {"a": {"body": 1}}}', "'a'"),
    ],
)
def test_bad_content(tmp_path, content, says):
    (tmp_path / "icons.json").write_bytes(content)
    with pytest.raises(UserError, match=says):
        emoji.read_icons(tmp_path)


def test_missing_or_foreign_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        emoji.read_icons(tmp_path / "none.tgz")
    (tmp_path / "x.tgz").write_bytes(b"hello")
    with pytest.raises(UserError, match="archive"):
        emoji.read_icons(tmp_path / "x.tgz")


def test_split_is_a_tenth_and_keeps_tones_together():
    icons = [emoji.Icon(f"name-{i}", "") for i in range(4000)]
    assert 0.08 < np.mean([icon.split == "test" for icon in icons]) < 0.12
    for i in range(50):
        tones = ("", "-light", "-medium-dark", "-medium-light-dark")
        assert len({emoji.Icon(f"waving-hand-{i}{tone}", "").split for tone in tones}) == 1
    assert emoji.Icon("waving-hand-medium-dark", "").is_toned and not emoji.Icon("waving-hand", "").is_toned


def test_caption():
    assert emoji.caption(emoji.Icon("red-apple", "")) == "flat emoji of a red apple on a white background"
    assert emoji.caption(emoji.Icon("eagle", ""), "skyblue") == "flat emoji of an eagle on a sky blue background"


def test_render(package):
    pytest.importorskip("resvg_py")
    icon = emoji.read_icons(package)[0]
    picture = np.asarray(emoji.render(icon, 64, "blue"))
    assert picture.shape == (64, 64, 3)
    assert tuple(picture[32, 32]) == (255, 0, 0) and tuple(picture[1, 1]) == (0, 0, 255)
    layer = np.asarray(emoji.render(icon, 64, None))
    assert layer.shape == (64, 64, 4) and layer[1, 1, 3] == 0 and layer[32, 32, 3] == 255


def test_render_without_the_extra(package, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match=r"\[emoji\]"):
        emoji.render(emoji.read_icons(package)[0], 32)


@pytest.mark.parametrize("kind", emoji.CONDITIONS)
def test_condition_is_the_outline(package, kind):
    pytest.importorskip("resvg_py")
    lines = np.asarray(emoji.condition(emoji.render(emoji.read_icons(package)[0], 128), kind))[..., 0] > 0
    y, x = np.nonzero(lines)
    assert np.abs(np.hypot(x - 63.5, y - 63.5) - 48).max() < 3
    assert lines.sum() > 200


def test_write_dataset(package, tmp_path):
    pytest.importorskip("resvg_py")
    out = tmp_path / "data"
    names = []
    for split in emoji.SPLITS:
        folder = emoji.write_dataset(out, package=package, split=split, size=48)
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        for row in rows:
            assert Image.open(folder / row["file_name"]).size == (48, 48)
            assert Image.open(folder / row["conditioning_image_file_name"]).size == (48, 48)
        names += [row["name"] for row in rows]
    assert sorted(names) == sorted(NAMES)
    with pytest.raises(UserError, match="already"):
        emoji.write_dataset(out, package=package, size=48)
    emoji.write_dataset(out, package=package, num=2, size=48, overwrite=True)
    assert len((out / "train" / "metadata.jsonl").read_text().splitlines()) == 2


def test_write_refuses_unknown_options(package, tmp_path):
    for options in ({"split": "dev"}, {"condition": "depth"}, {"background": "whitish"}):
        with pytest.raises(UserError, match=next(iter(options.values()))):
            emoji.write_dataset(tmp_path, package=package, **options)


def test_the_picture_of_the_benchmark_shows_the_first_names_unscaled(tmp_path):
    names = ["b-dark", "b", "a", "c-medium-light", "d", "e", "f", "g", "h"]
    rows = [{"name": name, "text": name, "file_name": "x", "conditioning_image_file_name": "y"} for name in names]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = [row["name"] for row in benchmark.first_names(tmp_path)]
    assert chosen == ["a", "b", "d", "e", "f", "g"]
    pictures = [Image.new("RGB", (16, 16), (40 * i, 0, 0)) for i in range(len(chosen))]
    sheet = benchmark.make_picture(chosen, {"target": pictures, "base alone": pictures})
    step = 16 + benchmark.GAP
    left, top = sheet.width - len(chosen) * step, sheet.height - 2 * step
    for column, picture in enumerate(pictures):
        for row in range(2):
            x, y = left + column * step, top + row * step
            assert sheet.crop((x, y, x + 16, y + 16)).tobytes() == picture.tobytes()
