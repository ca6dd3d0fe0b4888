"""Options of the verb `plan`. Importing this module loads no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from t2i_adapter.config.tree import Config
from t2i_adapter.errors import UserError

CARDS = {
    "RTX 3060": 12,
    "RTX 4060": 8,
    "RTX 4090": 24,
    "RTX 5090": 32,
    "T4": 16,
    "L4": 24,
    "A10": 24,
    "A100": 80,
    "H100": 80,
    "H200": 141,
}
"""Name -> GB of memory, as their makers tell it."""


@dataclass(frozen=True)
class PlanOptions:
    """What a run will need, told before it: the run's options, and what it is to be planned for."""

    recipe: str | None = None
    """YAML file of a run's options; flags win over it."""
    card: str | None = None
    """Device to plan for: its memory, such as 24GB, or a name, such as "RTX 4090"; None plans for this machine."""
    probe: bool = True
    """Take a few steps here, on random content, to tell the samples a second; not for another device."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)

    def __post_init__(self) -> None:
        if self.card is not None:
            self.card_bytes()

    def card_bytes(self) -> int | None:
        """The named device's memory in bytes, None where none is named. Raises UserError for a name that is unknown."""
        if self.card is None:
            return None
        if found := re.fullmatch(r"(\d+(?:\.\d+)?) ?(G|GB|GiB)", self.card, flags=re.IGNORECASE):
            return int(float(found[1]) * 2**30)
        names = {name.replace(" ", "").lower(): size for name, size in CARDS.items()}
        size = names.get(re.sub(r"[ _-]", "", self.card).lower())
        if size is None:
            raise UserError(f"--card {self.card}: give its memory, such as 24GB, or one of {', '.join(CARDS)}")
        return size * 2**30
