"""The parts of a training step on a CUDA device: `pytest tests/gpu`. They are skipped without one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.gpu import GPU, MARKS, gradient_of, in_bf16, nano_step, with_train

from t2i_adapter.batches.example import example_batch
from t2i_adapter.config.tree import AdapterOptions, BaseOptions, Config
from t2i_adapter.errors import UserError
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.open import open_base
from t2i_adapter.models.quantize import CODECS, FORMATS, float8_gradient, float8_product
from t2i_adapter.training.accumulate import Accumulation, plain_gradients
from t2i_adapter.training.frozen_model import load_frozen_model
from t2i_adapter.training.memory import Shapes
from t2i_adapter.training.step import batch_losses

pytestmark = MARKS


def gradient(kind: str = "none", compile_kind: str = "off", **train: Any) -> torch.Tensor:
    """The adapter's gradient on `nano`, bf16, as one vector, of the third step (graphs warm up)."""
    config = with_train(Config(), compile=compile_kind, **train)
    config = replace(config, base=BaseOptions(quantize=kind))  # pyright: ignore[reportArgumentType]
    adapter, frozen, batch = nano_step(config, torch.bfloat16, 4)
    for _ in range(3):
        adapter.zero_grad()
        batch_losses(in_bf16(adapter), frozen, batch).mean().backward()
    return gradient_of(adapter)


@pytest.fixture(scope="module")
def plain() -> torch.Tensor:
    return gradient()


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.cosine_similarity(a.double(), b.double(), dim=0).item()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_quantised_base_gives_the_plain_one_s_gradient(plain: torch.Tensor, kind: str):
    assert cosine(plain, gradient(kind)) > {"nf4": 0.95}.get(kind, 0.99)


@pytest.mark.parametrize("blocks", ["all", "large"])
def test_recomputed_activations_give_the_plain_gradient(plain: torch.Tensor, blocks: str):
    assert cosine(plain, gradient(gradient_checkpointing=True, checkpoint_blocks=blocks)) > 0.9999


def test_channels_last_gives_the_plain_gradient(plain: torch.Tensor):
    assert cosine(plain, gradient(channels_last=True)) > 0.999


@pytest.mark.parametrize("kind", ["on", "graphs"])
def test_a_compiled_base_gives_the_plain_one_s_gradient(
    plain: torch.Tensor, kind: str, capsys: pytest.CaptureFixture[str]
):
    assert cosine(plain, gradient(compile_kind=kind)) > 0.999
    assert "uncompiled" not in capsys.readouterr().out, "it fell back to the plain base"


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="the card has no float8 units: Ada, Hopper and newer have them",
)
def test_products_in_float8_are_the_dequantised_ones():
    torch.manual_seed(0)
    x, over = (torch.randn(3, 32, side, device=GPU, dtype=torch.bfloat16) for side in (64, 128))
    data, scale = CODECS["float8"].quantize(torch.randn(128, 64, device=GPU) / 8)
    weight = CODECS["float8"].dequantize(data, scale, torch.float32)
    for found, exact in (
        (float8_product(x, data, scale), x.float() @ weight.t()),
        (float8_gradient(over, data, scale), over.float() @ weight),
    ):
        assert found.dtype == torch.bfloat16
        assert (found.float() - exact).norm() / exact.norm() < 0.05


# Memory --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def free_memory() -> Iterator[int]:
    """Bytes in use before the test; the limit that a test sets is lifted after it."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def accumulate(size: int, limit: int | None = None) -> tuple[int | None, torch.Tensor, int]:
    """Most samples that were computed together (None: all), the gradient, and the peak in bytes over what lasted."""
    from accelerate import Accelerator

    adapter, frozen, batch = nano_step(Config(), torch.float32, size, pixels=256)
    losses: list[torch.Tensor] = []
    add = plain_gradients(Accelerator(), lambda samples: batch_losses(adapter, frozen, samples))
    accumulation = Accumulation(Accelerator(), adapter, add, 1, losses.append)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if limit is not None:
        total = torch.cuda.get_device_properties(GPU).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + limit) / total)
    accumulation.add(iter([batch]))
    return accumulation.at_once, gradient_of(adapter), torch.cuda.max_memory_allocated() - before


def test_a_batch_that_does_not_fit_is_split_and_its_gradient_stays(free_memory: int):
    whole, expected, peak = accumulate(16)
    assert whole is None
    halves, found, _ = accumulate(16, limit=int(0.75 * peak))
    assert halves is not None and 1 <= halves < 16
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6 + 1e-3 * expected.abs().max().item())


def test_a_sample_that_does_not_fit_is_an_error_with_advice(free_memory: int):
    _, _, peak = accumulate(1)
    with pytest.raises(UserError, match="Out of memory for a single sample") as found:
        accumulate(1, limit=peak // 4)
    assert found.value.kind == "out_of_memory"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", [{}, {"gradient_checkpointing": True}])
def test_plan_foretells_the_memory_of_a_step(train: dict[str, Any], dtype: torch.dtype, free_memory: int):
    """Within a tenth of what torch's allocator then holds."""
    config = with_train(replace(Config(), base=BaseOptions()), **train)
    base = open_base(config.base)
    frozen = load_frozen_model(config, base, GPU, dtype)
    adapter = build_adapter(AdapterOptions(), base.unet_config).to(GPU)
    batch = example_batch(base.unet_config, 32, height=256, width=256, device=GPU)
    run = adapter if dtype == torch.float32 else in_bf16(adapter)
    batch_losses(run, frozen, batch).mean().backward()
    taken = torch.cuda.max_memory_allocated() - free_memory
    foretold = Shapes(config, base, adapter, dtype).memory(32, height=256, width=256)
    assert foretold.base + foretold.adapter + foretold.step == pytest.approx(taken, rel=0.1)
