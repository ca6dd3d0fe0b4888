"""The T2I-Adapter itself: built for a base, loaded, checked against a base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import T2IAdapter

from t2i_adapter.config.tree import AdapterOptions
from t2i_adapter.errors import UserError, first_line

GAINS = {"default": 1.0, "quiet": 0.01, "zero": 0.0}
"""`adapter.init` -> what all features are multiplied by at the start."""
DOWNSCALE = 16
"""PixelUnshuffle factor at the adapter's input, with which its features lie on those of SDXL's UNet."""


def channels_for(unet_config: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Widths of the four features for a UNet of three resolutions: after each block, and after the middle one.

    SDXL: (320, 640, 1280, 1280) at H/16, H/16, H/32, H/32.
    """
    widths = unet_config["block_out_channels"]
    return (widths[0], widths[1], widths[2], widths[2])


def build_adapter(options: AdapterOptions, unet_config: Mapping[str, Any]) -> T2IAdapter:
    """A randomly initialised full_adapter_xl whose features fit the UNet, float32."""
    adapter = T2IAdapter(
        in_channels=options.in_channels,
        channels=list(channels_for(unet_config)),
        num_res_blocks=options.num_res_blocks,
        downscale_factor=DOWNSCALE,
        adapter_type="full_adapter_xl",
    )
    if options.init != "default":
        _scale_features(adapter, GAINS[options.init])
    return adapter


@torch.no_grad()
def _scale_features(adapter: T2IAdapter, gain: float) -> None:
    """Multiplies every feature by `gain`: with no biases the network of convolutions and ReLU is homogeneous."""
    for name, parameter in adapter.named_parameters():
        if name.endswith(".bias"):
            parameter.zero_()
        elif name.endswith("conv_in.weight"):
            parameter.mul_(gain)


def load_adapter(name: str, *, cache_dir: str | None = None) -> T2IAdapter:
    """A diffusers adapter from a folder or hub id, float32. Raises UserError if there is none."""
    place: Any = {"cache_dir": cache_dir, "local_files_only": Path(name).exists()}
    try:
        _check_sizes(T2IAdapter.load_config(name, **place), name)
        return T2IAdapter.from_pretrained(name, use_safetensors=True, torch_dtype=torch.float32, **place)
    except (OSError, ValueError) as fault:
        raise UserError(
            f"No adapter at {name!r}: a folder with config.json and diffusion_pytorch_model.safetensors, or a hub id "
            f"that has these, is needed. ({first_line(fault)})"
        ) from fault


def _check_sizes(config: Any, name: str) -> None:
    """Raises UserError unless a config that may come from anywhere describes a network that can be built."""
    channels = config.get("channels", [1])  # what is not there has a default
    if not isinstance(channels, list) or not 1 <= len(channels) <= 8:
        raise UserError(f"{name}/config.json: channels is {str(channels)[:40]}, allowed is a list of 1 to 8 numbers.")
    sizes = {f"channels[{i}]": (size, 8192) for i, size in enumerate(channels)}
    sizes |= {key: (config.get(key, 1), 64) for key in ("in_channels", "num_res_blocks", "downscale_factor")}
    for key, (size, most) in sizes.items():
        if type(size) is not int or not 1 <= size <= most:
            raise UserError(
                f"{name}/config.json: {key} is {str(size)[:40]}, allowed is a whole number from 1 to {most}."
            )
    kind, kinds = config.get("adapter_type", "full_adapter"), ("full_adapter", "full_adapter_xl", "light_adapter")
    if kind not in kinds:
        raise UserError(f"{name}/config.json: adapter_type is {str(kind)[:40]}, allowed are {', '.join(kinds)}.")


def check_fits(adapter_config: Mapping[str, Any], unet_config: Mapping[str, Any], name: str = "the adapter") -> None:
    """Raises UserError unless the adapter's features can be added inside the UNet."""
    got, wanted = tuple(adapter_config["channels"]), channels_for(unet_config)
    if adapter_config["adapter_type"] != "full_adapter_xl" or got != wanted:
        raise UserError(
            f"{name} ({adapter_config['adapter_type']}, channels {got}) does not fit the base, which takes "
            f"full_adapter_xl with channels {wanted}: use an adapter that was made for this base."
        )


def check_resolution(height: int, width: int, adapter_config: Mapping[str, Any], flag: str = "--resolution") -> None:
    """Raises UserError unless the adapter can take a picture of this size, naming the nearest sizes it can.

    PixelUnshuffle needs multiples of the downscale factor; its features meet the UNet's only at multiples of that,
    too, because the UNet halves the latent (1/8) twice.
    """
    factor = adapter_config["downscale_factor"]
    for side in {height, width}:
        if side % factor:
            below, above = side // factor * factor, -(-side // factor) * factor
            near = f"{below} or {above}" if below else f"{above}"
            raise UserError(
                f"{flag} {side}: the adapter takes picture sides in multiples of {factor} pixels; nearest: {near}."
            )
