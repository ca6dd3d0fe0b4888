"""EMA: an exponential moving average of a network's weights."""

from __future__ import annotations

import copy
from typing import Any

import torch


class Ema:
    """A second network with ema <- d ema + (1 - d) weight, where d = min(decay, (1 + n) / (10 + n)) at step n."""

    def __init__(self, network: Any, decay: float) -> None:
        self.decay = decay
        self.network = copy.deepcopy(network).requires_grad_(False)

    @torch.no_grad()
    def update(self, network: Any, step: int) -> None:
        """step: number of updates made before this one."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.network.parameters()), list(network.parameters()), 1 - decay)
