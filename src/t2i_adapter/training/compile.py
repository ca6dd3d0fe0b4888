"""The UNet compiled, where it is asked for; where that fails it stays as it was."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

Compile = Literal["off", "on", "graphs"]

SHORT = 1_000
"""Updates that hardly make up for compiling, which takes a minute and more (benchmarks/compiling.json)."""
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
BLOCKS = (BasicTransformerBlock, ResnetBlock2D)
SHAPES = 512
"""Kinds of block times sizes of picture that are compiled, each for its own shapes, before torch gives up."""


def compile_unet(unet: Any, device: torch.device, kind: Compile, steps: int | None, say: Callable[[str], None]) -> int:
    """Has the UNet compiled when it is first used, for each shape it meets; returns in how many parts. What fails to
    compile runs as it was, and `say` gets one line; as it does where `steps`, the run's updates, are few.

    On a CPU it is one part, for there the blocks alone win nothing. On a GPU each transformer and residual block is
    one: those that are alike share their code. Of kind `graphs`, a GPU's launches of each are captured in a CUDA graph
    too. Torch keeps the code for the next run in $TORCHINDUCTOR_CACHE_DIR, here ~/.cache/t2i_adapter/compiled where
    that is not set: the user's own folder, since it is code.
    """
    if kind == "off":
        return 0
    if steps is not None and steps < SHORT:
        say(f"--train.compile {kind}: compiling takes a minute or more, and {steps} updates may not make up for it.")
    os.environ.setdefault(CACHE_VARIABLE, str(Path.home() / ".cache" / "t2i_adapter" / "compiled"))
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, SHAPES)
    switch = _Switch(say, "reduce-overhead" if kind == "graphs" else None)
    parts = [unet] if device.type == "cpu" else [block for block in unet.modules() if isinstance(block, BLOCKS)]
    for module in parts:
        module.forward = switch.guarded(module.forward)
    if kind == "graphs":  # what the graphs of the last pass have left may be written over by this one
        unet.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
    return len(parts)


class _Switch:
    """One for all parts: the first that fails turns it off."""

    def __init__(self, say: Callable[[str], None], mode: str | None) -> None:
        self._say, self._mode = say, mode
        self._on = True
        self._lock = Lock()

    def guarded(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        from torch._dynamo.exc import TorchDynamoException

        compiled = torch.compile(forward, dynamic=False, mode=self._mode)

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
