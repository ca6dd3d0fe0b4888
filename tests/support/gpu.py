"""What the tests of tests/gpu share: the marks of each file, the device, and the step of a tiny or embedded base."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from t2i_adapter.config.tree import Config
    from t2i_adapter.training.step import FrozenModel
    from t2i_adapter.types import Batch

GPU = torch.device("cuda")
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.timeout(1200),
    # Versions of torch for CUDA differ in what they warn about; the other tests fail at a warning.
    pytest.mark.filterwarnings("ignore"),
]


def with_train(config: Config, **changes: Any) -> Config:
    return replace(config, train=replace(config.train, **changes))


def nano_step(config: Config, dtype: torch.dtype, size: int, *, pixels: int = 128) -> tuple[Any, FrozenModel, Batch]:
    """The adapter, the frozen `nano` and a batch on the GPU. config: how the base is quantised, compiled, ..."""
    from t2i_adapter.batches.example import example_batch
    from t2i_adapter.config.tree import AdapterOptions, BaseOptions
    from t2i_adapter.models.adapter import build_adapter
    from t2i_adapter.models.open import open_base
    from t2i_adapter.training.frozen_model import load_frozen_model

    config = replace(config, base=BaseOptions(quantize=config.base.quantize))
    base = open_base(config.base)
    frozen = load_frozen_model(config, base, GPU, dtype)
    torch.manual_seed(0)
    adapter = build_adapter(AdapterOptions(), base.unet_config).to(GPU)
    return adapter, frozen, example_batch(base.unet_config, size, height=pixels, width=pixels, device=GPU)


def in_bf16(adapter: Any) -> Any:
    """The adapter under autocast, as accelerate wraps it: the base is not under it."""

    def call(*inputs: torch.Tensor) -> Any:
        with torch.autocast("cuda", torch.bfloat16):
            return adapter(*inputs)

    return call


def gradient_of(adapter: Any) -> torch.Tensor:
    """The adapter's gradients as one vector."""
    return torch.cat([parameter.grad.flatten() for parameter in adapter.parameters()])
