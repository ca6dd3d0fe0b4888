"""The families of base models that adapters are trained for, and what differs between them.

SDXL's UNet has three resolutions. It takes the states of two text encoders and, beside them, a pooled text vector and
the size conditioning (time ids). The UNet of Stable Diffusion 1 and 2 has four resolutions. It takes the states of one
text encoder and nothing else: its pooled vector has the width P = 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import StableDiffusionAdapterPipeline, StableDiffusionXLAdapterPipeline
from torch import Tensor

from t2i_adapter.errors import UserError

AdapterPipeline = StableDiffusionAdapterPipeline | StableDiffusionXLAdapterPipeline
"""The pipelines of diffusers that generate with an adapter, one a family."""


@dataclass(frozen=True)
class Family:
    """What is common to all bases of a family.

    Attributes:
        key: in an adapter's record.
        name: in messages.
        resolutions, embedding: the UNet's number of resolutions and its `addition_embed_type`, by which a base is
            recognised.
        text_parts: folders of the tokenizers, then of their text encoders in the same order.
        adapter_types: adapters that fit (`models.adapter.TYPES`); the first is the default.
        pipeline: class of diffusers that generates with an adapter.
        fixed: arguments of that class that are equal for all bases.
        can_use_zeros: whether the pipeline knows zeros as the states of a negative prompt that is not given.
    """

    key: str
    name: str
    resolutions: int
    embedding: str | None
    text_parts: tuple[str, ...]
    adapter_types: tuple[str, ...]
    pipeline: Any
    fixed: Mapping[str, Any]
    can_use_zeros: bool

    @property
    def parts(self) -> tuple[str, ...]:
        """Folders of a base in diffusers layout that are read."""
        return ("unet", "vae", "scheduler", *self.text_parts)


SDXL = Family(
    key="sdxl",
    name="SDXL",
    resolutions=3,
    embedding="text_time",
    text_parts=("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"),
    adapter_types=("full_adapter_xl",),
    pipeline=StableDiffusionXLAdapterPipeline,
    fixed={},
    can_use_zeros=True,
)
SD = Family(
    key="sd",
    name="Stable Diffusion 1 or 2",
    resolutions=4,
    embedding=None,
    text_parts=("tokenizer", "text_encoder"),
    adapter_types=("full_adapter", "light_adapter"),
    pipeline=StableDiffusionAdapterPipeline,
    fixed={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    can_use_zeros=False,
)
FAMILIES = (SDXL, SD)

_FOREIGN = ("class_embed_type", "encoder_hid_dim_type", "num_class_embeds")
"""Settings of a UNet that takes a condition of another kind, such as a picture's embedding or a noise level."""


def find_family(unet_config: Mapping[str, Any], name: str = "the base") -> Family:
    """Returns the family of the base that has a UNet with this config. Raises UserError if it is of none.

    name: of the base, for the message.
    """
    resolutions, embedding = len(unet_config["block_out_channels"]), unet_config.get("addition_embed_type")
    found = next((one for one in FAMILIES if (one.resolutions, one.embedding) == (resolutions, embedding)), None)
    if found is None:
        allowed = "; ".join(f"{one.name} has {one.resolutions} and {one.embedding!r}" for one in FAMILIES)
        raise UserError(
            f"{name} is neither an SDXL base nor a base of Stable Diffusion 1 or 2: its UNet has {resolutions} "
            f"resolutions and addition_embed_type {embedding!r}. {allowed}."
        )
    if (channels := unet_config.get("in_channels", 4)) != 4:
        raise UserError(
            f"{name}: its UNet takes {channels} channels, as bases for inpainting or editing do; allowed is "
            "4. Use the text-to-image base that it was made from."
        )
    if foreign := next((key for key in _FOREIGN if unet_config.get(key) is not None), None):
        raise UserError(
            f"{name}: its UNet has {foreign} {unet_config[foreign]!r}, as bases for variations or upscaling do; "
            "allowed is null. Use a text-to-image base."
        )
    return found


def added_conditions(pooled: Tensor, time_ids: Tensor) -> dict[str, Tensor] | None:
    """Returns the UNet's `added_cond_kwargs`; None for a base that takes no pooled vector, and so no time ids.

    pooled: (B,P), P = 0 for such a base; time_ids: (B,6).
    """
    return {"text_embeds": pooled, "time_ids": time_ids} if pooled.shape[-1] else None
