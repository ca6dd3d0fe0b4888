"""Which of the UNet's activations are forgotten in the forward pass and computed again in the backward pass."""

from __future__ import annotations

from typing import Any, Literal

Blocks = Literal["all", "large"]

_LARGE = ("down_blocks.0.", "down_blocks.1.", "up_blocks.1.", "up_blocks.2.")
"""Blocks of the two highest of SDXL's three resolutions."""


def recompute(unet: Any, blocks: Blocks) -> None:
    """Has the UNet recompute its blocks' activations: of `all` of them, or of the `large` ones alone.

    Nothing is drawn inside the UNet, so the gradients are the same.
    """
    unet.enable_gradient_checkpointing()
    if blocks == "all":
        return
    for name, module in unet.named_modules():
        if hasattr(module, "gradient_checkpointing") and not f"{name}.".startswith(_LARGE):
            module.gradient_checkpointing = False
