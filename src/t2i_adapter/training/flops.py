"""Floating-point operations of a training step, counted while it runs, and the time that a card's units need for them.

Counted are matrix products, convolutions and attention, which take nearly all of a step's time. A multiplication and an
addition are two operations. Only what is computed counts: no gradient of a frozen weight, and a recomputed activation
twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from t2i_adapter.cards import Card, Rate

_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
"""A CPU's attention, which torch's own table of formulas does not have."""
_FORMULAS: dict[Any, Any] = {**flop_registry, **_ATTENTION}


@dataclass(frozen=True)
class Flops:
    """Operations of a step by what computes them. products: of matrices, most of them in linear layers."""

    products: float = 0
    convolutions: float = 0
    attention: float = 0

    @property
    def total(self) -> float:
        return self.products + self.convolutions + self.attention

    def __truediv__(self, count: float) -> Flops:
        return Flops(self.products / count, self.convolutions / count, self.attention / count)

    def seconds(self, card: Card, rate: Rate, products: Rate | None = None) -> float | None:
        """Least seconds that the card's matrix units need; None if it has no units for the type.

        rate: type of the arithmetic. products: type of the matrix products, if it is another.
        """
        plain, fast = card.rate(rate), card.rate(products or rate)
        if plain is None or fast is None:
            return None
        return self.products / fast + (self.convolutions + self.attention) / plain


class FlopCount(TorchDispatchMode):
    """Counts the operations that are computed inside it; `flops` has the sums."""

    def __init__(self) -> None:
        super().__init__()
        self._sums = {"products": 0, "convolutions": 0, "attention": 0}

    @property
    def flops(self) -> Flops:
        return Flops(**self._sums)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if formula := _FORMULAS.get(packet):
            self._sums[_part_of(packet.__name__)] += formula(*args, **(kwargs or {}), out_val=result)
        return result


def _part_of(name: str) -> str:
    if "convolution" in name:
        return "convolutions"
    return "attention" if "attention" in name else "products"


def rates_of(precision: str, *, allow_tf32: bool, quantize: str, card: Card) -> tuple[Rate, Rate]:
    """The types that a run computes in on a card: in general, and its matrix products.

    precision: no, fp16 or bf16. quantize: an option of `base.quantize`; float8 multiplies in float8 where the card has
    units for it and the run computes in bf16 (`models.quantize.multiplies_float8`).
    """
    plain: Rate = "fp16" if precision == "fp16" else "bf16" if precision == "bf16" else "fp32"
    if precision == "no" and allow_tf32 and card.tf32 is not None:
        plain = "tf32"
    return plain, "fp8" if quantize == "float8" and precision == "bf16" and card.fp8 is not None else plain
