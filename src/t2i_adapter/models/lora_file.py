"""How a LoRA is named on a command line: a file and a weight. Importing this module loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from t2i_adapter.errors import UserError


@dataclass(frozen=True)
class Lora:
    """A LoRA's file or hub id, and its weight: 1 is as in training."""

    source: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Lora:
        """Reads FILE or FILE:WEIGHT. Raises UserError."""
        source, colon, number = text.rpartition(":")
        try:
            weight = float(number) if colon else 1.0
        except ValueError:  # the colon is a part of the name
            return cls(text)
        if not isfinite(weight) or (colon and not source):
            raise UserError(f"{text}: allowed is FILE or FILE:WEIGHT with a finite number.", option="lora")
        return cls(source if colon else text, weight)

    @property
    def name(self) -> str:
        """The file's name without its ending, as the web UIs write it."""
        return Path(self.source).name.removesuffix(".safetensors")
