"""An exponential moving average of a network's weights."""

from __future__ import annotations

import copy
from typing import Any

import torch


class Ema:
    """A second network with average <- d average + (1 - d) weight, d rising as min(decay, (1 + n) / (10 + n))."""

    def __init__(self, network: Any, decay: float) -> None:
        self.decay = decay
        self.network = copy.deepcopy(network).requires_grad_(False)

    @torch.no_grad()
    def update(self, network: Any, step: int) -> None:
        """`step` counts the updates that were made before this one, from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.network.parameters()), list(network.parameters()), 1 - decay)
