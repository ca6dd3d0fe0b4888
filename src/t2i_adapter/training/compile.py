"""Compiles the UNet with torch.compile; if that fails, the UNet runs uncompiled."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

from t2i_adapter.errors import first_line

Compile = Literal["off", "on", "graphs"]

SHORT_RUN = 1_000
"""Fewer updates hardly win back the minute or more that compiling takes
(benchmarks/results/compiling_2cpu_2026-11-26.json)."""
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
BLOCKS = (BasicTransformerBlock, ResnetBlock2D)
MAX_SHAPES = 512
"""Most shapes for which a block is compiled; torch then stops compiling it."""


def compile_unet(unet: Any, device: torch.device, kind: Compile, steps: int | None, log: Callable[[str], None]) -> int:
    """Wraps the UNet's parts in torch.compile, which compiles them for each shape when they are first called; returns
    the number of parts. If compiling fails, all parts run uncompiled and `log` gets one line.

    steps: updates of the run, None if unknown; `log` gets a line if they are too few. On a CPU the UNet is one part,
    since compiling blocks one by one wins nothing there. On a GPU each transformer and residual block is a part, and
    equal blocks share their code. kind `graphs` is `mode="reduce-overhead"`: CUDA graphs of each part. The compiled
    code is cached in $TORCHINDUCTOR_CACHE_DIR, by default ~/.cache/t2i_adapter/compiled, which only the user can write.
    """
    if kind == "off":
        return 0
    if steps is not None and steps < SHORT_RUN:
        log(f"--train.compile {kind}: compiling takes a minute or more, and {steps} updates may not make up for it.")
    if CACHE_VARIABLE not in os.environ:
        os.environ[CACHE_VARIABLE] = _cache_folder()
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_SHAPES)
    accumulated = max(torch._dynamo.config.accumulated_recompile_limit, MAX_SHAPES)
    torch._dynamo.config.accumulated_recompile_limit = accumulated
    switch = _Switch(log, "reduce-overhead" if kind == "graphs" else None)
    parts = [unet] if device.type == "cpu" else [block for block in unet.modules() if isinstance(block, BLOCKS)]
    for module in parts:
        module.forward = switch.guarded(module.forward)
    if kind == "graphs":  # this pass may overwrite the graphs' memory of the last
        unet.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
    return len(parts)


def _cache_folder() -> str:
    """Where only the user can write, because what lies there is run; without a home folder a new temporary one."""
    try:
        return str(Path.home() / ".cache" / "t2i_adapter" / "compiled")
    except RuntimeError:
        return tempfile.mkdtemp(prefix="t2i-adapter-compiled-")


class _Switch:
    """Shared by all parts: the first part that fails to compile turns compiling off for all."""

    def __init__(self, log: Callable[[str], None], mode: str | None) -> None:
        self._log, self._mode = log, mode
        self._is_on = True
        self._lock = Lock()

    def guarded(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        from torch._dynamo.exc import TorchDynamoException

        compiled = torch.compile(forward, dynamic=False, mode=self._mode)

        def either(*args: Any, **kwargs: Any) -> Any:
            if self._is_on and torch.is_grad_enabled():  # not in validation, which is rare and has other shapes
                try:
                    return compiled(*args, **kwargs)
                except TorchDynamoException as fault:  # not what the part itself raises
                    self._turn_off(fault)
            return forward(*args, **kwargs)

        return either

    def _turn_off(self, fault: Exception) -> None:
        with self._lock:
            if self._is_on:
                self._log(
                    f"--train.compile: the UNet cannot be compiled here ({first_line(fault)}); it runs uncompiled."
                )
            self._is_on = False
