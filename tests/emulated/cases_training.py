"""Runs of `train` on the emulated device: every set-up trains, and in no update the host waits for the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.emulated import device
from support.emulated.device import Wait
from support.runs import losses, tiny_config

from t2i_adapter.config.read import with_values
from t2i_adapter.config.tree import Config
from t2i_adapter.errors import Stopped
from t2i_adapter.training import nonfinite
from t2i_adapter.training.setup import make_trainer, set_up
from t2i_adapter.types import Batch
from t2i_adapter.verbs.train import run

INSIDE = ("training/update.py:__call__", "training/data.py:finish")
"""Functions that make an update, and that bring a batch to the device: both run in every step."""
FIRST = {"batches/encoders.py:_has_finite": 2, "models/base.py:freeze": None}
"""Inside them, what happens once a run, and how often it waits: the first encoded pictures and captions are checked,
and an encoder is loaded for them, weight by weight."""
OUTSIDE = {
    # before the first update
    "cache/images.py:_encoded": "pictures go to the encoder, and its moments come back",
    "cache/texts.py:<genexpr>": "captions' states come back",
    "diffusion/schedule.py:to": "the noise schedule",
    "models/base.py:freeze": "a frozen network",
    "models/quantize.py:__init__": "a matrix to quantise",
    "training/frozen_model.py:_unet": "the UNet, quantised",
    "training/update.py:__init__": "the adapter",
    # when a run logs
    "training/meter.py:read": "the sums since the last entry",
    "training/nonfinite.py:all": "which steps were skipped",
    "training/loop.py:_log": "fp16's scale",
    # when it saves
    "training/checkpoint.py:<dictcomp>": "weights and the optimiser's state",
    "training/update.py:state": "fp16's scale",
    "export/adapter.py:<dictcomp>": "the adapter",
}
"""The innermost function of each wait outside an update -> what is read or copied there."""

SETS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"train.mixed_precision": "bf16", "train.ema_decay": 0.9},
    "fp16": {"train.mixed_precision": "fp16", "train.gradient_accumulation_steps": 2},
    "draws": {"train.noise_draws": 3, "train.gradient_accumulation_steps": 2, "objective.min_snr_gamma": 5.0},
    "muon": {"optim.name": "muon", "train.mixed_precision": "bf16"},
    "muon in fp16": {"optim.name": "muon", "train.mixed_precision": "fp16"},
    "checkpointing": {"train.gradient_checkpointing": True, "train.mixed_precision": "bf16"},
    "int8": {"base.quantize": "int8", "train.mixed_precision": "bf16"},
    "nf4": {"base.quantize": "nf4", "train.mixed_precision": "bf16"},
    "float8": {"base.quantize": "float8", "train.mixed_precision": "bf16"},
    "live captions": {"data.text_cache": "live", "train.mixed_precision": "bf16"},
    "no cache, long captions": {"data.cache": "none", "data.max_tokens": 150},
    "workers": {"data.num_workers": 2, "train.on_nonfinite": "skip", "train.mixed_precision": "bf16"},
}
MORE: dict[str, dict[str, Any]] = {
    "large blocks": {"train.gradient_checkpointing": True, "train.checkpoint_blocks": "large"},
    "all at once": {
        "optim.name": "muon",
        "base.quantize": "nf4",
        "data.cache": "none",
        "data.num_workers": 1,
        "train.mixed_precision": "fp16",
        "train.ema_decay": 0.9,
        "train.noise_draws": 2,
        "train.gradient_accumulation_steps": 2,
        "train.gradient_checkpointing": True,
    },
    "channels last": {"train.channels_last": True, "train.mixed_precision": "bf16"},
    "v-prediction draws in fp16": {"train.noise_draws": 4, "train.mixed_precision": "fp16"},
    "one channel": {"adapter.in_channels": 1, "train.mixed_precision": "bf16"},
}
"""Set-ups for `make soak`."""


@pytest.fixture
def config(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> Config:
    changes = {"train.max_steps": 4, "tracking.log_every": 2, "checkpoint.every": 2, "validation.budget": 0}
    return tiny_config(tiny_base, tiny_data, tmp_path / "run", {**changes, "data.prepared_dir": str(tmp_path / "data")})


def in_an_update(waits: Sequence[Wait]) -> list[Wait]:
    """The waits in an update or in making a batch, without those in functions of FIRST. A wait outside the package is
    one of a backward pass, which autograd makes in a thread of its own."""
    return [
        wait
        for wait in waits
        if (not wait.inside or not set(INSIDE).isdisjoint(wait.inside)) and set(FIRST).isdisjoint(wait.inside)
    ]


def outside(waits: Sequence[Wait]) -> set[str]:
    """The innermost functions of the other waits."""
    return {wait.inside[-1] for wait in waits if wait.inside and set(INSIDE).isdisjoint(wait.inside)}


def train(config: Config, changes: dict[str, Any], tmp_path: Path) -> tuple[list[float], list[Wait]]:
    config = with_values(config, {**changes, "output_dir": str(tmp_path / "run")})
    with device.waits() as waits:
        run(config)
    return losses(config.output_dir), waits


@pytest.mark.parametrize(
    "changes",
    [
        *(pytest.param(value, id=name) for name, value in SETS.items()),
        *(pytest.param(value, id=name, marks=pytest.mark.soak) for name, value in MORE.items()),
    ],
)
def test_in_no_update_the_host_waits(config: Config, tmp_path: Path, changes: dict[str, Any]):
    logged, waits = train(config, changes, tmp_path)
    assert len(logged) == 2 and all(0 < loss < 4 for loss in logged)
    assert waits, "the waits of loading and saving were heard"
    assert in_an_update(waits) == []
    for function, most in FIRST.items():
        assert most is None or sum(function in wait.inside for wait in waits) <= most
    assert outside(waits) <= set(OUTSIDE)


def test_a_wait_in_an_update_would_be_seen(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As the NaN guard waits for an optimiser that does not read `found_inf`."""
    monkeypatch.setattr(nonfinite, "supports_found_inf", lambda optimizer: False)
    waits = in_an_update(train(config, {}, tmp_path)[1])
    assert len(waits) >= 4 and {wait.inside[-1] for wait in waits} == {"training/nonfinite.py:allows"}


@pytest.mark.parametrize(
    "changes",
    [SETS["bf16"], SETS["muon in fp16"]],
    ids=["bf16, EMA", "muon in fp16"],
)
def test_a_run_stopped_and_resumed_is_the_run_left_alone(config: Config, changes: dict[str, Any]):
    config = with_values(config, {**changes, "optim.lr": 1e-3, "optim.warmup_steps": 0})
    stopped = with_values(config, {"output_dir": f"{config.output_dir}-stopped"})
    run(config)
    with pytest.raises(Stopped):
        run(stopped, stop_after=2)
    with device.waits() as waits:
        run(with_values(stopped, {"checkpoint.resume": "auto"}))
    assert in_an_update(waits) == []
    straight, resumed = weights(config), weights(stopped)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_with_nan_is_skipped_and_the_host_waits_only_to_report_it(config: Config, optimizer: str):
    """The skipped update changes no weight: the run is the one whose learning rate is 0 in that step."""
    changes = {"train.on_nonfinite": "skip", "tracking.log_every": 4, "checkpoint.every": 1, "checkpoint.keep": None}
    config = with_values(config, {**changes, "optim.name": optimizer, "optim.lr": 1e-3, "optim.warmup_steps": 0})
    Path(config.output_dir).mkdir()
    setup = set_up(config)
    trainer = make_trainer(setup, setup.prepare_data())
    build = trainer.batches

    def with_nan(start: int) -> Iterator[Batch]:
        for step, batch in enumerate(build(start), start):
            yield replace(batch, noise=batch.noise * torch.nan) if step == 2 else batch

    trainer.batches = with_nan
    with device.waits() as waits:
        trainer.fit()
    assert trainer.skipped_steps == 1
    assert in_an_update(waits) == [], "the step was found when the run saved"
    before, after, last = (
        load_file(Path(config.output_dir) / f"checkpoint-{step}" / "t2iadapter" / "diffusion_pytorch_model.safetensors")
        for step in (2, 3, 4)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(after[name], last[name]) for name in after)
    assert all(value.isfinite().all() for value in last.values())


def weights(config: Config) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir) / "diffusion_pytorch_model.safetensors")
