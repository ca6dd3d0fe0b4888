"""A ControlNet beside the adapter. Its residuals join the UNet's skip connections; the adapter's join its blocks.

The ControlNet is called in a hook before each call of the UNet, with the same latents, timestep and text, so it works
in every pipeline. Letters: B pictures; N rows of a call, B or 2 B.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel
from PIL import Image
from torch import Tensor

from t2i_adapter.errors import UserError, first_line
from t2i_adapter.models.base import freeze
from t2i_adapter.models.weights import WeightsError, load_weights

_SHARED = ("cross_attention_dim", "block_out_channels", "layers_per_block", "addition_embed_type")
"""Sizes that a ControlNet has from its base."""


def load_controlnet(name: str, unet_config: Any, device: Any, dtype: torch.dtype) -> ControlNetModel:
    """Loads a ControlNet from a folder or hub id. Raises UserError if none is found, or it does not fit the base."""
    place: Any = {"local_files_only": Path(name).exists()}
    try:
        config: Any = ControlNetModel.load_config(name, **place)
        kind = config.get("_class_name")
        if kind != "ControlNetModel":
            raise UserError(f"{name}: is {kind}; allowed is ControlNetModel.", option="controlnet")
        for key in _SHARED:
            got, wanted = config.get(key), unet_config.get(key)
            if got is not None and _plain(got) != _plain(wanted):
                raise UserError(
                    f"{name}: {key} is {got}, and {wanted} in the base; use a ControlNet of this kind of base.",
                    option="controlnet",
                )
        return freeze(load_weights(ControlNetModel, name, dtype, **place), device)
    except (OSError, ValueError, WeightsError) as fault:
        raise UserError(
            f"{name}: no ControlNet found ({first_line(fault)}). Name a folder with config.json and safetensors "
            "weights, or a hub id of such files.",
            option="controlnet",
        ) from fault


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Controlled:
    """A ControlNet and the pictures that it follows.

    Attributes:
        pictures: RGB, one for each picture to generate, of its size.
        scale: weight of its residuals.
    """

    network: ControlNetModel
    pictures: Sequence[Image.Image]
    scale: float = 1.0

    def part(self, part: slice) -> Controlled:
        """Returns that of some of the pictures."""
        return replace(self, pictures=self.pictures[part])

    @contextmanager
    def on(self, unet: Any) -> Iterator[None]:
        """While it is open, each call of the UNet gets the ControlNet's residuals."""
        pixels = torch.stack([torch.from_numpy(np.array(picture.convert("RGB"))) for picture in self.pictures])
        condition = pixels.permute(0, 3, 1, 2).float() / 255

        def before(_unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
            return args, {**kwargs, **self._residuals(condition, args, kwargs)}

        handle = unet.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def _residuals(self, condition: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        sample, timestep, *_ = args
        given: Any = condition.repeat(len(sample) // len(condition), 1, 1, 1)
        down, middle = self.network(
            sample,
            timestep,
            encoder_hidden_states=kwargs["encoder_hidden_states"],
            controlnet_cond=given.to(sample.device, self.network.dtype),
            conditioning_scale=self.scale,
            added_cond_kwargs=kwargs.get("added_cond_kwargs"),
            return_dict=False,
        )
        return {"down_block_additional_residuals": list(down), "mid_block_additional_residual": middle}
