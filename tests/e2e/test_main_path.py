"""The main path of a user through the command line: data, train, kill, resume, generate, evaluate, reload."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLAdapterPipeline, T2IAdapter
from PIL import Image
from safetensors.torch import load_file
from support.runs import losses

from t2i_adapter.models import nano

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24


def cli(*words: str, cwd: Path, timeout: int = 240) -> str:
    """Runs `t2i-adapter WORDS` and returns its output; fails the test with the output if the command fails."""
    return python("-m", "t2i_adapter", *words, cwd=cwd, timeout=timeout)


def python(*words: str, cwd: Path, timeout: int = 240, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


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
    cli("make-data", "shapes", "--out", "data", "--num", "32", "--num_test", "6", cwd=folder)
    printed = cli(*train_words("straight"), cwd=folder)
    assert "training pairs 32" in printed and "updates        24" in printed
    return folder


def test_a_killed_run_goes_on_to_the_same_bits(work: Path):
    command = [sys.executable, "-m", "t2i_adapter", *train_words("killed")]
    running = subprocess.Popen(command, cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (work / "killed" / "checkpoint-8").is_dir() and running.poll() is None:
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait(timeout=30)
    assert not (work / "killed" / "diffusion_pytorch_model.safetensors").exists(), "the run had ended before the kill"
    printed = cli(*train_words("killed", "--checkpoint.resume", "latest"), cwd=work)
    assert "Resuming from killed/checkpoint-" in printed
    for name in ("diffusion_pytorch_model.safetensors", "checkpoint-24/training.safetensors"):
        straight, killed = load_file(work / "straight" / name), load_file(work / "killed" / name)
        assert all(torch.equal(straight[key], killed[key]) for key in straight)
    assert losses(work / "killed") == losses(work / "straight")


def test_two_processes_learn_from_the_same_samples_as_one(work: Path):
    env = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    words = train_words("two")
    words[words.index("--train.batch_size") + 1] = "2"
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "t2i_adapter"]
    printed = python(*launch, *words, cwd=work, env=env, timeout=400)
    assert "4 = 2 x 1 accumulated x 2 processes" in printed
    # The mean of two half batches rounds differently in float32; 24 updates at a high learning rate amplify that.
    assert losses(work / "two") == pytest.approx(losses(work / "straight"), rel=1e-3)
    assert losses(work / "two")[0] == pytest.approx(losses(work / "straight")[0], rel=1e-6)


def test_generate_writes_a_picture_and_the_command_that_repeats_it(work: Path):
    condition = next((work / "data" / "test").glob("*_cond.png"))
    words = ["generate", "--adapter", "straight", "--prompt", "red circle with blue background", "--image"]
    cli(*words, str(condition), "--steps", "3", "--num", "2", "--out", "drawn", cwd=work)
    pictures = sorted((work / "drawn").glob("*.png"))
    assert len(pictures) == 2 and Image.open(pictures[0]).size == (128, 128)
    record = json.loads(pictures[0].with_suffix(".json").read_text())
    assert record["options"]["prompt"] == ["red circle with blue background"]
    again = shlex.split(record["command"])
    again[again.index("--out") + 1] = "again"
    cli(*again[1:], cwd=work)
    first, alone = (np.asarray(Image.open(path)).astype(int) for path in (pictures[0], work / "again" / "00000.png"))
    # The first came from a batch of two, which rounds differently: at most two levels of 8 bits.
    assert np.abs(first - alone).max() <= 2


def test_evaluate_writes_its_three_files(work: Path):
    words = ["evaluate", "--adapter", "straight", "--data", "data", "--num", "4", "--steps", "3", "--out", "measured"]
    printed = cli(*words, cwd=work)
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
    cli(*words, cwd=work)
    before = load_file(work / "straight" / "diffusion_pytorch_model.safetensors")
    after = load_file(work / "continued" / "diffusion_pytorch_model.safetensors")
    # Two updates during warm-up, at a learning rate of at most 1e-4, change no weight by more than this.
    assert max(float((after[key] - before[key]).abs().max()) for key in before) < 1e-3


def test_a_folder_in_use_is_refused_and_left_alone(work: Path):
    command = [sys.executable, "-m", "t2i_adapter", *train_words("busy", "--train.max_steps", "4000")]
    running = subprocess.Popen(command, cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (work / "busy" / "options.yaml").is_file():
            assert time.monotonic() < deadline and running.poll() is None
            time.sleep(0.05)
        second = subprocess.run(
            [sys.executable, "-m", "t2i_adapter", *train_words("busy")],
            cwd=work,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert second.returncode == 2
        assert f"in use by another run (process {running.pid})" in second.stderr
        assert "Traceback" not in second.stderr
    finally:
        running.kill()
        running.wait(timeout=30)
