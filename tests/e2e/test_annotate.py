"""Condition maps from the command line: of a picture, of a dataset with a kill in between, of an adapter's photo."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from support.tiny import write_circles

from t2i_adapter.cli import main
from t2i_adapter.reports.sheet import WIDTH
from t2i_adapter.verbs.annotate import BAD_ROWS, LIST


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """An image folder of 12 circles without conditions; row 3 has two captions and a column of its own."""
    folder = write_circles(tmp_path / "pictures", num=12, size=48)
    rows = [json.loads(line) for line in (folder / "train/metadata.jsonl").read_text().splitlines()]
    for row in rows:
        (folder / "train" / row.pop("conditioning_image_file_name")).unlink()
    rows[3] |= {"text": ["one", "two"], "scene": "kept"}
    (folder / "train/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def annotate(*words: str | Path) -> int:
    return main(["annotate", *map(str, words)])


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the list of finished rows, whose lines are in the order of completion."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LIST}


def test_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    values = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(values).save(tmp_path / "photo.png")
    assert annotate("canny,low=10,high=20", tmp_path / "photo.png", "-o", tmp_path / "map.png") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "map.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "map.png")), cv2.Canny(values, 10, 20))


def test_a_dataset_becomes_an_image_folder(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    assert annotate("canny", "--data", pictures, "--out", out, "--workers", 0) == 0
    assert "12 pairs in" in capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "train/metadata.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in (pictures / "train/metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [row["text"] for row in before]
    assert rows[3]["text"] == ["one", "two"] and rows[3]["scene"] == "kept"
    for row, old in zip(rows, before, strict=True):
        image = np.asarray(Image.open(out / "train" / row["file_name"]))
        assert np.array_equal(image, np.asarray(Image.open(pictures / "train" / old["file_name"])))
        condition = np.asarray(Image.open(out / "train" / row["conditioning_image_file_name"]))
        assert np.array_equal(condition, cv2.Canny(image, 100, 200)) and condition.any()


def test_several_processes_make_equal_files_and_a_second_start_makes_none(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    kind = "sketch,random_threshold=true"
    assert annotate(kind, "--data", pictures, "--out", tmp_path / "one", "--workers", 0) == 0
    assert annotate(kind, "--data", pictures, "--out", tmp_path / "two", "--workers", 2) == 0
    first = content(tmp_path / "two/train")
    assert content(tmp_path / "one/train") == first and len(first) == 25
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "two/train").glob("*.png")}
    capsys.readouterr()
    assert annotate(kind, "--data", pictures, "--out", tmp_path / "two") == 0
    assert "12 of 12 rows are there already" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "two/train").glob("*.png")} == times


def test_a_killed_start_is_continued(tmp_path: Path):
    data = write_circles(tmp_path / "data", num=150, size=64)
    words = ["annotate", "mask", "--data", str(data), "--workers", "0", "--out"]
    out = tmp_path / "killed"
    running = subprocess.Popen(
        [sys.executable, "-m", "t2i_adapter", *words, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    listing, deadline = out / "train" / LIST, time.monotonic() + 100
    while not listing.exists() or listing.read_bytes().count(b"\n") < 4:
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait(timeout=30)
    made = listing.read_bytes().count(b"\n") - 1
    assert 3 <= made < 150 and not (out / "train/metadata.jsonl").exists(), "killed in the middle"
    with listing.open("ab") as file:
        file.write(b'[77, {"file_name": "000')  # an incomplete line
    (out / "train/00077.png.0123abcd.tmp").write_bytes(b"\x89PNG")  # and an incomplete picture
    times = {n: (out / "train" / f"{n:05d}.png").stat().st_mtime_ns for n in range(3)}
    assert main([*words, str(out)]) == 0 and main([*words, str(tmp_path / "whole")]) == 0
    assert content(out / "train") == content(tmp_path / "whole/train")
    assert {n: (out / "train" / f"{n:05d}.png").stat().st_mtime_ns for n in range(3)} == times, "not made again"


def test_bad_rows_are_named_and_the_others_made(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    broken = pictures / "train/00005.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:60])
    (pictures / "train/00007.png").rename(tmp_path / "away.png")
    words = ("canny", "--data", pictures, "--out", tmp_path / "out", "--workers", 0)
    assert annotate(*words) == 2
    printed = capsys.readouterr()
    assert "00005.png" in printed.out and "00007.png" in printed.out and printed.err.count("\n") >= 1
    last = printed.err.strip().splitlines()[-1]
    assert last.startswith("error: ") and "2 of 12 rows could not be made" in last and BAD_ROWS in last
    assert len((tmp_path / "out/train" / BAD_ROWS).read_text().splitlines()) == 2
    assert len((tmp_path / "out/train/metadata.jsonl").read_text().splitlines()) == 10
    broken.write_bytes(whole)
    (tmp_path / "away.png").rename(pictures / "train/00007.png")
    assert annotate(*words) == 0
    assert annotate(*words[:-3], tmp_path / "straight", *words[-2:]) == 0
    assert content(tmp_path / "out/train") == content(tmp_path / "straight/train")


def test_a_changed_picture_is_made_again(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ("canny", "--data", pictures, "--out", tmp_path / "out", "--workers", 0)
    assert annotate(*words) == 0
    Image.linear_gradient("L").resize((48, 48)).rotate(90).convert("RGB").save(pictures / "train/00002.png")
    capsys.readouterr()
    assert annotate(*words) == 0
    assert "11 of 12 rows are there already" in capsys.readouterr().out
    assert annotate(*words[:-3], tmp_path / "straight", *words[-2:]) == 0
    assert content(tmp_path / "out/train") == content(tmp_path / "straight/train")


def test_another_kind_is_not_mixed_in(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    assert annotate("canny", "--data", pictures, "--out", out, "--workers", 0) == 0
    assert annotate("canny,low=5", "--data", pictures, "--out", out, "--workers", 0) == 2
    assert "its maps were made with other options" in capsys.readouterr().err
    assert annotate("canny", "--data", pictures, "--out", pictures, "--workers", 0) == 2
    assert "is not empty" in capsys.readouterr().err


FAULTS = {
    "no kind": ([], "KIND: required"),
    "no photo": (["canny", "-o", "x.png"], "neither PHOTO nor --data is set"),
    "both": (["canny", "a.png", "--data", "b", "-o", "x.png"], "PHOTO and --data are both set"),
    "no out": (["canny", "a.png"], "--out is required"),
    "kind": (["cany", "PHOTO", "-o", "x.png"], "condition cany: no such annotator; there are: canny, lineart,"),
    "option": (["canny,lo=3", "PHOTO", "-o", "x.png"], "there is no option 'lo'; there are: low, high, vary"),
    "value": (["canny,low=many", "PHOTO", "-o", "x.png"], "low=many: allowed is a number"),
    "file": (["canny", "none.png", "-o", "x.png"], "PHOTO: none.png: no such file"),
    "name": (["canny", "PHOTO", "-o", "x.doc"], "--out x.doc: the name of a picture file must end in"),
    "folder": (["canny", "PHOTO", "-o", "no/x.png"], "--out no/x.png: the folder no does not exist"),
    "data": (["canny", "--data", "nowhere", "--out", "x"], "nowhere"),
    "workers": (["canny", "--data", "d", "--out", "x", "--workers", "-1"], "--workers -1: allowed is 0 or more"),
    "sheet": (["conditions", "--photo", "PHOTO"], "--photo needs --sheet FILE"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_is_one_line(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("PHOTO", "PNG")
    words, message = FAULTS[fault]
    assert main(words if "conditions" in words else ["annotate", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["PHOTO"], "nothing is left behind"


def test_the_list_of_kinds_and_the_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["conditions"]) == 0
    listed = capsys.readouterr().out
    for text in ("canny\n", "low=100 high=200 vary=0", "white on black", "licence: Apache-2.0 (OpenCV)", "palette\n"):
        assert text in listed
    cell = (WIDTH - 2 * 24 - 3 * 12) // 4  # of a sheet of four columns: margins and gaps are its own
    photo = np.random.default_rng(0).integers(0, 256, (50, cell, 3), np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    shown = ["--kinds", "canny,low=1", "palette", "grey"]
    assert main(["conditions", "--sheet", str(tmp_path / "a.png"), "--photo", str(tmp_path / "photo.png"), *shown]) == 0
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    grey = np.asarray(Image.open(tmp_path / "photo.png").convert("L"))
    windows = np.lib.stride_tricks.sliding_window_view(sheet[..., 0], grey.shape)
    assert (windows[:, :, 0] == grey[0]).all(axis=2).any(), "the grey map stands on it, pixel for pixel"
    assert main(["conditions", "--sheet", str(tmp_path / "b.png"), "--kinds", "canny", "lines"]) == 0
    assert Image.open(tmp_path / "b.png").width == WIDTH


def test_an_adapter_records_how_its_conditions_are_made(
    pictures: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """train --data.condition, then generate --photo and evaluate with nothing but the adapter's folder."""
    adapter = tmp_path / "adapter"
    trained = ["train", "--base.name", tiny_base, "--data", pictures, "--data.resolution", 64,
               "--data.condition", "canny,low=20,high=40", "--adapter.in_channels", 1, "--train.max_steps", 2,
               "--data.num_workers", 0, "--train.seed", 0, "--tracking.report_to", "none",
               "--output_dir", adapter]  # fmt: skip
    assert main(list(map(str, trained))) == 0
    record = json.loads((adapter / "t2i_adapter.json").read_text())["condition"]
    assert record == {
        "name": "canny",
        "options": {"low": 20.0, "high": 40.0, "vary": 0.0},
        "version": 1,
        "channels": 1,
        "kind": "map",
        "polarity": "white on black",
    }
    photo = pictures / "train/00001.png"
    drawn = ["generate", "--adapter", str(adapter), "--prompt", "circle", "--steps", "1", "--device", "cpu"]
    assert main([*drawn, "--photo", str(photo), "--out", str(tmp_path / "a")]) == 0
    made = Image.open(tmp_path / "a/00000_condition.png")
    cut = Image.open(photo).convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(made), cv2.Canny(np.asarray(cut), 20, 40))
    assert main([*drawn, "--image", str(tmp_path / "a/00000_condition.png"), "--out", str(tmp_path / "b")]) == 0
    pair = [np.asarray(Image.open(tmp_path / name / "00000.png")) for name in "ab"]
    assert np.array_equal(*pair), "a photo is its condition"
    record = json.loads((tmp_path / "a/00000.json").read_text())
    assert "--photo" in record["command"] and "low=20.0" in record["command"]

    measured = ["evaluate", "--adapter", str(adapter), "--data", str(pictures), "--split", "train", "--num", "2",
                "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "e")]  # fmt: skip
    assert main(measured) == 0
    result = json.loads((tmp_path / "e/evaluation.json").read_text())
    assert result["metrics"]["condition_f1"]["target"]["mean"] == 1.0, "the true picture has its own condition"
    assert result["settings"]["judge"]["options"]["low"] == 20.0
    assert main([*measured, "--judge", "none"]) == 0
    assert "condition_f1" not in json.loads((tmp_path / "e/evaluation.json").read_text())["metrics"]
    assert main([*measured, "--condition", "palette"]) == 2
    assert "--condition canny" in capsys.readouterr().err, "the pictures of another condition are there"
    assert main([*measured, "--condition", "palette", "--overwrite"]) == 0
    result = json.loads((tmp_path / "e/evaluation.json").read_text())
    assert result["metrics"]["condition_error"]["target"]["mean"] < 1e-9
    capsys.readouterr()
    assert main([*measured, "--condition", "none"]) == 2
    assert "conditioning_image" in capsys.readouterr().err, "the data has no such column"
    record = json.loads((adapter / "t2i_adapter.json").read_text())
    del record["condition"]["name"]
    (adapter / "t2i_adapter.json").write_text(json.dumps(record))
    assert main([*drawn, "--photo", str(photo), "--out", str(tmp_path / "c")]) == 2
    assert "--condition is needed" in capsys.readouterr().err
    assert main([*drawn, "--photo", str(photo), "--condition", "canny", "--out", str(tmp_path / "c")]) == 0
    assert main([*drawn, "--out", str(tmp_path / "d")]) == 2
    assert "neither --image nor --photo is set" in capsys.readouterr().err
