"""The UNet compiled, where the run is long enough to pay for it; where that fails it stays as it was."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

Compile = Literal["auto", "on", "off"]

PAYS_FROM_STEPS = 20_000
"""`auto` compiles from so many updates on: minutes of compiling against a sixth of each step
(benchmarks/speed_compile.json, `nano` on a CPU), and the run is to be the shorter for it by far."""
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
BLOCKS = (BasicTransformerBlock, ResnetBlock2D)
SHAPES = 512
"""Kinds of block times sizes of picture that are compiled, each for its own shapes, before torch gives up."""


def pays(wanted: Compile, device: torch.device, steps: int | None) -> bool:
    """Whether to compile for a run of so many updates, None where they are not known. `auto` goes by what was measured:
    on a CPU."""
    if wanted == "auto":
        return device.type == "cpu" and steps is not None and steps >= PAYS_FROM_STEPS
    return wanted == "on"


def compile_unet(unet: Any, device: torch.device, say: Callable[[str], None]) -> int:
    """Has the UNet compiled when it is first used, for each shape it meets; returns in how many parts. What fails to
    compile runs as it was, and `say` gets one line.

    On a CPU it is one part, for there the blocks alone win nothing. On a GPU each transformer and residual block is
    one: those that are alike share their code. Torch keeps the code for the next run in $TORCHINDUCTOR_CACHE_DIR, here
    ~/.cache/t2i_adapter/compiled where that is not set: the user's own folder, since it is code.
    """
    os.environ.setdefault(CACHE_VARIABLE, str(Path.home() / ".cache" / "t2i_adapter" / "compiled"))
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, SHAPES)
    switch = _Switch(say)
    parts = [unet] if device.type == "cpu" else [block for block in unet.modules() if isinstance(block, BLOCKS)]
    for module in parts:
        module.forward = switch.guarded(module.forward)
    return len(parts)


class _Switch:
    """One for all parts: the first that fails turns it off."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._on = True
        self._lock = Lock()

    def guarded(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        from torch._dynamo.exc import TorchDynamoException

        compiled = torch.compile(forward, dynamic=False)

        def either(*args: Any, **kwargs: Any) -> Any:
            if self._on and torch.is_grad_enabled():  # validation comes with other shapes, and seldom
                try:
                    return compiled(*args, **kwargs)
                except TorchDynamoException as fault:  # not what the part itself raises
                    self._off(fault)
            return forward(*args, **kwargs)

        return either

    def _off(self, fault: Exception) -> None:
        with self._lock:
            if self._on:
                first = next((line for line in str(fault).splitlines() if line.strip()), type(fault).__name__)
                self._say(f"--train.compile: the UNet cannot be compiled here ({first}); it runs as it is.")
            self._on = False
