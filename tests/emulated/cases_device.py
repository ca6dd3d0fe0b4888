"""The emulated device itself notices what it is there to notice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.emulated import device

GPU = torch.device("cuda")


def test_it_is_the_device_that_torch_finds():
    assert torch.cuda.is_available() and torch.cuda.device_count() == 1
    assert torch.accelerator.current_accelerator() == GPU
    assert torch.ones(2, device="cuda").device == torch.device("cuda", 0)


def test_it_computes_what_the_cpu_computes_forward_and_backward():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.GroupNorm(2, 8), torch.nn.Flatten(2))
    x = torch.randn(2, 4, 8, 8)

    def gradient(device: torch.device) -> torch.Tensor:
        layers.to(device).zero_grad()
        y = layers(x.to(device))
        F.scaled_dot_product_attention(y, y, y).square().mean().backward()
        return torch.cat([p.grad.flatten().cpu() for p in layers.parameters() if p.grad is not None])

    assert torch.equal(gradient(torch.device("cpu")), gradient(GPU))


MIXED: dict[str, Callable[[torch.Tensor], object]] = {
    "sum": lambda x: x + torch.ones(8),
    "cat": lambda x: torch.cat([x, torch.ones(8)]),
    "stack of numbers": lambda x: torch.stack([x.sum(), torch.ones(())]),
    "product": lambda x: x.view(1, 8) @ torch.ones(8, 1),
    "condition": lambda x: torch.where(torch.ones(8, dtype=torch.bool), x, x),
    "in place": lambda x: torch.ones(8).add_(x),
    "generator": lambda x: torch.randn(3, device="cuda", generator=torch.Generator()),
}


@pytest.mark.parametrize("name", MIXED)
def test_devices_do_not_mix(name: str):
    with pytest.raises(RuntimeError, match="device"):
        MIXED[name](torch.zeros(8, device="cuda"))


WAITING: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "truth": lambda x: bool(x[0] > 0),
    "list": lambda x: x.tolist(),
    "to the host": lambda x: x.cpu(),
    "from a list": lambda x: torch.tensor([1.0, 2.0], device="cuda"),
    "from a list, as another": lambda x: x.new_tensor([1.0, 2.0]),
    "to the device": lambda x: torch.ones(2).to("cuda"),
    "to the device, not pinned": lambda x: torch.ones(2).to("cuda", non_blocking=True),
    "index by a list": lambda x: x[[0, 1]],
    "index by a mask": lambda x: x[x > 0],
    "index by the host's numbers": lambda x: x[torch.arange(2)],
    "nonzero": lambda x: x.nonzero(),
    "equal": lambda x: torch.equal(x, x),
    "unique": lambda x: x.unique(),
    "repeats by a tensor": lambda x: x.repeat_interleave(torch.ones(8, dtype=torch.long, device="cuda")),
    "synchronize": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_makes_the_host_wait_is_counted(name: str):
    x = torch.zeros(8, device="cuda")
    with device.waits() as waits:
        WAITING[name](x)
    assert waits


def test_a_wait_can_be_an_error():
    x = torch.zeros(8, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            x.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.sum().item() == 0


FREE: dict[str, Callable[[torch.Tensor], object]] = {
    "product with a number": lambda x: x * 2.0 + torch.tensor(1.0),
    "norm": lambda x: x.norm(),
    "zeros": lambda x: torch.zeros(8, device="cuda"),
    "pinned": lambda x: torch.ones(8).pin_memory().to("cuda", non_blocking=True),
    "part of pinned memory": lambda x: torch.ones(8).pin_memory()[3:].to("cuda", non_blocking=True),
    "index by the device's numbers": lambda x: x[torch.arange(2, device="cuda")],
    "repeats by a number": lambda x: x.repeat_interleave(2),
    "random": lambda x: torch.randn(8, device="cuda", generator=torch.Generator("cuda").manual_seed(1)),
}


@pytest.mark.parametrize("name", FREE)
def test_what_makes_no_host_wait_is_not_counted(name: str):
    x = torch.zeros(8, device="cuda")
    with device.waits() as waits:
        FREE[name](x)
    assert waits == []


def test_a_wait_in_the_package_has_its_line():
    from t2i_adapter.training.muon import orthogonal

    with device.waits() as waits:
        orthogonal(torch.eye(4, device="cuda")).tolist()
        bool(torch.ones((), device="cuda"))
    assert [wait.line for wait in waits] == ["", ""], "these are the test's own"
    from t2i_adapter.batches.encoders import _has_finite

    with device.waits() as waits:
        _has_finite(torch.ones(2, 2, device="cuda"))
    (wait,) = waits
    assert wait.what == "item" and wait.inside == ("batches/encoders.py:_has_finite",)
    assert wait.line.startswith("batches/encoders.py:")


def test_memory_ends_at_the_limit_and_comes_back():
    before = device.used()
    with device.limited(2**20):
        kept = torch.zeros(2**17, device="cuda")  # half of it
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            torch.zeros(2**18, device="cuda")
        assert device.used() == before + 2**19
    torch.cuda.reset_peak_memory_stats()
    del kept
    assert device.used() == before and torch.cuda.max_memory_allocated() == before + 2**19


def test_new_memory_can_be_poison():
    with device.poisoned():
        assert torch.empty(3, device="cuda").isnan().all() and torch.empty(3).isfinite().all()
        assert torch.zeros(3, device="cuda").sum().item() == 0
        assert torch.empty(3, device="cuda", dtype=torch.bfloat16).isnan().all()


def test_the_seed_sets_the_device_s_generator():
    torch.manual_seed(3)
    first = torch.randn(3, device="cuda")
    torch.manual_seed(3)
    assert torch.equal(first, torch.randn(3, device="cuda"))
