"""Stable Diffusion 1.5 and 2.1 through the command line: train, resume, generate, evaluate, plan, drop-in script."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import T2IAdapter
from PIL import Image
from safetensors.torch import load_file
from support.processes import Run, finish
from support.runs import losses
from support.tiny import write_circles, write_tiny_sd

from t2i_adapter.export.card_code import usage_code
from t2i_adapter.models.record import Metadata, read_metadata

WEIGHTS = "diffusion_pytorch_model.safetensors"


pytestmark = pytest.mark.usefixtures("nothing_is_left_running")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bases sd15 and sd21, and the data circles/."""
    folder = tmp_path_factory.mktemp("sd")
    write_tiny_sd(folder / "sd15")
    write_tiny_sd(folder / "sd21", is_v2=True)
    write_circles(folder / "circles", num=24)
    return folder


def train_words(base: str, out: str, *more: str) -> list[str]:
    return [
        *("train", "--base.name", base, "--data", "circles", "--output_dir", out, "--data.resolution", "64"),
        *("--train.max_steps", "6", "--train.batch_size", "2", "--train.seed", "3", "--optim.lr", "1e-3"),
        *("--checkpoint.every", "3", "--tracking.log_every", "1", "--tracking.report_to", "none", *more),
    ]


RUNS = {
    "full": ("sd15", ()),
    "light": ("sd15", ("--adapter.type", "light_adapter", "--adapter.in_channels", "1")),
    "full_v": ("sd21", ("--adapter.in_channels", "1", "--objective.min_snr_gamma", "5")),
    "light_v": ("sd21", ("--adapter.type", "light_adapter", "--data.cache", "none")),
}


@pytest.mark.parametrize("name", list(RUNS))
def test_a_run_resumes_to_the_bit_and_its_adapter_is_used(work: Path, name: str) -> None:
    base, more = RUNS[name]
    assert "Done" in finish(work, *train_words(base, name, *more))
    folder = work / name
    whole, whole_losses = load_file(folder / WEIGHTS), losses(folder)
    for late in ("checkpoint-6", WEIGHTS):
        (folder / late).rename(folder / f"lost-{late}")
    assert "Resuming from" in finish(work, *train_words(base, name, *more, "--checkpoint.resume", "latest"))
    again = load_file(folder / WEIGHTS)
    assert whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)
    assert losses(folder) == whole_losses and len(whole_losses) == 6

    adapter: Any = T2IAdapter.from_pretrained(folder)
    kind = "light_adapter" if "light" in name else "full_adapter"
    assert adapter.config["adapter_type"] == kind and adapter.config["downscale_factor"] == 8
    record = read_metadata(folder)
    assert record is not None
    picture = ["--image", "circles/train/00000_outline.png", "--steps", "2", "--out", f"pictures-{name}"]
    finish(work, "generate", "--adapter", name, "--prompt", "red circle", *picture, "--control_guidance", "2")
    assert Image.open(work / f"pictures-{name}" / "00000.png").size == (64, 64)
    told = ["--split", "train", "--num", "4", "--steps", "2", "--out", f"evaluation-{name}", "--judge", "none"]
    finish(work, "evaluate", "--adapter", name, "--data", "circles", *told)
    found = json.loads((work / f"evaluation-{name}" / "evaluation.json").read_text())
    assert set(next(iter(found["metrics"].values()))) >= {"adapter", "no_adapter", "other_condition"}


def test_a_run_measures_its_control_and_makes_its_pictures(work: Path) -> None:
    """Gain by noise level, held-out pairs and validation, which all use the frozen UNet and its pipeline."""
    more = ["--validation.budget", "0.5", "--validation.held_out", "8", "--train.max_steps", "120"]
    more += ["--validation.prompts", "red circle", "--validation.images", "circles/train/00000_outline.png"]
    more += [
        "--validation.guidance",
        "1",
        "--validation.steps",
        "2",
        "--validation.every",
        "60",
        "--validation.num_images",
        "1",
    ]
    printed = finish(work, *train_words("sd21", "measured", *more))
    assert "Done" in printed and "measuring it needs a longer run" not in printed
    gains = [row["gain"] for row in map(json.loads, (work / "measured" / "metrics.jsonl").open()) if "gain" in row]
    assert gains
    card = (work / "measured" / "README.md").read_text()
    assert "StableDiffusionAdapterPipeline" in card and "XL" not in card and "adapter_conditioning_factor" not in card


@pytest.mark.filterwarnings("ignore:The decode_latents method is deprecated")  # what that pipeline itself calls
def test_the_cards_program_runs(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(work, *train_words("sd15", "carded"))
    record = read_metadata(work / "carded")
    assert isinstance(record, Metadata)
    Image.open(work / "circles/train/00000_outline.png").save(work / "condition.png")
    monkeypatch.chdir(work)
    program = usage_code(record, "carded", prompt="red circle", is_xl=False)
    program = program.replace("inference_steps=30", "inference_steps=2")
    exec(compile(program, "card", "exec"), {})
    assert Image.open(work / "picture.png").size == (64, 64)


def test_plan_doctor_and_init_know_the_base(work: Path) -> None:
    words = train_words("sd21", "planned", "--adapter.type", "light_adapter", "--train.gradient_checkpointing")
    printed = finish(work, "plan", *words[1:], "--card", "24GB", "--base.quantize", "int8")
    assert "base (int8)" in printed and "largest micro-batch" in printed
    assert "nothing is wrong" in finish(work, "doctor", "--data", "circles", "--base.name", "sd15", *words[7:9])
    finish(work, "init", "--data", "circles", "--base", "sd21", "--card", "24GB", "--out", "recipe.yaml")
    recipe = (work / "recipe.yaml").read_text()
    assert "resolution: 96" in recipe and "SDXL" not in recipe


def test_a_size_far_above_the_bases_gets_a_line(work: Path) -> None:
    printed = finish(work, "plan", *train_words("sd15", "large", "--data.resolution", "128", "--no_probe")[1:])
    assert "makes pictures of 64 px by default, and this run trains at 128" in printed
    assert "by default, and this run" not in finish(work, "plan", *train_words("sd15", "x", "--no_probe")[1:])


def test_an_adapter_of_the_other_family_is_one_line(work: Path, tiny_base: Path) -> None:
    def fails(*words: str) -> str:
        run = Run(work, *words)
        assert run.wait() == 2
        return run.said().strip().splitlines()[-1]

    xl = ["--adapter.type", "full_adapter_xl"]
    line = fails(*train_words("sd15", "wrong", *xl))
    assert "--adapter.type full_adapter_xl: does not fit the base, Stable Diffusion 1 or 2" in line
    finish(work, *train_words("sd15", "of15"))
    line = fails("generate", "--adapter", "of15", "--base", str(tiny_base), "--prompt", "x", "--image", "condition.png")
    assert "of15 is a full_adapter" in line and "SDXL" in line
    line = fails(*train_words("sd15", "y", "--adapter.init_from", "of15", "--adapter.type", "light_adapter"))
    assert line.endswith("of15 is a full_adapter: set --adapter.type full_adapter, or omit it.")


def test_the_drop_in_script_trains_it(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from t2i_adapter.script import main

    monkeypatch.chdir(work)
    words = ["--pretrained_model_name_or_path=sd15", "--train_data_dir=circles", "--output_dir=scripted"]
    words += ["--resolution=64", "--train_batch_size=2", "--max_train_steps=2", "--report_to=none", "--seed=0"]
    assert not main([*words, "--conditioning_image_column=conditioning_image"])
    assert json.loads((work / "scripted" / "config.json").read_text())["adapter_type"] == "full_adapter"
