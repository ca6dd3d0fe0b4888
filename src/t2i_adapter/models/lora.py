"""Adds LoRAs to a base's weights: W <- W + weight * alpha / rank * B A (2106.09685, section 4.1).

The file's names are read by the loader of diffusers, which knows those of most trainers. The sum is made once, so a
step costs what it costs without a LoRA, and no other package is needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.utils.state_dict_utils import (
    StateDictType,
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from safetensors import SafetensorError
from torch import Tensor

from t2i_adapter.errors import UserError, first_line
from t2i_adapter.files import user_path
from t2i_adapter.models.lora_file import Lora

_PARTS = ("unet", "text_encoder_2", "text_encoder")
_DOWN = ".lora_A.weight"


def add_loras(loras: Sequence[Lora], parts: Mapping[str, Any]) -> None:
    """Adds LoRAs to the weights of a base's parts.

    parts: "unet", and "text_encoder" and "text_encoder_2" as far as the base has them.

    Raises UserError if a file cannot be read, holds another kind of weights, or does not fit the base.
    """
    for lora in loras:
        _add(lora, parts)


@torch.no_grad()
def _add(lora: Lora, parts: Mapping[str, Any]) -> None:
    state, alphas, described = _read(lora.source, parts["unet"].config)
    count = 0
    for name in _PARTS:
        own = _part({**state, **alphas}, name)
        own_alphas = {key: own.pop(key) for key in list(own) if key.endswith(".alpha")}
        if not own:
            continue
        if name not in parts:
            raise UserError(f"{lora.source}: has weights for {name}, which this base does not have.", option="lora")
        modules = dict(parts[name].named_modules())
        for key in [key for key in own if key.endswith(_DOWN)]:
            stem = key.removesuffix(_DOWN)
            down, up = own.pop(key), own.pop(f"{stem}.lora_B.weight", None)
            layer = modules.get(stem) or modules.get(stem.removeprefix("text_model."))
            if up is None or layer is None or not hasattr(layer, "weight"):
                raise _unfit(lora, f"{name}.{stem} is missing in the base")
            alpha = own_alphas.get(f"{stem}.alpha", own_alphas.get(f"{key}.alpha"))
            if alpha is None:
                alpha = _described_alpha(name, stem, described, len(down))
            _add_to(layer.weight, down, up, lora.weight * alpha / len(down), lora)
            count += 1
        if own:
            raise UserError(
                f"{lora.source}: {next(iter(own))} is no matrix of a plain LoRA; LoHa, LoKr and DoRA are not read.",
                option="lora",
            )
    if not count:
        raise UserError(f"{lora.source}: holds no LoRA weights of an SDXL.", option="lora")


def _add_to(weight: Tensor, down: Tensor, up: Tensor, factor: float, lora: Lora) -> None:
    """weight (out, in) or (out, in, k, k); down (rank, in, ...), up (out, rank, ...)."""
    product = up.flatten(1).float() @ down.flatten(1).float()
    if product.numel() != weight.numel() or len(up) != len(weight):
        raise _unfit(lora, f"a matrix is {tuple(product.shape)}, the base's is {tuple(weight.shape)}")
    changed = weight.float() + factor * product.view_as(weight).to(weight.device)
    weight.copy_(changed.to(weight.dtype))


def _part(entries: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns the entries of one of the parts, weights and alphas, with PEFT's names: lora_A and lora_B."""
    own = {key.removeprefix(f"{name}."): value for key, value in entries.items() if key.startswith(f"{name}.")}
    if name == "unet":
        return convert_unet_state_dict_to_peft(own)
    # One file may have the names of both forms.
    newer = convert_state_dict_to_diffusers(own, StateDictType.DIFFUSERS_OLD)
    return convert_state_dict_to_peft(newer, StateDictType.DIFFUSERS)


def _described_alpha(part: str, stem: str, described: Mapping[str, Any], rank: int) -> float:
    """Returns a layer's alpha by the file's description, or else its rank."""
    for pattern, alpha in (described.get(f"{part}.alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", stem):
            return alpha
    return described.get(f"{part}.lora_alpha", rank)


def _read(source: str, unet_config: Any) -> tuple[dict[str, Tensor], Mapping[str, float], Mapping[str, Any]]:
    """Returns the weights with names of diffusers, their alphas, and the file's description. Raises UserError."""
    path = user_path(source)
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise UserError(f"{source}: pickled weights are not read; use a .safetensors file.", option="lora")
    found = str(path) if path.exists() else source
    reader: Any = StableDiffusionXLLoraLoaderMixin
    try:
        state, alphas, described = reader.lora_state_dict(
            found,
            unet_config=unet_config,
            use_safetensors=True,
            local_files_only=path.exists(),
            return_lora_metadata=True,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as fault:
        raise UserError(
            f"{source}: no LoRA found ({first_line(fault)}). Name a .safetensors file, or a hub id of one.",
            option="lora",
        ) from fault
    described = described or {}
    if any(described.get(f"{part}.{key}") for part in _PARTS for key in ("use_dora", "use_rslora")):
        raise UserError(f"{source}: DoRA and rank-stabilised LoRAs are not read.", option="lora")
    return state, alphas or {}, described


def _unfit(lora: Lora, why: str) -> UserError:
    return UserError(f"{lora.source}: does not fit this base ({why}); use a LoRA of SDXL.", option="lora")
