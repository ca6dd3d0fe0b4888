"""`t2i-adapter init`: it looks at a dataset, writes a recipe that trains, and asks only if it is given no words."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny import write_circles

from t2i_adapter.cli import main
from t2i_adapter.config.recipe import load
from t2i_adapter.config.tree import Config


def write_pictures(folder: Path, captions: bool = True, num: int = 4) -> Path:
    circles = write_circles(folder.parent / "circles", num=num) / "train"
    folder.mkdir()
    for number, picture in enumerate(sorted(path for path in circles.glob("*.png") if "_" not in path.name)):
        picture.rename(folder / picture.name)
        if captions:
            (folder / f"{picture.stem}.txt").write_text(f"circle {number}")
    return folder


def test_the_recipe_for_a_folder_of_pictures_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path / "my pictures")
    monkeypatch.chdir(tmp_path)
    assert main(["init", "my pictures"]) == 0
    printed = capsys.readouterr().out
    assert "Kind to make of the pictures: canny is taken." in printed
    assert "4 pairs from my pictures, read as a folder of pictures" in printed
    assert printed.endswith("Train with:\n  t2i-adapter train --recipe recipe.yaml\n")
    config = load("recipe.yaml", Config())
    assert (config.data.location, config.data.condition, config.base.name) == ("my pictures", "canny", "nano")
    short = ["--train.max_steps", "1", "--train.batch_size", "2", "--resolution", "64", "--tracking.report_to", "none"]
    assert main(["train", "--recipe", "recipe.yaml", *short]) == 0
    assert (tmp_path / "adapter" / "diffusion_pytorch_model.safetensors").is_file()


def test_what_is_missing_is_chosen_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path / "plain", captions=False)
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--data", "plain", "--condition", "sketch", "--card", "8GB", "--out", "8.yaml"]) == 0
    printed = capsys.readouterr().out
    assert "There are no captions" in printed and "none is taken" in printed
    assert "the image is less than half the resolution" in printed  # the quick look is doctor's
    config = load("8.yaml", Config())
    assert (config.data.captions, config.data.condition, config.data.resolution) == ("none", "sketch", 1024)
    assert (config.base.quantize, config.optim.name, config.train.gradient_checkpointing) == ("int8", "adamw8bit", True)
    assert config.train.batch_size * config.train.gradient_accumulation_steps == 16


@pytest.mark.parametrize(("card", "batch"), [("12GB", 1), ("24GB", 2), ("RTX 4090", 2), ("A100", 8)])
def test_larger_cards_take_larger_batches(
    card: str, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_circles(tmp_path / "data", num=2)
    monkeypatch.chdir(tmp_path)
    assert main(["init", "data", "--card", card]) == 0
    config = load("recipe.yaml", Config())
    assert config.data.condition is None and config.base.quantize == "none"
    assert config.train.batch_size == batch and config.train.batch_size * config.train.gradient_accumulation_steps == 16
    assert config.train.gradient_checkpointing == (card == "12GB")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["init", "nowhere"], "--data nowhere: no such folder."),
        (["init", "data", "--data", "data"], "DATA (data) names the dataset already"),
        (["init", "data", "--card", "big"], "--card big: unknown card"),
        (["init", "data", "--condition", "cany"], "cany"),
        (["init", "data", "--out", "taken.yaml"], "--out taken.yaml: this file exists"),
        (["init", "data", "--out", "no/such.yaml"], "--out no/such.yaml: cannot be written"),
        (["init"], "--data is required"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_circles(tmp_path / "data", num=2)
    (tmp_path / "taken.yaml").write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: PTH123, SIM115
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and text in error
    assert (tmp_path / "taken.yaml").read_text() == "mine"


def test_without_words_it_asks(tmp_path: Path) -> None:
    write_pictures(tmp_path / "plain", captions=False)
    terminal, inner = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "t2i_adapter", "init"], cwd=tmp_path, stdin=inner, stdout=subprocess.PIPE, text=True
    ) as process:
        os.write(terminal, b"plain\nfilename\nlineart\n")
        out, _ = process.communicate(timeout=120)
    os.close(terminal)
    os.close(inner)
    assert process.returncode == 0, out
    config = load(tmp_path / "recipe.yaml", Config())
    assert (config.data.location, config.data.captions, config.data.condition) == ("plain", "filename", "lineart")
