"""The forecast of `plan` against the bytes of real tensors, and its texts."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from t2i_adapter.batches.example import example_batch
from t2i_adapter.cli import main
from t2i_adapter.config.tree import AdapterOptions, BaseOptions, Config, TrainOptions
from t2i_adapter.diffusion.schedule import NoiseSchedule
from t2i_adapter.errors import UserError
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.base import enable_gradient_checkpointing
from t2i_adapter.models.open import open_base
from t2i_adapter.models.quantize import FORMATS, quantize
from t2i_adapter.training.memory import Shapes
from t2i_adapter.training.step import FrozenModel, batch_losses
from t2i_adapter.verbs.plan import PlanOptions, card_bytes

MIB = 2**20
RUN = "--data.resolution 128 --data.num_workers 0 --tracking.report_to none --train.seed 0 --train.cpu_threads 1"


def shapes(kind: str = "none", blocks: str | None = None) -> Shapes:
    base = open_base(BaseOptions(quantize=kind))  # pyright: ignore[reportArgumentType]
    train = TrainOptions(gradient_checkpointing=blocks is not None, checkpoint_blocks=blocks or "all")  # pyright: ignore[reportArgumentType]
    config = replace(Config(), base=base.options, train=train)
    return Shapes(config, base, build_adapter(AdapterOptions(), base.unet_config), torch.float32)


@pytest.mark.parametrize("kind", ["none", *FORMATS])
def test_the_base_has_the_bytes_that_its_tensors_have(kind: str):
    base = open_base(BaseOptions())
    unet = base.unet("cpu", torch.float32)
    if kind != "none":
        quantize(unet, kind, "cpu")  # pyright: ignore[reportArgumentType]
    real = sum(tensor.nbytes for tensor in (*unet.parameters(), *unet.buffers()))
    assert shapes(kind).memory(1, height=64, width=64).base == real


@pytest.mark.parametrize("blocks", [None, "large", "all"])
def test_a_step_keeps_what_it_was_said_to_keep(blocks: str | None):
    """Against the tensors that a real forward pass holds for its backward pass, weights left out."""
    base = open_base(BaseOptions())
    unet = base.unet("cpu", torch.float32)
    if blocks:
        enable_gradient_checkpointing(unet, blocks)  # pyright: ignore[reportArgumentType]
    adapter = build_adapter(AdapterOptions(), base.unet_config)
    frozen = FrozenModel(unet, NoiseSchedule.of(base.scheduler()), base.latent_scale, torch.float32)
    own = {p.untyped_storage().data_ptr() for p in (*unet.parameters(), *unet.buffers(), *adapter.parameters())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = batch_losses(adapter, frozen, example_batch(base.unet_config, 8, height=128, width=128)).mean()
    held = sum(kept.values())
    foretold = shapes(blocks=blocks).memory(8, height=128, width=128).step
    assert loss.requires_grad
    # The peak is above what is held: the batch, and what one operation or one recomputed block needs on top
    assert held < foretold < 1.6 * held + 24 * MIB


def test_memory_falls_with_every_means():
    steps = [shapes(blocks=blocks).memory(8, height=128, width=128).step for blocks in (None, "large", "all")]
    assert steps[0] > 1.3 * steps[1] > 1.3 * 1.3 * steps[2]
    bases = [shapes(kind).memory(1, height=64, width=64).base for kind in ("none", "int8", "nf4")]
    assert bases[0] > bases[1] > bases[2]


def test_a_plan_for_another_card_measures_nothing_and_tells_the_largest_batch(
    tiny_data: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["plan", "--card", "8GB", *f"{RUN} --data {tiny_data}".split()]) == 0
    told = capsys.readouterr().out
    assert "not measured on 8GB" in told and "largest micro-batch" in told and "8.0 GiB on 8GB" in told


def test_a_probe_tells_samples_and_hours(tiny_data: Path, capsys: pytest.CaptureFixture[str]):
    options = f"{RUN} --data {tiny_data} --train.batch_size 2 --train.max_steps 1000"
    assert main(["plan", *options.split()]) == 0
    told = capsys.readouterr().out
    hours, rate = re.search(r"([\d.]+) hours of steps at ([\d.]+) samples/s", told).groups()  # pyright: ignore[reportOptionalMemberAccess]
    assert float(hours) == pytest.approx(2000 / float(rate) / 3600, abs=0.011)


def test_a_recipe_is_planned_with_flags_on_top(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "recipe.yaml").write_text(f"data: {{location: {tiny_data}, resolution: 64}}\ntrain: {{batch_size: 3}}")
    words = [
        "plan",
        "--recipe",
        str(tmp_path / "recipe.yaml"),
        "--train.gradient_accumulation_steps",
        "5",
        "--no_probe",
    ]
    assert main(words) == 0
    assert "15 = 3 x 5 accumulated" in capsys.readouterr().out


def test_an_unknown_card_is_one_line():
    with pytest.raises(
        UserError, match=r"--card Voodoo: unknown card; write its memory, such as 24GB, or one of RTX 3060"
    ):
        PlanOptions(card="Voodoo")
    assert card_bytes("rtx4090") == card_bytes("24 GB") == 24 * 2**30
