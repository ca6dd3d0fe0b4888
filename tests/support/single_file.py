"""Rewrites a base in diffusers layout as one .safetensors file in the layout of its family's original release."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Weights = dict[str, "Tensor"]

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "conditioner.embedders.0.transformer.text_model."
OPEN_CLIP = "conditioner.embedders.1.model."
SD1_CLIP, SD2_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."

UNET_STEM = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
VAE_ATTENTION |= {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}  # first releases of diffusers
OPEN_CLIP_STEM = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def write_single_file(folder: Path, path: Path, **extra: Tensor) -> Path:
    """Writes the base in `folder` to `path`, with `extra` entries beside its weights, and returns `path`."""
    from safetensors.torch import save_file

    weights = {**original_layout(folder), **extra}
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    return path


def original_layout(folder: Path) -> Weights:
    """All weights of a base in diffusers layout, under their names in the original release."""
    import torch

    unet, vae, clip = (_read(folder / part) for part in ("unet", "vae", "text_encoder"))
    layers = json.loads((folder / "unet" / "config.json").read_text())["layers_per_block"]
    levels = len(json.loads((folder / "vae" / "config.json").read_text())["up_block_types"])
    weights = {
        **{UNET + _unet_name(name, layers, unet): tensor for name, tensor in unet.items()},
        **{VAE + _vae_name(name, levels): _as_convolution(name, tensor) for name, tensor in vae.items()},
    }
    if (folder / "text_encoder_2").is_dir():
        first, second, open_clip = CLIP, OPEN_CLIP, _open_clip(_read(folder / "text_encoder_2"))
    elif json.loads((folder / "text_encoder" / "config.json").read_text())["hidden_act"] == "gelu":
        width = next(len(tensor) for name, tensor in clip.items() if name.endswith("final_layer_norm.weight"))
        first, second, open_clip = None, SD2_CLIP, {**_open_clip(clip), "text_projection": torch.eye(width)}
    else:
        first, second, open_clip = SD1_CLIP, None, {}
    # The releases also have position_ids and logit_scale, which no model uses.
    if first:
        weights |= {first + name.removeprefix("text_model."): tensor for name, tensor in clip.items()}
        weights[first + "embeddings.position_ids"] = torch.arange(77)[None]
    if second:
        weights |= {second + name: tensor for name, tensor in open_clip.items()}
        weights[second + "logit_scale"] = torch.tensor(4.6)
    return weights


def _read(folder: Path) -> Weights:
    from safetensors.torch import load_file

    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def _unet_name(name: str, layers: int, names: Any) -> str:
    """Name of a UNet weight in the release, which numbers all blocks of a side: `layers` resnets a level, a resize."""
    for ours, theirs in UNET_STEM.items():
        if name.startswith(ours + "."):
            return theirs + name[len(ours) :]
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        kind, index, rest = match[1], int(match[2]), match[3]
        place = 2 * index + (kind == "attentions")
        return f"middle_block.{place}.{_unet_inner(kind, rest)}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    assert match, name
    side, level, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if side == "down":
        place = 1 + level * (layers + 1)
        if kind == "downsamplers":
            return f"input_blocks.{place + layers}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{place + index}.{int(kind == 'attentions')}.{_unet_inner(kind, rest)}"
    place = level * (layers + 1)
    if kind == "upsamplers":
        attends = any(other.startswith(f"up_blocks.{level}.attentions.") for other in names)
        return f"output_blocks.{place + layers}.{2 if attends else 1}.{rest}"
    return f"output_blocks.{place + index}.{int(kind == 'attentions')}.{_unet_inner(kind, rest)}"


def _unet_inner(kind: str, rest: str) -> str:
    part, _, parameter = rest.partition(".")
    return f"{UNET_RESNET[part]}.{parameter}" if kind == "resnets" else rest


def _vae_name(name: str, levels: int) -> str:
    """Name of a VAE weight in the release, which counts decoder levels from the pixels; diffusers from the latents."""
    if match := re.fullmatch(r"(.+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
        return f"{match[1]}.mid.attn_1.{VAE_ATTENTION[match[2]]}.{match[3]}"
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    name = name.replace(".resnets.", ".block.").replace("samplers.0.", "sample.")
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def _as_convolution(name: str, tensor: Tensor) -> Tensor:
    """Reshapes a weight of VAE attention: 1x1 convolutions in the release, linear layers in diffusers."""
    linear = "attentions" in name and tensor.ndim == 2
    return tensor[:, :, None, None] if linear else tensor


def _open_clip(weights: Weights) -> Weights:
    """The second text encoder in OpenCLIP's layout: one matrix for query, key and value; a transposed projection."""
    import torch

    found: Weights = {}
    for name, tensor in weights.items():
        name = name.removeprefix("text_model.")
        if name == "text_projection.weight":
            found["text_projection"] = tensor.T
        elif name in OPEN_CLIP_STEM:
            found[OPEN_CLIP_STEM[name]] = tensor
        else:
            match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
            assert match, name
            layer, part, parameter = f"transformer.resblocks.{match[1]}", match[2], match[3]
            if part in OPEN_CLIP_LAYER:
                found[f"{layer}.{OPEN_CLIP_LAYER[part]}.{parameter}"] = tensor
            elif part == "self_attn.q_proj":
                rows = [weights[_sibling(weights, match[1], other, parameter)] for other in "qkv"]
                found[f"{layer}.attn.in_proj_{parameter}"] = torch.cat(rows)
    return found


def _sibling(weights: Weights, layer: str, letter: str, parameter: str) -> str:
    (name,) = (key for key in weights if key.endswith(f".layers.{layer}.self_attn.{letter}_proj.{parameter}"))
    return name
