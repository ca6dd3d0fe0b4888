"""What a device can do: one table, which every other file asks.

Importing this module loads no torch: `Hardware` may describe a card that this machine does not have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["cuda", "rocm", "xpu", "mps", "cpu"]
"""Makers of devices as torch names them; `rocm` is AMD's, which torch calls cuda."""
Name = Literal["fp16", "bf16", "float64", "tf32", "float8", "pinned", "fused_adamw", "compile", "cuda_graphs"]
Least = bool | tuple[int, int]
"""Whether a kind of device can do something; a pair is the least version that can: of an NVIDIA GPU its compute
capability, of mps the version of macOS."""


class Ability(NamedTuple):
    """Something that some devices lack, in words for a message, and who can do it."""

    words: str
    cuda: Least
    rocm: Least
    xpu: Least
    mps: Least
    cpu: Least


TABLE: dict[Name, Ability] = {
    # Training in fp16 needs a loss scaler, and products that are no slower than those of fp32. On mps it is not tried.
    "fp16": Ability("train in fp16", cuda=True, rocm=True, xpu=True, mps=False, cpu=False),
    # Before Ampere torch computes bf16 by way of float32: correct, and slower than fp32.
    "bf16": Ability("compute in bf16", cuda=(8, 0), rocm=True, xpu=True, mps=(14, 0), cpu=True),
    "float64": Ability("compute in float64", cuda=True, rocm=True, xpu=True, mps=False, cpu=True),
    "tf32": Ability("multiply in TF32", cuda=(8, 0), rocm=False, xpu=False, mps=False, cpu=False),
    # `torch._scaled_mm` of E4M3 matrices with a scale for each row: Ada, Hopper and later.
    "float8": Ability("multiply float8 matrices", cuda=(8, 9), rocm=False, xpu=False, mps=False, cpu=False),
    # From pinned memory the driver copies while the host goes on. mps shares the host's memory.
    "pinned": Ability("copy from pinned memory", cuda=True, rocm=True, xpu=True, mps=False, cpu=False),
    "fused_adamw": Ability("run AdamW as one kernel", cuda=True, rocm=True, xpu=True, mps=True, cpu=True),
    # Triton, which writes the kernels of torch.compile for NVIDIA GPUs, begins with Volta.
    "compile": Ability("run compiled kernels", cuda=(7, 0), rocm=True, xpu=True, mps=True, cpu=True),
    "cuda_graphs": Ability("replay CUDA graphs", cuda=(7, 0), rocm=True, xpu=False, mps=False, cpu=False),
}
"""A row an ability. `tests/unit/test_abilities.py` has a test for each."""


@dataclass(frozen=True)
class Hardware:
    """What decides which abilities a device has.

    version: compute capability of an NVIDIA GPU, (8, 6); version of macOS for mps; (0, 0) for others.
    """

    kind: Kind
    version: tuple[int, int] = (0, 0)

    def can(self, ability: Name) -> bool:
        """Whether the device has this ability."""
        least: Least = getattr(TABLE[ability], self.kind)
        return least if isinstance(least, bool) else self.version >= least

    def lacks(self, ability: Name) -> str:
        """A clause for a message that says what this device cannot do and which can:
        "this GPU (compute capability 7.5) cannot compute in bf16, which needs 8.0"."""
        row = TABLE[ability]
        least: Least = getattr(row, self.kind)
        needs = "" if isinstance(least, bool) else f", which needs {_dotted(least)}"
        return f"{self.describe()} cannot {row.words}{needs}"

    def describe(self) -> str:
        """The device in words: "this GPU (compute capability 7.5)"."""
        names = {
            "cuda": f"this GPU (compute capability {_dotted(self.version)})",
            "rocm": "this AMD GPU",
            "xpu": "this Intel GPU",
            "mps": f"mps (macOS {_dotted(self.version)})",
            "cpu": "a CPU",
        }
        return names[self.kind]


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
