"""A quantised base: gradients flow through it and point where the plain base's do, and no dequantised copy is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from t2i_adapter.batches.example import example_batch
from t2i_adapter.config.tree import (
    AdapterOptions,
    BaseOptions,
    CheckpointOptions,
    Config,
    DataOptions,
    OptimOptions,
    TrackingOptions,
    TrainOptions,
)
from t2i_adapter.models import quantize as q
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.open import open_base
from t2i_adapter.training.frozen_model import load_frozen_model
from t2i_adapter.training.step import batch_losses
from t2i_adapter.verbs.train import run

COSINE = {"int8": 0.999, "float8": 0.99, "nf4": 0.9}


def gradient(base_name: str, format: str) -> torch.Tensor:
    """Returns the adapter's gradient on one batch."""
    base = open_base(BaseOptions(name=base_name, quantize=format))  # pyright: ignore[reportArgumentType]
    frozen = load_frozen_model(replace(Config(), base=base.options), base, torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    adapter = build_adapter(AdapterOptions(), base.unet_config)
    batch_losses(adapter, frozen, example_batch(base.unet_config, 2, height=64, width=64)).mean().backward()
    return torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None])


@pytest.mark.parametrize("format", q.FORMATS)
@pytest.mark.parametrize("base", ["nano", "tiny"])
def test_the_adapters_gradient_points_where_the_plain_bases_does(base: str, format: q.Format, tiny_base: Path):
    name = base if base == "nano" else str(tiny_base)
    plain, quantized = gradient(name, "none"), gradient(name, format)
    assert torch.cosine_similarity(plain, quantized, dim=0) >= COSINE[format]
    assert not torch.equal(plain, quantized)


@pytest.mark.parametrize("format", q.FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_saves_its_weight_quantized_for_the_backward_pass(format: q.Format, dtype: torch.dtype):
    torch.manual_seed(0)
    plain = nn.Linear(48, 80).to(dtype).requires_grad_(False)  # 60 blocks of nf4
    quantized = q.QuantizedLinear(plain, format, "cpu")
    x = torch.randn(2, 5, 48, dtype=dtype, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = quantized(x)
    assert {id(tensor) for tensor in kept} == {id(quantized.data), id(quantized.scale)}
    assert quantized.data.nbytes + quantized.scale.nbytes == q.stored_bytes(80, 48, format)
    down = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, x, down)
    (wanted,) = torch.autograd.grad(plain(x), x, down)
    assert torch.cosine_similarity(got.float().flatten(), wanted.float().flatten(), dim=0) > 0.99
    assert torch.cosine_similarity(y.float().flatten(), plain(x).float().flatten(), dim=0) > 0.99


def test_nf4_pads_the_last_block():
    plain = nn.Linear(7, 9).requires_grad_(False)
    quantized = q.QuantizedLinear(plain, "nf4", "cpu")
    x = torch.randn(3, 7)
    assert torch.cosine_similarity(quantized(x).flatten(), plain(x).flatten(), dim=0) > 0.98


def test_nf4_keeps_zero_and_the_largest_of_a_block():
    weight = torch.zeros(1, 64)
    weight[0, :2] = torch.tensor([-3.0, 3.0])
    data, scale = q.CODECS["nf4"].quantize(weight)
    assert torch.equal(q.CODECS["nf4"].dequantize(data, scale, torch.float32), weight)


def test_products_in_float8_are_near_those_in_bf16():
    """The arithmetic of GPUs with float8 units, which torch also computes on the CPU."""
    torch.manual_seed(0)
    plain = nn.Linear(64, 96).to(torch.bfloat16).requires_grad_(False)
    plain.weight[3] *= 50  # an output far larger than the others, whose scale must not reach them
    quantized = q.QuantizedLinear(plain, "float8", "cpu")
    x, down = torch.randn(2, 16, 64, dtype=torch.bfloat16), torch.randn(2, 16, 96, dtype=torch.bfloat16)
    down[..., 3] /= 50
    product = q.float8_product(x, quantized.data, quantized.scale) + plain.bias
    gradient = q.float8_gradient(down, quantized.data, quantized.scale)
    for got, wanted in ((product, plain(x)), (gradient, down @ plain.weight)):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        assert torch.cosine_similarity(got.float().flatten(), wanted.float().flatten(), dim=0) > 0.998


@pytest.mark.parametrize("format", q.FORMATS)
def test_only_matrices_of_transformer_blocks_are_quantized_and_most_bytes_are_saved(format: q.Format):
    base = open_base(BaseOptions())
    plain, quantized = base.unet("cpu", torch.float32), q.quantize(base.unet("cpu", torch.float32), format, "cpu")
    replaced = {name for name, layer in quantized.named_modules() if isinstance(layer, q.QuantizedLinear)}
    assert replaced and all(".attentions." in name for name in replaced)
    assert not any(isinstance(layer, nn.Linear) and ".attentions." in name for name, layer in quantized.named_modules())
    assert isinstance(quantized.conv_out, nn.Conv2d) and isinstance(quantized.time_embedding.linear_1, nn.Linear)
    before = {name: layer.weight.nbytes for name, layer in plain.named_modules() if name in replaced}
    after = sum(quantized.get_submodule(name).data.nbytes for name in replaced)
    assert after <= sum(before.values()) * q.CODECS[format].bits / 32 + 64 * len(replaced)


def test_the_loss_curve_of_a_run_stays_within_a_per_cent(tiny_data: Path, tmp_path: Path):
    curves = {}
    for format in ("none", "int8", "nf4"):
        config = Config(
            output_dir=str(tmp_path / format),
            base=BaseOptions(quantize=format),  # pyright: ignore[reportArgumentType]
            data=DataOptions(location=str(tiny_data), resolution=64, num_workers=0),
            train=TrainOptions(batch_size=4, max_steps=8, seed=5),
            optim=OptimOptions(lr=1e-3, warmup_steps=2),
            checkpoint=CheckpointOptions(every=100),
            tracking=TrackingOptions(report_to="none", log_every=8),
        )
        run(config)
        (line,) = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
        curves[format] = json.loads(line)["loss"]
    assert curves["int8"] == pytest.approx(curves["none"], rel=0.01) and curves["int8"] != curves["none"]
    assert curves["nf4"] == pytest.approx(curves["none"], rel=0.05)
