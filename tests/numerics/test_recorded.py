"""A UNet that is recorded and replayed: the same bits, on several threads, for each shape; or a line and as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from t2i_adapter.config import (
    AdapterOptions,
    BaseOptions,
    CheckpointOptions,
    Config,
    DataOptions,
    TrackingOptions,
    TrainOptions,
)
from t2i_adapter.diffusion.schedule import NoiseSchedule
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.base import open_base
from t2i_adapter.training import recorded
from t2i_adapter.training.estimate import example_batch
from t2i_adapter.training.lanes import Lanes
from t2i_adapter.training.recorded import MOST, RECORD_AT, Recorded, is_recordable
from t2i_adapter.training.run import run
from t2i_adapter.training.step import Frozen, batch_losses

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def frozen(tiny_base: Path) -> Frozen:
    base = open_base(BaseOptions(name=str(tiny_base)))
    return Frozen(base.unet(CPU, torch.float32), NoiseSchedule.of(base.scheduler()), base.latent_scale, torch.float32)


@pytest.fixture
def adapter(frozen: Frozen) -> Any:
    torch.manual_seed(0)
    made = build_adapter(AdapterOptions(), frozen.unet.config)
    made.unet_config = frozen.unet.config
    return made


def gradients(adapter: Any, frozen: Frozen, samples: int, seed: int, threads: int = 2) -> list[Tensor]:
    torch.manual_seed(seed)
    batch = example_batch(adapter.unet_config, samples, height=64, width=64)
    adapter.zero_grad()
    Lanes(threads, adapter, lambda network, part: batch_losses(network, frozen, part)).add(batch, 0.1)
    return [parameter.grad.clone() for parameter in adapter.parameters()]


def test_replayed_on_two_threads_it_gives_the_same_bits(adapter: Any, frozen: Frozen):
    said: list[str] = []
    stand_in = Recorded(frozen.unet, said.append)
    replaying = frozen._replace(unet=stand_in)
    for seed in range(RECORD_AT + 2):  # parts of two and of three samples
        plain, got = gradients(adapter, frozen, 5, seed), gradients(adapter, replaying, 5, seed)
        assert all(map(torch.equal, plain, got)), f"update {seed}"
    assert len(stand_in._replays) == 2 and not said
    gradients(adapter, replaying, 2, 0)
    assert len(stand_in._replays) == 2, "a shape that is seldom met is not recorded"


def test_no_more_shapes_are_recorded_than_memory_is_for():
    stand_in = Recorded(lambda x: (x * 2,), print)
    for side in range(1, MOST + 4):
        for _ in range(RECORD_AT):
            (got,) = stand_in(torch.ones(side))
        assert torch.equal(got, torch.full((side,), 2.0))
    assert len(stand_in._replays) == MOST


class Undecided(torch.nn.Module):
    """What it does depends on the numbers, which no recording knows of."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        self.calls = getattr(self, "calls", 0) + 1
        return (x * self.calls,)


class Impossible(torch.nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        if torch.jit.is_tracing():
            raise NotImplementedError("not this one")
        return (x * 2,)


@pytest.mark.parametrize(("network", "why"), [(Undecided, "does not replay to the bit"), (Impossible, "not this one")])
def test_what_cannot_be_recorded_runs_as_it_is_and_says_so_once(network: Callable[[], Any], why: str):
    said: list[str] = []
    stand_in = Recorded(network(), said.append)
    for _ in range(3 * RECORD_AT):
        (got,) = stand_in(torch.ones(2, 2))
    assert isinstance(got, Tensor) and not stand_in._replays
    (line,) = said
    assert line.startswith("The UNet cannot be recorded here (") and why in line


def test_a_recorded_run_is_the_same_run(tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: Any):
    """Else one that stops and goes on, and so is recorded at another update, would not be the same."""
    found = []
    for record_at in (3, 10**6):
        monkeypatch.setattr(recorded, "RECORD_AT", record_at)
        config = Config(
            output_dir=str(tmp_path / str(record_at)),
            base=BaseOptions(name=str(tiny_base)),
            data=DataOptions(train_data_dir=str(tiny_data), resolution=64),
            train=TrainOptions(batch_size=4, max_steps=5, seed=5, lanes=2),
            checkpoint=CheckpointOptions(every=5),
            tracking=TrackingOptions(report_to="none", log_every=1),
        )
        recordings: list[object] = []
        monkeypatch.setattr(torch.jit, "trace", _counted(torch.jit.trace, recordings))
        run(config)
        assert len(recordings) == (record_at == 3)
        monkeypatch.undo()
        found.append(load_file(tmp_path / str(record_at) / "checkpoint-5" / "training.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def _counted(trace: Callable[..., Any], calls: list[object]) -> Callable[..., Any]:
    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return trace(*args, **kwargs)

    return counting


def test_only_plain_operations_are_recorded():
    plain = Config()
    assert is_recordable(plain)
    assert not is_recordable(replace(plain, base=replace(plain.base, quantize="int8")))
    for name, value in {"gradient_checkpointing": True, "profile": True, "xformers": True, "compile": "on"}.items():
        assert not is_recordable(replace(plain, train=replace(plain.train, **{name: value}))), name
