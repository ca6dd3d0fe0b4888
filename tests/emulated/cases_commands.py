"""Commands on the emulated device: prepare, generate, evaluate, doctor, plan, and a run with validation and looks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from support.emulated import device
from support.runs import read_metrics, train_words
from support.tiny import write_adapter

from t2i_adapter.cli import main


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"), tiny_base)


def test_a_run_with_validation_looks_and_a_profile(tiny_base: Path, tiny_data: Path, tmp_path: Path):
    picture = next((tiny_data / "train").glob("*_outline.png"))
    validation = ["--validation.prompts=red circle", f"--validation.images={picture}", "--validation.steps=1"]
    more = ["--train.max_steps=6", "--validation.every=3", "--validation.num_images=2", "--validation.judge=canny"]
    more += [
        "--validation.budget=0.5",
        "--validation.held_out=8",
        "--validation.split=train",
        "--train.mixed_precision=bf16",
    ]
    more += ["--train.ema_decay=0.9", "--tracking.report_to=tensorboard", "--checkpoint.keep_best"]
    assert main(train_words(tiny_base, tiny_data, tmp_path / "run", *validation, *more)) == 0
    assert len(list((tmp_path / "run" / "validation").glob("step-*/0.png"))) == 3
    assert any("control" in row for row in read_metrics(tmp_path / "run"))


def test_prepare_encodes_on_the_device(tiny_base: Path, tiny_data: Path, tmp_path: Path):
    torch.cuda.reset_peak_memory_stats()
    before = device.used()
    words = ["prepare", "--base.name", str(tiny_base), "--data", str(tiny_data), "--data.resolution", "64"]
    assert main([*words, "--data.prepared_dir", str(tmp_path / "prepared")]) == 0
    assert device.peak() > before


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_generate_makes_the_cpu_s_picture(adapter: Path, tiny_data: Path, tmp_path: Path, precision: str):
    picture = next((tiny_data / "test").glob("*_outline.png"))
    words = ["generate", "--adapter", str(adapter), "--prompt", "red circle", "--image", str(picture), "--steps", "2"]
    words += ["--seed", "1", "--num", "2"]
    assert main([*words, "--precision", precision, "--out", str(tmp_path / "cuda")]) == 0
    assert main([*words, "--device", "cpu", "--precision", "fp32", "--out", str(tmp_path / "cpu")]) == 0
    ours, theirs = (sorted((tmp_path / name).glob("*.png")) for name in ("cuda", "cpu"))
    assert len(ours) == len(theirs) >= 2
    for one, other in zip(ours, theirs, strict=True):
        a, b = (
            torch.frombuffer(bytearray(Image.open(file).tobytes()), dtype=torch.uint8).float() for file in (one, other)
        )
        assert (a - b).abs().mean() < 4, "of 255"


def test_evaluate_measures_pairs_on_the_device(adapter: Path, tiny_data: Path, tmp_path: Path):
    torch.cuda.reset_peak_memory_stats()
    before = device.used()
    words = ["evaluate", "--adapter", str(adapter), "--data", str(tiny_data), "--split", "test", "--steps", "1"]
    words += ["--num", "4"]
    assert main([*words, "--condition", "canny", "--out", str(tmp_path / "out")]) == 0
    assert device.peak() > before and any((tmp_path / "out").iterdir())


def test_doctor_measures_the_device(tiny_base: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]):
    words = ["doctor", "--data", str(tiny_data), "--data.resolution", "64", "--measure", "2"]
    assert main(words) in (0, 1)
    assert "on cuda" in capsys.readouterr().out


def test_plan_knows_the_device_s_memory(tiny_base: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]):
    words = ["plan", "--base.name", str(tiny_base), "--data", str(tiny_data), "--data.resolution", "64"]
    assert main([*words, "--train.batch_size", "2", "--train.max_steps", "10"]) == 0
    said = capsys.readouterr().out
    assert "cuda" in said


def test_too_little_memory_for_the_base_is_one_line(
    adapter: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    picture = next((tiny_data / "test").glob("*_outline.png"))
    words = ["generate", "--adapter", str(adapter), "--prompt", "red circle", "--image", str(picture), "--steps", "1"]
    with device.limited(2**14):
        assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "error: out of memory: CUDA out of memory." in capsys.readouterr().err
