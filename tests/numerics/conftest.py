"""The parts of a training step on the tiny base: the frozen model and an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from t2i_adapter.config.tree import AdapterOptions, BaseOptions
from t2i_adapter.diffusion.schedule import NoiseSchedule
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.open import open_base
from t2i_adapter.training.step import FrozenModel


@pytest.fixture(scope="module")
def frozen(tiny_base: Path) -> FrozenModel:
    """The tiny base in float32. Read only."""
    base = open_base(BaseOptions(name=str(tiny_base)))
    return FrozenModel(
        base.unet("cpu", torch.float32), NoiseSchedule.of(base.scheduler()), base.latent_scale, torch.float32
    )


@pytest.fixture
def adapter(frozen: FrozenModel) -> Any:
    """A new adapter, always with equal initial weights."""
    torch.manual_seed(0)
    return build_adapter(AdapterOptions(), frozen.unet.config)
