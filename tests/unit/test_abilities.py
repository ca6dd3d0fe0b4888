"""What each device can do: a test for each row of the table, with cards that exist."""

from __future__ import annotations

import pytest

from t2i_adapter.abilities import TABLE, Hardware, Name
from t2i_adapter.devices import hardware_of

PASCAL, VOLTA, TURING = Hardware("cuda", (6, 1)), Hardware("cuda", (7, 0)), Hardware("cuda", (7, 5))
A100, A10, ADA, HOPPER = (Hardware("cuda", version) for version in ((8, 0), (8, 6), (8, 9), (9, 0)))
BLACKWELL = Hardware("cuda", (12, 0))
AMD, INTEL, CPU = Hardware("rocm"), Hardware("xpu"), Hardware("cpu")
VENTURA, SONOMA = Hardware("mps", (13, 6)), Hardware("mps", (14, 0))
ALL = (PASCAL, VOLTA, TURING, A100, A10, ADA, HOPPER, BLACKWELL, AMD, INTEL, VENTURA, SONOMA, CPU)
NVIDIA = ALL[:8]

CAN: dict[Name, tuple[Hardware, ...]] = {
    "fp16": (*NVIDIA, AMD, INTEL),
    "bf16": (A100, A10, ADA, HOPPER, BLACKWELL, AMD, INTEL, SONOMA, CPU),
    "float64": (*NVIDIA, AMD, INTEL, CPU),
    "tf32": (A100, A10, ADA, HOPPER, BLACKWELL),
    "float8": (ADA, HOPPER, BLACKWELL),
    "pinned": (*NVIDIA, AMD, INTEL),
    "fused_adamw": ALL,
    "compile": (VOLTA, TURING, A100, A10, ADA, HOPPER, BLACKWELL, AMD, INTEL, VENTURA, SONOMA, CPU),
    "cuda_graphs": (VOLTA, TURING, A100, A10, ADA, HOPPER, BLACKWELL, AMD),
}


@pytest.mark.parametrize("ability", TABLE)
def test_who_can(ability: Name) -> None:
    assert tuple(hardware for hardware in ALL if hardware.can(ability)) == CAN[ability]


def test_a_message_says_what_is_here_and_what_is_needed() -> None:
    assert TURING.lacks("bf16") == "this GPU (compute capability 7.5) cannot compute in bf16, which needs 8.0"
    assert VENTURA.lacks("bf16") == "mps (macOS 13.6) cannot compute in bf16, which needs 14.0"
    assert CPU.lacks("tf32") == "a CPU cannot multiply in TF32"
    assert AMD.lacks("float8") == "this AMD GPU cannot multiply float8 matrices"
    assert INTEL.lacks("cuda_graphs") == "this Intel GPU cannot replay CUDA graphs"


def test_the_device_of_this_process_is_known() -> None:
    assert hardware_of("cpu") == CPU
