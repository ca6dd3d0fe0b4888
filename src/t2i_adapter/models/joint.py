"""Several adapters over one base as one network: the features are summed, so that they can be trained together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import T2IAdapter
from torch import Tensor, nn


class JointAdapter(nn.Module):
    """n adapters with features of equal sizes. Their conditions come stacked along the channels.

    Each sample has a weight for each adapter. The sum is sum_i w_i F_i(c_i), what `diffusers.MultiAdapter` computes
    with the weights w as its scales. An adapter of weight 0 adds exactly zero, and gets a gradient of zero.

    Letters: B samples; n adapters; C_i channels of adapter i's condition.
    """

    def __init__(self, adapters: Sequence[T2IAdapter]) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(adapters)
        self._channels = [adapter.config["in_channels"] for adapter in adapters]

    @property
    def config(self) -> Mapping[str, Any]:
        """What `T2IAdapter.config` says, of the whole: `in_channels` is the sum over the adapters."""
        first: Any = self.adapters[0]
        return {**first.config, "in_channels": sum(self._channels)}

    def forward(self, condition: Tensor, weights: Tensor | None = None) -> list[Tensor]:
        """The four summed features.

        condition: (B, sum of C_i, H, W) in [0,1]. weights: (B,n); None weighs each adapter by 1.
        """
        total: list[Tensor] = []
        for number, (adapter, part) in enumerate(
            zip(self.adapters, condition.split(self._channels, dim=1), strict=True)
        ):
            features = adapter(part)
            if weights is not None:
                factor = weights[:, number].view(-1, 1, 1, 1)
                features = [feature * factor.to(feature.dtype) for feature in features]
            total = [a + b for a, b in zip(total, features, strict=True)] if total else list(features)
        return total


def adapters_in(network: Any) -> list[Any]:
    """The adapters of a trained network: those of a `JointAdapter`, or the network itself."""
    return list(network.adapters) if isinstance(network, JointAdapter) else [network]
