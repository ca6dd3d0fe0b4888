"""CPU threads that share a micro-batch: the same update for any number of threads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from t2i_adapter.batches.example import example_batch
from t2i_adapter.devices import on_cores, sharing_cores
from t2i_adapter.training.cpu.threads import CpuThreads, count_cpu_threads
from t2i_adapter.training.step import FrozenModel, batch_losses
from t2i_adapter.types import Batch

SIZE, DRAWS = 5, 2


@pytest.fixture(scope="module")
def batch(frozen: FrozenModel) -> Batch:
    """Five samples of two draws each, all different."""
    torch.manual_seed(1)
    return example_batch(frozen.unet.config, SIZE, height=64, width=64, draws=DRAWS)


def gradients(adapter: Any) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in adapter.parameters()]


def threads_for(adapter: Any, frozen: FrozenModel, count: int) -> CpuThreads:
    return CpuThreads(count, adapter, lambda network, samples: batch_losses(network, frozen, samples))


@pytest.mark.parametrize("count", [2, 3, 7])
def test_any_number_of_threads_gives_the_gradients_of_the_whole(
    adapter: Any, frozen: FrozenModel, batch: Batch, count: int
):
    whole = batch_losses(adapter, frozen, batch).sum() * 0.1
    whole.backward()
    wanted = gradients(adapter)
    threads = threads_for(adapter, frozen, count)
    adapter.zero_grad()
    loss = threads.add(batch, 0.1)
    torch.testing.assert_close(loss, whole.detach())
    for got, exact in zip(gradients(adapter), wanted, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
    once = gradients(adapter)
    threads.add(batch, 0.1)  # on top of what is there, as with accumulation
    for got, first in zip(gradients(adapter), once, strict=True):
        torch.testing.assert_close(got, 2 * first, rtol=1e-5, atol=1e-6 * float(first.abs().max()))


def test_the_sum_has_the_same_bits_each_time_and_follows_the_weights(adapter: Any, frozen: FrozenModel, batch: Batch):
    threads = threads_for(adapter, frozen, 2)
    found = []
    for _ in range(4):
        adapter.zero_grad()
        threads.add(batch, 0.1)
        found.append(gradients(adapter))
    assert all(torch.equal(a, b) for later in found[1:] for a, b in zip(found[0], later, strict=True))
    with torch.no_grad():
        adapter.adapter.conv_in.weight.mul_(2)  # as an optimiser writes: in place
    adapter.zero_grad()
    threads.add(batch, 0.1)
    assert not torch.equal(gradients(adapter)[-1], found[0][-1])


def test_where_a_thread_fails_nothing_is_added(adapter: Any, frozen: FrozenModel, batch: Batch):
    threads = threads_for(adapter, frozen, 2)
    broken = replace(batch, text=torch.cat([batch.text[:4], torch.full_like(batch.text[4:], 1.0)])[:, :, :-1])
    with pytest.raises(RuntimeError):
        threads.add(broken, 0.1)
    assert all(parameter.grad is None for parameter in adapter.parameters())


def test_threads_are_for_a_cpu_and_one_process():
    cpu = torch.device("cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert count_cpu_threads(None, cpu, samples=8, processes=1) == 4
        assert count_cpu_threads(None, cpu, samples=3, processes=1) == 3
        assert count_cpu_threads(2, cpu, samples=8, processes=1) == 2
        assert count_cpu_threads(2, cpu, samples=8, processes=2) == 1
        assert count_cpu_threads(2, torch.device("cuda"), samples=8, processes=1) == 1
        with sharing_cores(2) as pool:
            assert list(pool.map(lambda _: torch.get_num_threads(), range(4))) == [2, 2, 2, 2]
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_on_cores_sets_and_restores_the_number_of_cores():
    before = torch.get_num_threads()
    with on_cores(before + 1):
        assert torch.get_num_threads() == before + 1
        with on_cores(None):
            assert torch.get_num_threads() == before + 1
        with pytest.raises(ZeroDivisionError), on_cores(before):
            assert 1 / 0
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
