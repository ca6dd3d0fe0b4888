"""Whole runs and pictures on a CUDA device: `pytest tests/gpu`. They are skipped without one."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.gpu import GPU, MARKS, with_train
from support.runs import losses, tiny_config, train_words
from support.tiny import write_adapter

from t2i_adapter.config.tree import BaseOptions, Config, DataOptions, TrainOptions
from t2i_adapter.errors import Stopped
from t2i_adapter.models.open import open_base
from t2i_adapter.training import data
from t2i_adapter.training.update import Update
from t2i_adapter.verbs.train import run

pytestmark = MARKS


@pytest.fixture
def config(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> Config:
    changes = {"data.num_workers": DataOptions.num_workers, "train.max_steps": 6, "train.mixed_precision": "bf16"}
    changes |= {"optim.lr": 1e-3, "checkpoint.every": 3, "checkpoint.keep": None}
    return tiny_config(tiny_base, tiny_data, tmp_path / "run", changes)


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "diffusion_pytorch_model.safetensors")


def as_vector(folder: Path | str) -> torch.Tensor:
    return torch.cat([weight.double().flatten() for _, weight in sorted(weights(folder).items())])


# The same run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_stopped_and_resumed_run_continues_with_the_same_samples(config: Config, precision: Any):
    """Sums on a GPU may differ in their last bits, so the losses are close; other samples or noise are far apart."""
    config = with_train(config, mixed_precision=precision)
    stopped = replace(config, output_dir=f"{config.output_dir}-stopped")
    run(config)
    with pytest.raises(Stopped):
        run(stopped, stop_after=3)
    run(replace(stopped, checkpoint=replace(stopped.checkpoint, resume="auto")))
    assert losses(stopped.output_dir) == pytest.approx(losses(config.output_dir), rel=0.02)
    apart = as_vector(config.output_dir) - as_vector(stopped.output_dir)
    assert apart.norm() / as_vector(config.output_dir).norm() < 0.02


@pytest.mark.skipif(
    "deterministic" not in [field.name for field in fields(TrainOptions)],
    reason="this version has no option train.deterministic",
)
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_deterministic_run_resumed_is_the_run_left_alone_to_the_bit(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, precision: str
):
    """In processes of their own, because torch reads these settings when CUDA starts."""
    more = [f"--train.mixed_precision={precision}", "--train.deterministic", "--train.max_steps=6"]
    more += ["--checkpoint.every=3", "--optim.lr=1e-3"]
    alone, resumed = tmp_path / "alone", tmp_path / "resumed"
    for folder, resume in ((alone, []), (resumed, [f"--checkpoint.resume={alone / 'checkpoint-3'}"])):
        words = train_words(tiny_base, tiny_data, folder, *more, *resume)
        done = subprocess.run([sys.executable, "-m", "t2i_adapter", *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    straight, again = weights(alone), weights(resumed)
    assert all(torch.equal(straight[name], again[name]) for name in straight)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_has_the_losses_of_float32(config: Config, precision: Any):
    exact = with_train(replace(config, output_dir=f"{config.output_dir}-exact"), mixed_precision="no")
    half = with_train(config, mixed_precision=precision)
    run(exact)
    run(half)
    assert losses(half.output_dir) == pytest.approx(losses(exact.output_dir), rel=0.05)


# The host and the device ---------------------------------------------------------------------------------------------

WARM = 2
"""Updates before the watched ones: they make the optimiser's state and what is cached on the device."""


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"mixed_precision": "fp16"},
        {"gradient_accumulation_steps": 2, "noise_draws": 2, "ema_decay": 0.9},
        {"gradient_checkpointing": True},
    ],
    ids=["bf16", "fp16", "accumulation, draws, EMA", "checkpointed"],
)
def test_the_host_waits_for_the_device_in_no_update(
    config: Config, monkeypatch: pytest.MonkeyPatch, train: dict[str, Any]
):
    """CUDA itself raises where an update, from the batch's copy to the EMA, makes the host wait."""
    update_once, watched = Update.__call__, []

    def strict(update: Update, batches: Any) -> None:
        if update.step >= WARM:
            torch.cuda.set_sync_debug_mode("error")
            watched.append(update.step)
        try:
            update_once(update, batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Update, "__call__", strict)
    config = with_train(config, **train)
    run(replace(config, tracking=replace(config.tracking, log_every=6), checkpoint=replace(config.checkpoint, every=6)))
    assert watched == list(range(WARM, 6))


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_latents_and_noise_are_copied_from_pinned_memory(
    config: Config, monkeypatch: pytest.MonkeyPatch, workers: int
):
    move, pinned = data.to_device, Counter[str]()

    def watched(partial: Any, device: torch.device) -> Any:
        large = {name: value for name, value in vars(partial).items() if getattr(value, "ndim", 0) > 2}
        pinned.update(name for name, value in large.items() if value.is_pinned())
        assert all(value.is_pinned() for value in large.values())
        return move(partial, device)

    monkeypatch.setattr(data, "to_device", watched)
    run(replace(config, data=replace(config.data, num_workers=workers)))
    assert pinned["moments"] == pinned["condition"] == pinned["noise"] == 6


def test_a_run_returns_its_memory(config: Config):
    run(config)  # the first run also makes what CUDA's libraries keep, such as cuBLAS' workspace
    gc.collect()
    before = torch.cuda.memory_allocated()
    run(replace(config, output_dir=f"{config.output_dir}-again"))
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 2**20


def test_a_run_does_not_read_memory_that_it_did_not_write(config: Config):
    """All memory that torch makes without content is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        run(config)
    finally:
        torch.use_deterministic_algorithms(False)
    assert np.isfinite(losses(config.output_dir)).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is only one CUDA device")
def test_two_cards_train_as_one(tiny_base: Path, tiny_data: Path, tmp_path: Path):
    found = {}
    for cards in (1, 2):
        more = [f"--train.batch_size={4 // cards}", "--train.max_steps=4", "--tracking.log_every=1"]
        words = train_words(tiny_base, tiny_data, tmp_path / str(cards), *more)
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={cards}", "-m", "t2i_adapter"]
        done = subprocess.run([sys.executable, *launch, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        found[cards] = losses(tmp_path / str(cards))
    assert found[2] == pytest.approx(found[1], rel=1e-3)


# The frozen models and pictures --------------------------------------------------------------------------------------


def test_encoders_give_the_cpu_s_latents_and_text_states():
    base = open_base(BaseOptions())
    torch.manual_seed(0)
    picture = torch.rand(2, 3, 128, 128) * 2 - 1
    found = []
    for device in (torch.device("cpu"), GPU):
        with torch.no_grad():
            moments = base.latent_encoder(device).encode(picture)
            states = base.text_encoder(device, torch.float32).encode(["a red circle", ""])
        found.append([torch.as_tensor(value).float().cpu().flatten() for value in (moments, states[0], states[1])])
    for ours, theirs in zip(*found, strict=True):
        assert torch.cosine_similarity(ours, theirs, dim=0) > 0.999


@pytest.mark.parametrize(
    "options", [{}, {"offload": "model"}, {"offload": "sequential"}, {"quantize": "int8"}], ids=str
)
def test_a_picture_is_the_cpu_s(tiny_base: Path, tmp_path: Path, options: dict[str, Any]):
    """In float32; int8 draws nearly the same one."""
    from t2i_adapter import api

    adapter = write_adapter(tmp_path / "adapter", tiny_base)
    condition = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    pictures = []
    for device, more in (("cpu", {}), ("cuda", options)):
        loaded = api.load(adapter, device=device, precision="fp32", **more)
        [picture] = api.generate(loaded, "red circle", condition, seed=3, steps=3)
        pictures.append(np.asarray(picture).astype(int))
    assert np.abs(pictures[0] - pictures[1]).mean() < (8 if options.get("quantize") else 1)
