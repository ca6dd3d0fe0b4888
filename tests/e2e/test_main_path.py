"""The main path of a user through the command line: data, train, kill, resume, generate, evaluate, reload.

The first command is a program of its own. The others are processes forked from this one, which has the libraries.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLAdapterPipeline, T2IAdapter
from PIL import Image
from safetensors.torch import load_file
from support.processes import Run, finish, ranks, until
from support.runs import losses

from t2i_adapter.models import nano

STEPS = 24


pytestmark = pytest.mark.usefixtures("nothing_is_left_running")


def train_words(out: str, *more: str) -> list[str]:
    return [
        *("train", "--output_dir", out, "--data", "data", "--data.resolution", "128"),
        *("--train.max_steps", str(STEPS), "--train.batch_size", "4", "--train.seed", "3", "--optim.lr", "1e-3"),
        *("--checkpoint.every", "8", "--tracking.log_every", "1", "--tracking.report_to", "none", *more),
    ]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/ (32 + 6 pairs) and straight/, a finished run."""
    folder = tmp_path_factory.mktemp("main")
    words = [
        sys.executable,
        "-m",
        "t2i_adapter",
        "make-data",
        "shapes",
        "--out",
        "data",
        "--num",
        "32",
        "--num_test",
        "6",
    ]
    subprocess.run(words, cwd=folder, check=True, timeout=240)
    printed = finish(folder, *train_words("straight"))
    assert "training pairs 32" in printed and "updates        24" in printed
    return folder


def test_a_killed_run_goes_on_to_the_same_bits(work: Path):
    running = Run(work, *train_words("killed"))
    until(lambda: (work / "killed" / "checkpoint-8").is_dir())
    running.send(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert not (work / "killed" / "diffusion_pytorch_model.safetensors").exists(), "the run had ended before the kill"
    printed = finish(work, *train_words("killed", "--checkpoint.resume", "latest"))
    assert "Resuming from killed/checkpoint-" in printed
    for name in ("diffusion_pytorch_model.safetensors", "checkpoint-24/training.safetensors"):
        straight, killed = load_file(work / "straight" / name), load_file(work / "killed" / name)
        assert all(torch.equal(straight[key], killed[key]) for key in straight)
    assert losses(work / "killed") == losses(work / "straight")


def test_two_processes_learn_from_the_same_samples_as_one(work: Path):
    words = train_words("two")
    words[words.index("--train.batch_size") + 1] = "2"
    both = [Run(work, *words, env=env) for env in ranks(2)]
    for running in both:
        assert running.wait() == 0, running.said()
    printed = both[0].said()
    assert "4 = 2 x 1 accumulated x 2 processes" in printed
    # The mean of two half batches rounds differently in float32; 24 updates at a high learning rate amplify that.
    assert losses(work / "two") == pytest.approx(losses(work / "straight"), rel=1e-3)
    assert losses(work / "two")[0] == pytest.approx(losses(work / "straight")[0], rel=1e-6)


def test_generate_writes_a_picture_and_the_command_that_repeats_it(work: Path):
    condition = next((work / "data" / "test").glob("*_cond.png"))
    words = ["generate", "--adapter", "straight", "--prompt", "red circle with blue background", "--image"]
    finish(work, *words, str(condition), "--steps", "3", "--num", "2", "--out", "drawn")
    pictures = sorted((work / "drawn").glob("*.png"))
    assert len(pictures) == 2 and Image.open(pictures[0]).size == (128, 128)
    record = json.loads(pictures[0].with_suffix(".json").read_text())
    assert record["options"]["prompt"] == ["red circle with blue background"]
    again = shlex.split(record["command"])
    again[again.index("--out") + 1] = "again"
    finish(work, *again[1:])
    first, alone = (np.asarray(Image.open(path)).astype(int) for path in (pictures[0], work / "again" / "00000.png"))
    # The first came from a batch of two, which rounds differently: at most two levels of 8 bits.
    assert np.abs(first - alone).max() <= 2


def test_evaluate_writes_its_three_files(work: Path):
    words = ["evaluate", "--adapter", "straight", "--data", "data", "--num", "4", "--steps", "3", "--out", "measured"]
    printed = finish(work, *words)
    assert "iou" in printed
    result = json.loads((work / "measured" / "evaluation.json").read_text())
    assert result["num"] == 4
    for column in ("adapter", "other_condition", "no_adapter"):
        value = result["metrics"]["iou"][column]
        assert 0 <= value["ci95"][0] <= value["mean"] <= value["ci95"][1] <= 1
    assert (work / "measured" / "report.html").stat().st_size > 10_000
    assert Image.open(work / "measured" / "sheet.png").width >= 4 * 128


@pytest.mark.parametrize(("variant", "dtype"), [(None, torch.float32), ("fp16", torch.float16)])
def test_the_adapter_opens_in_diffusers(work: Path, variant: str | None, dtype: torch.dtype):
    adapter = T2IAdapter.from_pretrained(work / "straight", variant=variant, dtype=dtype, local_files_only=True)
    assert adapter.dtype == dtype
    pipeline = StableDiffusionXLAdapterPipeline.from_pretrained(nano.path(), adapter=adapter.to(torch.float32))
    pipeline.set_progress_bar_config(disable=True)
    condition = Image.open(next((work / "data" / "test").glob("*_cond.png")))
    drawn = pipeline("red circle", image=condition, num_inference_steps=2, height=128, width=128).images[0]
    assert drawn.size == (128, 128)


def test_training_starts_from_another_adapter(work: Path):
    words = train_words("continued", "--adapter.init_from", "straight")
    words[words.index("--train.max_steps") + 1] = "2"
    finish(work, *words)
    before = load_file(work / "straight" / "diffusion_pytorch_model.safetensors")
    after = load_file(work / "continued" / "diffusion_pytorch_model.safetensors")
    # Two updates during warm-up, at a learning rate of at most 1e-4, change no weight by more than this.
    assert max(float((after[key] - before[key]).abs().max()) for key in before) < 1e-3


def test_a_folder_in_use_is_refused_and_left_alone(work: Path):
    running = Run(work, *train_words("busy", "--train.max_steps", "4000"))
    until(lambda: (work / "busy" / "options.yaml").is_file())
    second = Run(work, *train_words("busy"))
    assert second.wait() == 2
    assert f"in use by another run (process {running.pid})" in second.said()
    assert "Traceback" not in second.said()
