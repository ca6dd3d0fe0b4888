"""The command line of the Hugging Face guide, unchanged except for paths, run sizes and fewer sampling steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLAdapterPipeline, T2IAdapter
from support.push_hub import TOKEN, running_hub

from t2i_adapter.data.shapes import write_dataset
from t2i_adapter.models import nano

SCRIPT = Path(__file__).resolve().parents[2] / "train_t2i_adapter_sdxl.py"


LAUNCHER = ("-m", "accelerate.commands.launch")


def start(*words: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs `python WORDS` to its end."""
    command = [sys.executable, *words]
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guide")
    write_dataset(folder / "fill50k", num=6, split="train", seed=0, size=128, condition="outline")
    write_dataset(folder / "pictures", num=2, split="test", seed=1, size=128, condition="outline")
    conditions = sorted((folder / "pictures" / "test").glob("*_cond.png"))
    for number, condition in enumerate(conditions, start=1):
        condition.rename(folder / f"conditioning_image_{number}.png")
    return folder


def guide(model: str, *more: str) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={model}",
        "--output_dir=adapter",
        "--dataset_name=./fill50k",
        "--mixed_precision=fp16",
        "--resolution=1024",
        "--learning_rate=1e-5",
        "--max_train_steps=2",
        *("--validation_image", "./conditioning_image_1.png", "./conditioning_image_2.png"),
        *("--validation_prompt", "red circle with blue background", "cyan circle with brown floral background"),
        "--validation_steps=100",
        "--train_batch_size=1",
        "--gradient_accumulation_steps=4",
        "--report_to=wandb",
        "--seed=42",
        "--push_to_hub",
        *more,
    ]


def test_the_guides_command_trains_validates_tracks_and_publishes(work: Path):
    cheap = ["--resolution=256", "--validation.steps=1", "--num_validation_images=1", "--dataloader_num_workers=0"]
    with running_hub() as hub:
        done = start(
            *LAUNCHER,
            SCRIPT,
            *guide("nano", *cheap),
            cwd=work,
            HF_ENDPOINT=hub.address,
            HF_TOKEN=TOKEN,
            HF_HUB_OFFLINE="0",
            HF_HUB_DISABLE_XET="1",
            WANDB_SILENT="true",
        )
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout
    assert "4 = 1 x 4 accumulated x 1 processes" in done.stdout
    if not torch.cuda.is_available():
        assert "train.mixed_precision fp16 needs a GPU" in done.stdout
    _check_published({name: content for name, content in hub.files.items() if name.startswith("someone/adapter/")})
    assert list((work / "adapter" / "logs").glob("wandb/offline-run-*")), "no offline run of wandb"
    for path in (work / "adapter").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    for step in ("step-000000", "step-000002"):
        assert len(list((work / "adapter" / "validation" / step).glob("*.png"))) == 2
    _check_opens(work / "adapter")


def _check_published(files: dict[str, bytes]) -> None:
    names = {name.removeprefix("someone/adapter/") for name in files}
    assert names == {
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
        "t2i_adapter.json",
        "recipe.yaml",
        *(f"images/sample_{row}{part}.png" for row in ("00", "01") for part in ("", "_condition", "_00")),
    }
    card = files["someone/adapter/README.md"].decode()
    assert "1e-05" in card.replace("\\", "") and "cyan circle with brown floral background" in card


def _check_opens(folder: Path) -> None:
    for variant, dtype in ((None, torch.float32), ("fp16", torch.float16)):
        adapter = T2IAdapter.from_pretrained(folder, variant=variant, dtype=dtype, local_files_only=True)
        StableDiffusionXLAdapterPipeline.from_pretrained(nano.path(), adapter=adapter)
    record = json.loads((folder / "t2i_adapter.json").read_text())
    assert record["base"]["name"] == "nano" and record["resolution"] == 256


def test_a_failed_upload_costs_only_a_line(work: Path, tiny_base: Path):
    words = [word for word in guide(str(tiny_base)) if not word.startswith(("--validation", "./cond", "--report"))]
    words = [word for word in words if "circle" not in word]
    changed = ["--output_dir=kept", "--resolution=64", "--report_to=none", "--dataloader_num_workers=0"]
    with running_hub() as hub:
        hub.fail_commits = True
        done = start(
            SCRIPT,
            *words,
            *changed,
            cwd=work,
            HF_ENDPOINT=hub.address,
            HF_TOKEN=TOKEN,
            HF_HUB_OFFLINE="0",
            HF_HUB_DISABLE_XET="1",
        )
    assert done.returncode == 0, done.stdout
    assert "t2i-adapter push --folder kept --model_id someone/kept" in done.stdout
    T2IAdapter.from_pretrained(work / "kept", local_files_only=True)


def test_the_guides_typo_is_refused_with_the_right_flag(work: Path):
    words = ["--pretrained_model_name_or_path=nano", "--dataset_name=./fill50k", "----gradient_accumulation_steps=4"]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], cwd=work, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "--gradient_accumulation_steps" in done.stderr
