"""The T2I-Adapter network: builds one for a base, loads one, and checks that an adapter fits a base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import T2IAdapter

from t2i_adapter.config.tree import AdapterOptions
from t2i_adapter.errors import UserError, first_line
from t2i_adapter.models.record import CONFIG, WEIGHTS
from t2i_adapter.models.weights import WeightsError, load_weights

GAINS = {"default": 1.0, "quiet": 0.01, "zero": 0.0}
"""`adapter.init` -> factor of all features at the start."""
DOWNSCALE = 16
"""PixelUnshuffle factor at the adapter's input; with 16 its features have the sizes of those in SDXL's UNet."""


def channels_for(unet_config: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Returns the channels of the four features for a UNet of three resolutions: after each block, and after the middle
    one.

    SDXL: (320, 640, 1280, 1280) at H/16, H/16, H/32, H/32.
    """
    widths = unet_config["block_out_channels"]
    return (widths[0], widths[1], widths[2], widths[2])


def build_adapter(options: AdapterOptions, unet_config: Mapping[str, Any]) -> T2IAdapter:
    """Returns a randomly initialised full_adapter_xl whose features fit the UNet, float32."""
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
    """Multiplies every feature by `gain`, which scales through convolutions and ReLUs once the biases are zero."""
    for name, parameter in adapter.named_parameters():
        if name.endswith(".bias"):
            parameter.zero_()
        elif name.endswith("conv_in.weight"):
            parameter.mul_(gain)


def load_adapter(name: str, *, cache_dir: str | None = None) -> T2IAdapter:
    """Loads a diffusers adapter from a folder or hub id, float32. Raises UserError if none is found."""
    place: Any = {"cache_dir": cache_dir, "local_files_only": Path(name).exists()}
    try:
        check_sizes(T2IAdapter.load_config(name, **place), name)
        return load_weights(T2IAdapter, name, torch.float32, **place)
    except (OSError, ValueError, WeightsError) as fault:
        raise UserError(
            f"{name}: no adapter found ({first_line(fault)}). Name a folder with {CONFIG} and {WEIGHTS}, or a hub id "
            "of such files."
        ) from fault


def check_sizes(config: Any, name: str) -> None:
    """Raises UserError unless an untrusted config describes a network of a reasonable size."""
    channels = config.get("channels", [1])  # a missing key has a default in diffusers
    if not isinstance(channels, list) or not 1 <= len(channels) <= 8:
        raise UserError(f"{name}/config.json: channels is {str(channels)[:40]}; allowed is a list of 1 to 8 numbers.")
    sizes = {f"channels[{i}]": (size, 8192) for i, size in enumerate(channels)}
    sizes |= {key: (config.get(key, 1), 64) for key in ("in_channels", "num_res_blocks", "downscale_factor")}
    for key, (size, most) in sizes.items():
        if type(size) is not int or not 1 <= size <= most:
            raise UserError(
                f"{name}/config.json: {key} is {str(size)[:40]}; allowed is a whole number from 1 to {most}."
            )
    kind, kinds = config.get("adapter_type", "full_adapter"), ("full_adapter", "full_adapter_xl", "light_adapter")
    if kind not in kinds:
        raise UserError(f"{name}/config.json: adapter_type is {str(kind)[:40]}; allowed are {', '.join(kinds)}.")


def check_fits(adapter_config: Mapping[str, Any], unet_config: Mapping[str, Any], name: str = "the adapter") -> None:
    """Raises UserError unless the adapter's features can be added inside the UNet."""
    got, wanted = tuple(adapter_config["channels"]), channels_for(unet_config)
    if adapter_config["adapter_type"] != "full_adapter_xl" or got != wanted:
        raise UserError(
            f"{name} ({adapter_config['adapter_type']}, channels {got}) does not fit the base, which needs "
            f"full_adapter_xl with channels {wanted}: use an adapter that was trained for this base."
        )


def check_resolution(
    height: int, width: int, adapter_config: Mapping[str, Any], option: str = "data.resolution"
) -> None:
    """Raises UserError, with the nearest allowed sizes, unless the adapter takes pictures of this size.

    Both sides must be multiples of the downscale factor: PixelUnshuffle needs that, and so do the features' sizes,
    because the UNet halves the latent (1/8 of the picture) twice.
    """
    factor = adapter_config["downscale_factor"]
    for side in {height, width}:
        if side % factor:
            below, above = side // factor * factor, -(-side // factor) * factor
            near = f"{below} or {above}" if below else f"{above}"
            raise UserError(
                f"{side}: the adapter takes picture sides in multiples of {factor} pixels; nearest: {near}.",
                option=option,
            )
