"""`doctor` finds every fault that is planted in a good dataset, at its row, and none in the good dataset."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from t2i_adapter.cli import main
from t2i_adapter.data.shapes import CONDITIONS, write_dataset
from t2i_adapter.doctor.offset import SURE_MARGIN, find_offset

ROWS = 48
SIZE = 128
PAIR = ("file_name", "conditioning_image_file_name")
Rows = list[Any]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset without faults. Read only."""
    folder = tmp_path_factory.mktemp("good")
    write_dataset(folder, num=ROWS, size=SIZE)
    return folder


def look_over(data: Path, out: Path, *words: str, workers: int = 0) -> tuple[int, dict[str, Any]]:
    """The exit code and what --json wrote."""
    flags = ["--data.resolution", str(SIZE), "--workers", str(workers), "--json", str(out / "found.json"), *words]
    try:
        code = main(["doctor", str(data), "--measure", "0", *flags])
    except SystemExit as stop:
        code = stop.code
    assert isinstance(code, int)
    return code, json.loads((out / "found.json").read_text())


def planted(report: dict[str, Any]) -> dict[str, list[str]]:
    """Kind -> keys of its rows."""
    return {finding["kind"]: [row["key"] for row in finding["rows"]] for finding in report["findings"]}


def crops_of(report: dict[str, Any]) -> dict[tuple[int, int], int]:
    return {(crop["height"], crop["width"]): crop["pictures"] for crop in report["crops"]}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_good_set_has_no_finding(condition: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path, num=120, size=SIZE, condition=condition, seed=3)
    code, report = look_over(tmp_path, tmp_path)
    assert (code, report["findings"]) == (0, [])
    assert crops_of(report) == {(128, 128): 120}
    assert capsys.readouterr().out.endswith("nothing is wrong\n")
    if condition != "palette":  # the borders of its cells are not edges of the image, so there is no offset
        assert report["offset"]["median"] == pytest.approx([0, 0], abs=0.1)


def test_it_measures_and_reads_with_several_workers(good: Path, tmp_path: Path) -> None:
    code, report = look_over(good, tmp_path, "--measure", "2", workers=2)
    alone = look_over(good, tmp_path)[1]
    measured, needs = report["needs"].pop("measured"), report["needs"]
    assert code == 0
    assert measured["picture_seconds"] > 0 and measured["caption_seconds"] > 0 and measured["peak_bytes"] > 2**20
    spent = needs["crops"] * measured["picture_seconds"] + needs["captions"] * measured["caption_seconds"]
    assert needs.pop("seconds") == pytest.approx(spent)
    alone["needs"].pop("measured"), alone["needs"].pop("seconds")
    assert {**report, "seconds": 0} == {**alone, "seconds": 0}


def test_the_predicted_disk_is_the_size_of_the_cache(good: Path, tmp_path: Path) -> None:
    needs = look_over(good, tmp_path)[1]["needs"]
    flags = ["--data.resolution", str(SIZE), "--data.prepared_dir", str(tmp_path / "cache")]
    assert main(["prepare", "--data", str(good), *flags]) == 0
    tail = 20  # bytes at a shard's end, which belong to no record
    for kind in ("picture", "caption"):
        shards = list((tmp_path / "cache" / f"{'image' if kind == 'picture' else 'text'}s").rglob("*.shard"))
        assert shards
        assert needs[f"{kind}_bytes"] == sum(path.stat().st_size - tail for path in shards)


class Spoiler:
    """A copy of a dataset, with the faults that were planted in it."""

    def __init__(self, source: Path, folder: Path) -> None:
        shutil.copytree(source, folder)
        self.folder = folder / "train"
        self.rows: Rows = [json.loads(line) for line in (self.folder / "metadata.jsonl").read_text().splitlines()]
        self.expected: dict[str, list[str]] = {}

    def plant(self, kind: str, number: int, spoil: Callable[[Spoiler, int], None], key: str = "") -> None:
        spoil(self, number)
        self.expected.setdefault(kind, []).append(key or f"train/{self.rows[number]['file_name']} (line {number + 1})")

    def file(self, number: int, which: int) -> Path:
        return self.folder / self.rows[number][PAIR[which]]

    def write(self) -> None:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in self.rows]
        (self.folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def paint(which: int, change: Callable[[Image.Image], Image.Image]) -> Callable[[Spoiler, int], None]:
    """Saves a row's image (0) or condition (1) changed."""

    def spoil(data: Spoiler, number: int) -> None:
        path = data.file(number, which)
        change(Image.open(path).convert("RGB")).save(path)

    return spoil


def store(which: int, change: Callable[[bytes], bytes]) -> Callable[[Spoiler, int], None]:
    def spoil(data: Spoiler, number: int) -> None:
        path = data.file(number, which)
        path.write_bytes(change(path.read_bytes()))

    return spoil


def say(value: Any) -> Callable[[Spoiler, int], None]:
    def spoil(data: Spoiler, number: int) -> None:
        data.rows[number]["text"] = value

    return spoil


def shift(picture: Image.Image, right: int = 3) -> Image.Image:
    return Image.fromarray(np.roll(np.asarray(picture), right, axis=1))


def bomb(data: bytes) -> bytes:
    """A PNG whose header claims 11,000 x 11,000 pixels."""
    header = b"IHDR" + struct.pack(">II", 11_000, 11_000) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def copy_of(other: int, quality: int | None = None) -> Callable[[Spoiler, int], None]:
    """Another row's pair; with a quality, its image is saved again as a smaller JPEG."""

    def spoil(data: Spoiler, number: int) -> None:
        shutil.copy(data.file(other, 1), data.file(number, 1))
        shutil.copy(data.file(other, 0), data.file(number, 0))
        if quality:
            picture = Image.open(data.file(number, 0)).resize((112, 112), Image.Resampling.BICUBIC)
            data.rows[number]["file_name"] = f"{number:05d}.jpg"
            picture.save(data.file(number, 0), quality=quality)

    return spoil


def sure_rows(data: Spoiler) -> list[int]:
    """Rows whose edges are clear enough for a sure offset."""

    def margin(number: int) -> float:
        image, condition = (np.asarray(Image.open(data.file(number, which))).transpose(2, 0, 1) for which in (0, 1))
        offset = find_offset(image, condition)
        return offset.margin if offset else 0.0

    return [number for number in range(40, ROWS) if margin(number) > 1.5 * SURE_MARGIN]


@pytest.fixture(scope="module")
def spoilt(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Spoiler:
    """A copy of the good set with each kind of fault at known rows."""
    data = Spoiler(good, tmp_path_factory.mktemp("spoilt") / "data")
    smaller = paint(0, lambda picture: picture.resize((48, 48), Image.Resampling.LANCZOS))
    data.plant("missing", 1, lambda data, number: data.file(number, 0).unlink())
    data.plant(
        "missing",
        2,
        lambda data, number: data.rows[number].update(file_name="../../x.png"),
        "train/../../x.png (line 3)",
    )
    data.plant("empty", 3, store(1, lambda _: b""))
    data.plant("unreadable", 4, store(0, lambda png: png[: len(png) // 2]))
    data.plant("huge", 5, store(0, bomb))
    data.plant("caption", 6, say(None))
    data.plant("aspect", 7, paint(1, lambda picture: picture.resize((SIZE, SIZE // 2))))
    data.plant("row", 8, lambda data, number: data.rows.__setitem__(number, "{oops"), "train/line 9")
    data.plant("polarity", 9, paint(1, ImageOps.invert))
    data.plant("constant", 10, paint(1, lambda picture: Image.new("RGB", picture.size)))
    data.plant("coloured", 11, paint(1, lambda picture: ImageOps.colorize(picture.convert("L"), "black", "red")))
    data.plant("duplicate", 13, copy_of(12))
    data.plant("near_duplicate", 15, copy_of(14, quality=90))
    data.plant("tiny", 16, smaller)
    data.plant("tiny_condition", 17, paint(1, lambda picture: picture.resize((48, 48), Image.Resampling.BILINEAR)))
    data.plant("long_caption", 18, say("<script>alert(1)</script> " + "a red circle and a blue star, " * 12))
    data.plant("empty_caption", 19, say(["a caption", " "]))
    data.plant("offset_row", sure_rows(data)[0], paint(1, shift))
    data.write()
    return data


def test_a_spoilt_set_has_just_the_planted_findings(
    spoilt: Spoiler, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = look_over(spoilt.folder, tmp_path, "--html", str(tmp_path / "page.html"))
    assert code == 1
    assert planted(report) == spoilt.expected
    assert (report["errors"], report["warnings"]) == (7, 10)
    printed = capsys.readouterr().out
    assert "error: a picture is missing: 2 rows (train/00001.png (line 2), train/../../x.png (line 3))" in printed
    assert "3 px right" in printed and printed.endswith("7 errors, 10 warnings\n")
    page = (tmp_path / "page.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert all(escape(finding["what"]) in page for finding in report["findings"])
    assert page.count("data:image/webp;base64,") > 40


def test_its_skip_list_removes_the_rows_that_should_not_be_trained_on(spoilt: Spoiler, tmp_path: Path) -> None:
    skip = tmp_path / "skip.txt"
    look_over(spoilt.folder, tmp_path, "--skip_list", str(skip))
    code, report = look_over(spoilt.folder, tmp_path, "--data.skip", str(skip))
    kept = {"tiny", "tiny_condition", "long_caption", "empty_caption"}
    skipped = [key for kind, keys in spoilt.expected.items() if kind not in kept for key in keys]
    assert sorted(skip.read_text().splitlines()) == sorted(skipped)
    assert code == 0
    assert set(planted(report)) == kept


def test_a_dataset_whose_conditions_are_all_shifted_has_one_finding(good: Path, tmp_path: Path) -> None:
    data = Spoiler(good, tmp_path / "data")
    for number in range(ROWS):
        paint(1, shift)(data, number)
    code, report = look_over(data.folder, tmp_path)
    assert code == 1
    assert planted(report) == {"offset": []}
    assert report["offset"]["median"] == pytest.approx([0, 3], abs=0.1)
    assert report["findings"][0]["whole"].startswith("3 px right of their images")


def test_buckets_views_and_annotators_are_as_in_training(good: Path, tmp_path: Path) -> None:
    data = Spoiler(good, tmp_path / "data")
    for number in range(6):
        wide = cv2.resize(np.asarray(Image.open(data.file(number, 0))), (200, 100))
        Image.fromarray(wide).save(data.file(number, 0))
        data.file(number, 1).unlink()
    words = ["--data.buckets", "generated", "--data.bucket_step", "32", "--data.flip", "--data.condition", "canny"]
    _, report = look_over(data.folder, tmp_path, *words)
    assert report["findings"] == [] and report["conditions"] == {} and report["offset"] is None
    assert crops_of(report) == {(128, 128): ROWS - 6, (96, 160): 6}
    assert report["needs"]["crops"] == 2 * ROWS


def transparent_lines(picture: Image.Image) -> Image.Image:
    """White lines whose background is transparent, as drawing programs save them."""
    white = Image.new("RGBA", picture.size, "white")
    white.putalpha(picture.convert("L"))
    return white


def test_white_lines_on_transparency_name_the_background_option(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Spoiler(good, tmp_path / "data")
    for number in (3, 5):
        data.plant("transparent", number, paint(1, transparent_lines))
    code, report = look_over(data.folder, tmp_path)
    assert code == 0 and planted(report) == data.expected
    assert "choose another --data.background, such as black" in capsys.readouterr().out
    assert look_over(data.folder, tmp_path, "--data.background", "black")[1]["findings"] == []


def millimetres(low: int, high: int) -> Callable[[Image.Image], Image.Image]:
    """A map of 16 bits whose levels are low to high, and 0 where nothing was measured."""

    def convert(picture: Image.Image) -> Image.Image:
        values = np.asarray(picture.convert("L")).astype(np.float64) * (high - low) / 255 + low
        values[:4] = 0
        return Image.fromarray(values.astype(np.uint16))

    return convert


def test_maps_of_16_bits_that_use_little_of_the_range_are_one_finding(good: Path, tmp_path: Path) -> None:
    """One map that is as narrow is no finding in a dataset that uses the range."""
    data = Spoiler(good, tmp_path / "data")
    for number in range(ROWS):
        paint(1, millimetres(500, 8000))(data, number)
    code, report = look_over(data.folder, tmp_path)
    [finding] = [finding for finding in report["findings"] if finding["kind"] == "range"]
    assert code == 0 and finding["rows"] == []
    assert finding["whole"].startswith("48 of 48 rows: they use 11% of the 16-bit range (500 to 8000 of 0 to 65535)")
    shutil.copy(good / "train" / data.rows[9][PAIR[1]], data.file(9, 1))
    paint(1, millimetres(500, 60_000))(data, 9)
    assert "range" not in planted(look_over(data.folder, tmp_path)[1])


def test_pictures_whose_colours_may_be_off_are_listed(
    good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also by worker processes, and without the warnings that training prints."""
    data = Spoiler(good, tmp_path / "data")
    for number in (2, 40):
        data.plant(
            "colours", number, lambda data, n: Image.open(data.file(n, 0)).save(data.file(n, 0), icc_profile=b"x")
        )
    reports = [look_over(data.folder, tmp_path, "--html", str(tmp_path / "a.html"), workers=n)[1] for n in (0, 2)]
    for report in reports:
        assert planted(report) == data.expected
    printed = capfd.readouterr()
    assert printed.out.count("(line 3): profile ignored: it is damaged") == 2
    assert "is ignored, so" not in printed.err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "--data is required: a folder, manifest, shards or a hub id"),
        (["nowhere"], "nowhere"),
        (["data", "--data", "x"], "DATA (data) names the dataset already"),
        (["data", "--json", "no/such/folder.json"], "--json no/such/folder.json: the folder no/such does not exist"),
        (["data", "--measure", "-1"], "--measure -1: allowed is 0 or more"),
        (["data", "--data.resolution", "100"], "--data.resolution 100: allowed are multiples of 8"),
        (["data", "--wrokers", "1"], "--wrokers: no such flag; did you mean --workers?"),
    ],
)
def test_mistakes_are_one_line(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *words]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and text in printed


def test_worker_processes_load_no_torch() -> None:
    code = "import sys, t2i_adapter.doctor.scan, t2i_adapter.data.source; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.returncode) == ("False", 0), done.stderr
