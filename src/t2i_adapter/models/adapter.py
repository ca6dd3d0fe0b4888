"""The T2I-Adapter network: builds one for a base, loads one, and checks that an adapter fits a base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import T2IAdapter

from t2i_adapter.config.tree import AdapterOptions
from t2i_adapter.errors import UserError, first_line
from t2i_adapter.models.family import find_family
from t2i_adapter.models.record import CONFIG, WEIGHTS
from t2i_adapter.models.weights import WeightsError, load_weights

GAINS = {"default": 1.0, "quiet": 0.01, "zero": 0.0}
"""`adapter.init` -> factor of all features at the start."""


@dataclass(frozen=True)
class Kind:
    """A type of adapter.

    Attributes:
        blocks: for each of `channels` in its config, the block of the UNet whose width it is. A light adapter's last
            two features share the last width.
        downscale: PixelUnshuffle factor at its input; its first feature has 1/downscale of the picture's sides.
    """

    blocks: tuple[int, ...]
    downscale: int


KINDS = {
    "full_adapter_xl": Kind(blocks=(0, 1, 2, 2), downscale=16),
    "full_adapter": Kind(blocks=(0, 1, 2, 3), downscale=8),
    "light_adapter": Kind(blocks=(0, 1, 2), downscale=8),
}
"""`adapter_type` -> its sizes. For a picture of H pixels the features have these heights:

full_adapter_xl H/16, H/16, H/32, H/32, as SDXL's UNet has them after its blocks and its middle block;
full_adapter, light_adapter H/8, H/16, H/32, H/64, as the four blocks of Stable Diffusion 1 and 2 have them.
"""


def channels_for(unet_config: Mapping[str, Any], adapter_type: str) -> tuple[int, ...]:
    """Returns the `channels` of an adapter of this type for a UNet.

    SDXL, full_adapter_xl: (320, 640, 1280, 1280). Stable Diffusion 1 and 2, full_adapter: (320, 640, 1280, 1280),
    light_adapter: (320, 640, 1280).
    """
    widths = unet_config["block_out_channels"]
    return tuple(widths[block] for block in KINDS[adapter_type].blocks)


def build_adapter(options: AdapterOptions, unet_config: Mapping[str, Any]) -> T2IAdapter:
    """Returns a randomly initialised adapter whose features fit the UNet, float32.

    Raises UserError if adapters of the type that `options` name fit no base of its family.
    """
    family = find_family(unet_config)
    adapter_type = options.type or family.adapter_types[0]
    if adapter_type not in family.adapter_types:
        raise UserError(
            f"{adapter_type}: does not fit the base, {family.name}; allowed for it: {', '.join(family.adapter_types)}.",
            option="adapter.type",
        )
    adapter = T2IAdapter(
        in_channels=options.in_channels,
        channels=list(channels_for(unet_config, adapter_type)),
        num_res_blocks=options.res_blocks,
        downscale_factor=KINDS[adapter_type].downscale,
        adapter_type=adapter_type,
    )
    if options.init != "default":
        _scale_features(adapter, GAINS[options.init])
    return adapter


@torch.no_grad()
def _scale_features(adapter: T2IAdapter, gain: float) -> None:
    """Multiplies every feature by `gain`, which scales through convolutions and ReLUs once the biases are zero.

    Only the first convolution is scaled: every stage's input is the stage before it.
    """
    for name, parameter in adapter.named_parameters():
        if name.endswith(".bias"):
            parameter.zero_()
        elif name in ("adapter.conv_in.weight", "adapter.body.0.in_conv.weight"):  # the latter of a light adapter
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
    if (kind := config.get("adapter_type", "full_adapter")) not in list(KINDS):  # it may be any JSON
        raise UserError(f"{name}/config.json: adapter_type is {str(kind)[:40]}; allowed are {', '.join(KINDS)}.")


def check_fits(adapter_config: Mapping[str, Any], unet_config: Mapping[str, Any], name: str = "the adapter") -> None:
    """Raises UserError unless the adapter's features can be added inside the UNet."""
    family = find_family(unet_config)
    got = _sizes(adapter_config["adapter_type"], adapter_config["channels"], adapter_config["downscale_factor"])
    allowed = [_sizes(kind, channels_for(unet_config, kind), KINDS[kind].downscale) for kind in family.adapter_types]
    if got not in allowed:
        raise UserError(
            f"{name} is {got}; it does not fit the base, {family.name}, which needs {' or '.join(allowed)}: use an "
            "adapter that was trained for this base."
        )
    widths = unet_config["block_out_channels"]
    if adapter_config["adapter_type"] == "light_adapter" and widths[2] != widths[3]:
        raise UserError(
            f"{name}: the last two features of a light_adapter have one width, and the base's UNet has {widths[2]} and "
            f"{widths[3]} channels there: use a full_adapter.",
            option="adapter.type",
        )


def _sizes(kind: str, channels: Sequence[int], downscale: int) -> str:
    """Returns what decides whether an adapter fits, as text."""
    return f"a {kind} with channels {tuple(channels)} and downscale_factor {downscale}"


def check_resolution(
    height: int, width: int, adapter_config: Mapping[str, Any], option: str = "data.resolution"
) -> None:
    """Raises UserError, with the nearest allowed sizes, unless the adapter takes pictures of this size.

    Both sides must be multiples of the downscale factor, 16 for SDXL and 8 for Stable Diffusion 1 and 2, because
    PixelUnshuffle needs that. Then the features have the UNet's sizes: both halve odd sizes by rounding up.
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
