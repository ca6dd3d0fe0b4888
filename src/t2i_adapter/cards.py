"""GPUs by name: their memory and the rates of their matrix units, by the makers' data sheets. It loads no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from t2i_adapter.errors import UserError

GIB = 2**30
Rate = Literal["fp32", "tf32", "fp16", "bf16", "fp8"]


@dataclass(frozen=True)
class Card:
    """One GPU.

    Attributes:
        memory: GB, as the data sheet says.
        capability: compute capability of CUDA.
        fp32: TFLOP/s of ordinary float32 arithmetic.
        tf32, fp16, bf16, fp8: TFLOP/s of the matrix units on dense matrices, summed in float32; None if the card has
            no units for the type. A multiplication and an addition count as two operations.
        device: pattern of the name that the driver reports, without "NVIDIA", "GeForce" and "Tesla".
    """

    memory: int
    capability: tuple[int, int]
    fp32: float
    tf32: float | None
    fp16: float
    bf16: float | None
    fp8: float | None
    device: str

    def rate(self, kind: Rate) -> float | None:
        """FLOP/s of a type; None if the card has no units for it."""
        found: float | None = getattr(self, kind)
        return None if found is None else found * 1e12


CARDS = {
    "T4": Card(16, (7, 5), 8.1, None, 65, None, None, r"T4"),
    "V100": Card(16, (7, 0), 15.7, None, 125, None, None, r"V100.*"),
    "RTX 3060": Card(12, (8, 6), 12.7, 12.7, 25.5, 25.5, None, r"RTX 3060"),
    "RTX 3090": Card(24, (8, 6), 35.6, 35.6, 71, 71, None, r"RTX 3090"),
    "RTX 4060": Card(8, (8, 9), 15.1, 15.1, 30.2, 30.2, 60.5, r"RTX 4060"),
    "RTX 4090": Card(24, (8, 9), 82.6, 82.6, 165.2, 165.2, 330.3, r"RTX 4090"),
    "RTX 5090": Card(32, (12, 0), 104.8, 104.8, 209.5, 209.5, 419, r"RTX 5090"),
    "A10": Card(24, (8, 6), 31.2, 62.5, 125, 125, None, r"A10"),
    "RTX A6000": Card(48, (8, 6), 38.7, 77.4, 154.8, 154.8, None, r"RTX A6000"),
    "L4": Card(24, (8, 9), 30.3, 60, 121, 121, 242, r"L4"),
    "L40S": Card(48, (8, 9), 91.6, 183, 362, 362, 733, r"L40S"),
    "A100 40GB": Card(40, (8, 0), 19.5, 156, 312, 312, None, r"A100.*40GB"),
    "A100": Card(80, (8, 0), 19.5, 156, 312, 312, None, r"A100.*80GB.*"),
    "H100 PCIe": Card(80, (9, 0), 51, 378, 756, 756, 1513, r"H100 PCIe"),
    "H100": Card(80, (9, 0), 66.9, 494.7, 989.4, 989.4, 1978.9, r"H100( SXM.*)?( 80GB.*)?"),
    "H200": Card(141, (9, 0), 66.9, 494.7, 989.4, 989.4, 1978.9, r"H200"),
    "B200": Card(180, (10, 0), 75, 1100, 2250, 2250, 4500, r"B200"),
}
"""Name -> card. The rates of GeForce cards are those with sums in float32, half of the figure that is advertised."""


def find_card(name: str) -> Card:
    """The card of a name as a user writes it, such as "rtx4090". Raises UserError."""
    names = {_plain(known): card for known, card in CARDS.items()}
    card = names.get(_plain(name))
    if card is None:
        text = f"{name}: unknown card; write its memory, such as 24GB, or one of {', '.join(CARDS)}."
        raise UserError(text, option="card")
    return card


def _plain(name: str) -> str:
    return re.sub(r"[ _-]|^nvidia|geforce", "", name.lower())


def card_of_device(name: str) -> Card | None:
    """The card whose driver reports this name, such as "NVIDIA A100-SXM4-80GB"; None if it is not in the table."""
    bare = re.sub(r"^(NVIDIA |GeForce |Tesla )+", "", name)
    return next((card for card in CARDS.values() if re.fullmatch(card.device, bare)), None)


def card_bytes(card: str | None) -> int | None:
    """The memory of a card in bytes, from its size or name; None for None. Raises UserError for an unknown name."""
    if card is None:
        return None
    if found := re.fullmatch(r"(\d+(?:\.\d+)?) ?(G|GB|GiB)", card, flags=re.IGNORECASE):
        return int(float(found[1]) * GIB)
    return find_card(card).memory * GIB


def named_card(card: str | None) -> Card | None:
    """The card that `card` names; None if it is a size or None. Raises UserError for an unknown name."""
    return None if card is None or re.fullmatch(r"[\d.]+ ?(G|GB|GiB)", card, flags=re.IGNORECASE) else find_card(card)
