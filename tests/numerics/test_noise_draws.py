"""Several noise samples for each sample: the update is the mean of the updates of separate passes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from t2i_adapter.batches.example import example_batch
from t2i_adapter.training.accumulate import part
from t2i_adapter.training.step import FrozenModel, batch_losses
from t2i_adapter.types import Batch

SIZE, DRAWS = 2, 3


@pytest.fixture
def parts(frozen: FrozenModel, adapter: Any) -> tuple[FrozenModel, Any]:
    return frozen, adapter


@pytest.fixture(scope="module")
def batch(frozen: FrozenModel) -> Batch:
    """Two samples of three draws, all as different as can be."""
    torch.manual_seed(1)
    drawn = example_batch(frozen.unet.config, SIZE, height=64, width=64, draws=DRAWS)
    return replace(
        drawn,
        time_ids=torch.tensor([[64, 64, 0, 0, 64, 64], [90, 70, 4, 8, 64, 64]]),
        timesteps=torch.tensor([10, 300, 990, 950, 600, 0]),
    )


def one_draw(batch: Batch, draw: int) -> Batch:
    """The batch with the samples' draw number `draw` alone."""
    chosen = {name: getattr(batch, name)[draw::DRAWS] for name in ("timesteps", "noise", "latent_noise")}
    return replace(batch, **chosen)


def gradient(parts: tuple[FrozenModel, Any], batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    frozen, adapter = parts
    losses = batch_losses(adapter, frozen, batch, min_snr_gamma=1.0)
    return losses.detach(), list(torch.autograd.grad(losses.mean(), list(adapter.parameters())))


def test_loss_and_gradient_are_the_mean_of_separate_passes(parts: tuple[FrozenModel, Any], batch: Batch):
    assert batch.draws == DRAWS
    together, gradients = gradient(parts, batch)
    separate = [gradient(parts, one_draw(batch, draw)) for draw in range(DRAWS)]
    torch.testing.assert_close(together, torch.stack([losses for losses, _ in separate]).mean(0), rtol=1e-5, atol=1e-6)
    for index, got in enumerate(gradients):
        alone = torch.stack([each[index] for _, each in separate])
        assert not torch.allclose(alone[0], alone[1], rtol=1e-2, atol=0), "the draws differ, or nothing is tested"
        torch.testing.assert_close(got, alone.mean(0), rtol=1e-4, atol=1e-7)


def test_the_adapter_runs_once_for_all_draws(parts: tuple[FrozenModel, Any], batch: Batch):
    frozen, adapter = parts
    seen: list[int] = []
    handle = adapter.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    batch_losses(adapter, frozen, batch)
    handle.remove()
    assert seen == [SIZE]


def test_a_batch_cut_for_memory_keeps_each_samples_draws(parts: tuple[FrozenModel, Any], batch: Batch):
    whole, _ = gradient(parts, batch)
    cut = [gradient(parts, part(batch, number, number + 1))[0] for number in range(SIZE)]
    torch.testing.assert_close(torch.cat(cut), whole, rtol=1e-5, atol=1e-6)
