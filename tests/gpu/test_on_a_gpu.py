"""Tests that need a CUDA device: `pytest tests/gpu`. They are skipped without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.runs import tiny_config

from t2i_adapter.batches.example import example_batch
from t2i_adapter.config.tree import (
    AdapterOptions,
    BaseOptions,
    Config,
    DataOptions,
)
from t2i_adapter.errors import Stopped
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.open import open_base
from t2i_adapter.models.quantize import FORMATS
from t2i_adapter.training.frozen_model import load_frozen_model
from t2i_adapter.training.memory import Shapes
from t2i_adapter.training.step import batch_losses
from t2i_adapter.verbs.train import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.timeout(1200),
]
GPU = torch.device("cuda")


@pytest.fixture
def config(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> Config:
    changes = {"data.num_workers": DataOptions.num_workers, "train.max_steps": 6, "train.mixed_precision": "bf16"}
    changes |= {"optim.lr": 1e-3, "checkpoint.every": 3, "checkpoint.keep": None}
    return tiny_config(tiny_base, tiny_data, tmp_path / "run", changes)


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "diffusion_pytorch_model.safetensors")


def with_train(config: Config, **changes: Any) -> Config:
    return replace(config, train=replace(config.train, **changes))


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_run_stopped_and_resumed_is_the_run_left_alone(config: Config, precision: Any):
    config = with_train(config, mixed_precision=precision)
    stopped = replace(config, output_dir=f"{config.output_dir}-stopped")
    run(config)
    with pytest.raises(Stopped):
        run(stopped, stop_after=3)
    run(replace(stopped, checkpoint=replace(stopped.checkpoint, resume="auto")))
    straight, resumed = weights(config.output_dir), weights(stopped.output_dir)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def gradient(config: Config, kind: str = "none", compile_kind: str = "off") -> torch.Tensor:
    """The adapter's gradient on `nano`, bf16, as one vector, of the third step (graphs warm up)."""
    base = open_base(BaseOptions(quantize=kind))  # pyright: ignore[reportArgumentType]
    config = with_train(replace(config, base=base.options), compile=compile_kind)
    frozen = load_frozen_model(config, base, GPU, torch.bfloat16)
    torch.manual_seed(0)
    adapter = build_adapter(AdapterOptions(), base.unet_config).to(GPU)
    batch = example_batch(base.unet_config, 4, height=128, width=128, device=GPU)
    for _ in range(3):
        adapter.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            batch_losses(adapter, frozen, batch).mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in adapter.parameters()])


@pytest.mark.parametrize("kind", FORMATS)
def test_a_narrow_base_gives_the_wide_one_s_gradient(config: Config, kind: str):
    least = {"nf4": 0.95}.get(kind, 0.99)
    assert torch.cosine_similarity(gradient(config), gradient(config, kind), dim=0) > least


@pytest.mark.parametrize("kind", ["on", "graphs"])
def test_a_compiled_base_gives_the_plain_one_s_gradient(config: Config, kind: str):
    assert torch.cosine_similarity(gradient(config), gradient(config, compile_kind=kind), dim=0) > 0.999


def test_the_host_waits_for_the_device_in_no_step(config: Config, monkeypatch: pytest.MonkeyPatch):
    """CUDA itself raises where an update makes the host wait."""
    from t2i_adapter.training.update import Update

    apply = Update._apply

    def watched(update: Update) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            apply(update)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Update, "_apply", watched)
    run(replace(config, tracking=replace(config.tracking, log_every=6)))


def test_the_memory_of_a_step_is_foretold(config: Config):
    """Within a tenth of what torch's allocator then holds."""
    config = with_train(replace(config, base=BaseOptions()), mixed_precision="no")
    base = open_base(config.base)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    frozen = load_frozen_model(config, base, GPU, torch.float32)
    adapter = build_adapter(AdapterOptions(), base.unet_config).to(GPU)
    batch = example_batch(base.unet_config, 32, height=256, width=256, device=GPU)
    batch_losses(adapter, frozen, batch).mean().backward()
    taken = torch.cuda.max_memory_allocated() - before
    foretold = Shapes(config, base, adapter, torch.float32).memory(32, height=256, width=256)
    assert foretold.base + foretold.adapter + foretold.step == pytest.approx(taken, rel=0.1)
