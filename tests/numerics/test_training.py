"""Runs on the tiny base: what must not change a run's numbers, and what must."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.runs import losses, tiny_config
from support.tiny import write_tiny_sdxl

from t2i_adapter.config.read import with_values
from t2i_adapter.config.tree import (
    AdapterOptions,
    BaseOptions,
    Config,
    ObjectiveOptions,
    ValidationOptions,
)
from t2i_adapter.diffusion.schedule import NoiseSchedule
from t2i_adapter.errors import UserError
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.open import open_base
from t2i_adapter.training.step import FrozenModel, batch_losses
from t2i_adapter.types import Batch
from t2i_adapter.verbs.train import run

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def config(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> Config:
    changes = {"data.proportion_empty_prompts": 0.3, "train.max_steps": 6, "checkpoint.every": 3}
    changes |= {"optim.lr": 1e-3, "optim.schedule": "cosine", "optim.warmup_steps": 2}
    return tiny_config(tiny_base, tiny_data, tmp_path / "run", changes)


def moved(config: Config, name: str, **changes: Any) -> Config:
    return replace(config, output_dir=str(Path(config.output_dir).parent / name), **changes)


def weights(config: Config) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir) / WEIGHTS)


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def random_batch(base_config: dict[str, Any], size: int = 2) -> Batch:
    width = base_config["projection_class_embeddings_input_dim"] - 6 * base_config["addition_time_embed_dim"]
    torch.manual_seed(0)
    return Batch(
        moments=torch.rand(size, 8, 8, 8),
        condition=torch.rand(size, 3, 64, 64),
        text=torch.randn(size, 77, base_config["cross_attention_dim"]),
        pooled=torch.randn(size, width),
        time_ids=torch.tensor([[64, 64, 0, 0, 64, 64]] * size),
        timesteps=torch.tensor([100, 900][:size]),
        noise=torch.randn(size, 4, 8, 8),
        latent_noise=torch.randn(size, 4, 8, 8),
        keys=tuple(map(str, range(size))),
    )


EFFICIENT = {"optim.name": "muon", "train.noise_draws": 2, "objective.stratify": True}


CHANGES = {
    "plain": {},
    "average": {"train.ema_decay": 0.9},
    "efficient": EFFICIENT,
    "cpu_threads": {"train.cpu_threads": 2},
}


@pytest.mark.parametrize("changes", list(CHANGES.values()), ids=list(CHANGES))
def test_a_resumed_run_is_the_straight_run_to_the_bit(config: Config, changes: dict[str, Any]):
    config = with_values(config, changes)
    straight = moved(config, "straight")
    run(straight)
    first = moved(config, "stopped", train=replace(config.train, max_steps=6))
    # The learning rate's shape depends on the total, so the run is not shortened but stopped: its later part is lost.
    run(first)
    folder = Path(first.output_dir)
    for late in ("checkpoint-6", WEIGHTS):
        path = folder / late
        path.rename(folder / f"lost-{path.name}")
    run(replace(first, checkpoint=replace(first.checkpoint, resume="latest")))
    assert losses(first.output_dir) == losses(straight.output_dir)
    assert_same_bits(weights(first), weights(straight))
    assert_same_bits(
        load_file(folder / "checkpoint-6" / "training.safetensors"),
        load_file(Path(straight.output_dir) / "checkpoint-6" / "training.safetensors"),
    )


def test_a_run_may_be_prolonged_and_says_what_changed(config: Config, capsys: pytest.CaptureFixture[str]):
    config = replace(config, optim=replace(config.optim, schedule="constant"))
    run(config)
    longer = replace(
        config,
        train=replace(config.train, max_steps=8),
        checkpoint=replace(config.checkpoint, resume="latest"),
    )
    run(longer)
    assert "train.max_steps 6 -> 8" in capsys.readouterr().out
    assert len(losses(longer.output_dir)) == 8


@pytest.mark.parametrize(("batch", "accumulate"), [(1, 4), (2, 2)])
def test_accumulation_does_not_change_the_numbers(config: Config, batch: int, accumulate: int):
    whole = moved(config, "whole", train=replace(config.train, batch_size=4))
    parts = moved(
        config, "parts", train=replace(config.train, batch_size=batch, gradient_accumulation_steps=accumulate)
    )
    run(whole)
    run(parts)
    # Sums over 4 samples in another order: float32 rounding, 1e-7 a step, carried through 6 updates
    assert losses(parts.output_dir) == pytest.approx(losses(whole.output_dir), rel=1e-5)


def test_the_seed_decides_everything(config: Config):
    again, other = moved(config, "again"), moved(config, "other", train=replace(config.train, seed=6))
    for one in (config, again, other):
        run(one)
    assert losses(again.output_dir) == losses(config.output_dir)
    assert_same_bits(weights(again), weights(config))
    assert losses(other.output_dir) != losses(config.output_dir)


@pytest.mark.parametrize(
    ("prediction", "zero_snr"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
def test_learning_lowers_the_loss_on_a_fixed_batch(tmp_path: Path, prediction: str, zero_snr: bool):
    base = open_base(
        BaseOptions(name=str(write_tiny_sdxl(tmp_path / "base", prediction_type=prediction, zero_snr=zero_snr)))
    )
    frozen = FrozenModel(
        base.unet("cpu", torch.float32), NoiseSchedule.of(base.scheduler()), base.latent_scale, torch.float32
    )
    torch.manual_seed(0)
    adapter = build_adapter(AdapterOptions(), base.unet_config)
    batch = random_batch(base.unet_config)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=3e-3)
    history = []
    for _ in range(25):
        loss = batch_losses(adapter, frozen, batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    assert history[-1] < 0.97 * history[0]


def test_frozen_means_frozen_and_every_weight_of_the_adapter_learns(tiny_base: Path):
    base = open_base(BaseOptions(name=str(tiny_base)))
    unet = base.unet("cpu", torch.float32)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    frozen = FrozenModel(unet, NoiseSchedule.of(base.scheduler()), base.latent_scale, torch.float32)
    adapter = build_adapter(AdapterOptions(), base.unet_config)
    batch_losses(adapter, frozen, random_batch(base.unet_config)).mean().backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in unet.parameters())
    assert_same_bits(dict(unet.state_dict()), before)
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_gradient_checkpointing_gives_the_same_gradients(tiny_base: Path):
    base = open_base(BaseOptions(name=str(tiny_base)))
    gradients = []
    for checkpointing in (False, True):
        unet = base.unet("cpu", torch.float32)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        frozen = FrozenModel(unet, NoiseSchedule.of(base.scheduler()), base.latent_scale, torch.float32)
        torch.manual_seed(0)
        adapter = build_adapter(AdapterOptions(), base.unet_config)
        batch_losses(adapter, frozen, random_batch(base.unet_config)).mean().backward()
        gradients.append([parameter.grad for parameter in adapter.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_a_quiet_start_scales_every_feature_and_hardly_moves_the_base(tiny_base: Path):
    unet_config = open_base(BaseOptions(name=str(tiny_base))).unet_config
    torch.manual_seed(0)
    loud = build_adapter(AdapterOptions(), unet_config)
    for name, parameter in loud.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    torch.manual_seed(0)
    quiet = build_adapter(AdapterOptions(init="quiet"), unet_config)
    picture = torch.rand(1, 3, 64, 64)
    for a, b in zip(loud(picture), quiet(picture), strict=True):
        torch.testing.assert_close(b, 0.01 * a, rtol=1e-4, atol=1e-7)
    silent = build_adapter(AdapterOptions(init="zero"), unet_config)
    assert all(not feature.any() for feature in silent(picture))
    sum(feature.sum() for feature in silent(picture)).backward()
    gradient = silent.get_parameter("adapter.conv_in.weight").grad
    assert gradient is not None and gradient.abs().sum() > 0, "a start of zeros that could not learn is no start"


def test_bf16_trains_and_lies_near_float32(config: Config):
    run(config)
    half = moved(config, "bf16", train=replace(config.train, mixed_precision="bf16"))
    run(half)
    # bf16 has 8 bits: 4e-3 an operation; the mean of a loss near 1 over 512 latent values stays within a few per cent
    assert losses(half.output_dir) == pytest.approx(losses(config.output_dir), rel=0.05)
    assert all(value.dtype == torch.float32 for value in weights(half).values())


def test_fp16_without_a_gpu_says_so_and_computes_in_fp32(config: Config, capsys: pytest.CaptureFixture[str]):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    run(moved(config, "plain"))
    half = moved(config, "half", train=replace(config.train, mixed_precision="fp16"))
    run(half)
    assert "train.mixed_precision fp16 needs a GPU" in capsys.readouterr().out
    assert_same_bits(weights(half), weights(moved(config, "plain")))


@pytest.mark.parametrize(
    "changes", [{"min_snr_gamma": 0.01}, {"noise_offset": 0.1}, {"timesteps": "uniform"}, {"stratify": True}]
)
def test_objective_options_change_the_loss(config: Config, changes: dict[str, Any]):
    run(config)
    other = moved(config, "other", objective=ObjectiveOptions(**changes))
    run(other)
    assert losses(other.output_dir) != losses(config.output_dir)


def test_validation_draws_in_bf16_too(config: Config, tiny_data: Path):
    picture = next((tiny_data / "test").glob("*_*.png"))
    seen = moved(
        config,
        "half-validated",
        train=replace(config.train, mixed_precision="bf16"),
        validation=ValidationOptions(("red circle",), (str(picture),), num_images=1, every=100, steps=2),
    )
    run(seen)
    assert (Path(seen.output_dir) / "validation" / "step-000000" / "0.png").is_file()


def test_validation_draws_the_first_the_due_and_the_last_and_changes_nothing(config: Config, tiny_data: Path):
    run(config)
    picture = next((tiny_data / "test").glob("*_*.png"))
    seen = moved(
        config,
        "validated",
        validation=ValidationOptions(("red circle", "blue circle"), (str(picture),), num_images=2, every=4, steps=2),
    )
    run(seen)
    folder = Path(seen.output_dir) / "validation"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000000", "step-000004", "step-000006"]
    assert sorted(path.name for path in (folder / "step-000004").iterdir()) == ["0.png", "1.png"]
    assert_same_bits(weights(seen), weights(config))


def test_a_new_run_does_not_mix_into_an_old_ones_folder(config: Config):
    run(config)
    kept = weights(config)
    with pytest.raises(UserError, match="checkpoint-6 of an earlier run.*--checkpoint.resume auto"):
        run(config)
    assert_same_bits(weights(config), kept)


def test_a_nan_loss_stops_the_run_and_saves_nothing(config: Config):
    wild = replace(config, optim=replace(config.optim, lr=1e30, schedule="constant"))
    with pytest.raises(UserError, match="NaN or inf in the gradient.*--optim.lr"):
        run(wild)
    assert not list(Path(wild.output_dir).glob("checkpoint-*"))
    assert not (Path(wild.output_dir) / WEIGHTS).exists()


def test_dry_run_writes_nothing(config: Config, capsys: pytest.CaptureFixture[str]):
    run(config, dry_run=True)
    printed = capsys.readouterr().out
    assert "updates        6 (1.50 epochs, 12 samples)" in printed and "lr: 0.001" in printed
    assert not Path(config.output_dir).exists()
