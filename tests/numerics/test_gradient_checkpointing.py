"""Gradient checkpointing: the same gradients to the bit, with fewer saved bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from t2i_adapter.batches.example import example_batch
from t2i_adapter.config.tree import AdapterOptions, BaseOptions
from t2i_adapter.diffusion.schedule import NoiseSchedule
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.base import enable_gradient_checkpointing
from t2i_adapter.models.open import open_base
from t2i_adapter.models.quantize import quantize
from t2i_adapter.training.step import FrozenModel, batch_losses


def gradients(blocks: str | None, *, quantized: bool = False) -> tuple[list[torch.Tensor], int]:
    """Returns the adapter's gradients on one batch, and the bytes saved for the backward pass, without weights."""
    base = open_base(BaseOptions())
    unet: Any = base.unet("cpu", torch.float32)
    if quantized:
        quantize(unet, "int8", "cpu")
    if blocks:
        enable_gradient_checkpointing(unet, blocks)  # pyright: ignore[reportArgumentType]
    frozen = FrozenModel(unet, NoiseSchedule.of(base.scheduler()), base.latent_scale, torch.float32)
    torch.manual_seed(0)
    adapter = build_adapter(AdapterOptions(), base.unet_config)
    batch = example_batch(base.unet_config, 4, height=128, width=128)
    own = {t.untyped_storage().data_ptr() for t in (*unet.parameters(), *unet.buffers(), *adapter.parameters())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = batch_losses(adapter, frozen, batch).mean()
    loss.backward()
    return [parameter.grad for parameter in adapter.parameters() if parameter.grad is not None], sum(kept.values())


@pytest.mark.parametrize("quantized", [False, True])
def test_the_gradients_are_the_same_to_the_bit_and_fewer_bytes_are_saved(quantized: bool):
    plain, kept = gradients(None, quantized=quantized)
    for blocks, most in (("large", 0.75), ("all", 0.4)):
        found, less = gradients(blocks, quantized=quantized)
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
        assert less < most * kept, blocks
