"""The finished parts as a folder in diffusers' layout: half precision, plain file names, any pipeline loads it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel

from nano_maker.text import TextModels
from nano_maker.unet import scheduler

MAX_BYTES = 40 * 2**20


def pipeline(vae: AutoencoderKL, text: TextModels, unet: UNet2DConditionModel) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text.first,
        text_encoder_2=text.second,
        tokenizer=text.tokenizers[0],
        tokenizer_2=text.tokenizers[1],
        unet=unet,
        scheduler=scheduler(),  # pyright: ignore[reportArgumentType]
        force_zeros_for_empty_prompt=True,  # as SDXL; dropped captions were trained both as zeros and as ""
        add_watermarker=False,
    )


def _load_as_float32(config: Path) -> None:
    """transformers loads in the type that was saved, diffusers in float32: without a word they would not fit."""
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "dtype": "float32"}, indent=2, sort_keys=True) + "\n")


def write(folder: Path, base: StableDiffusionXLPipeline) -> int:
    """Save the base in half precision; returns the bytes of the weights."""
    base.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    base.to(torch.float32)
    for encoder in ("text_encoder", "text_encoder_2"):
        _load_as_float32(folder / encoder / "config.json")
    for weights in folder.rglob("*.safetensors"):
        weights.chmod(0o644)  # they are written readable by their owner alone
    size = sum(p.stat().st_size for p in folder.rglob("*.safetensors"))
    if size > MAX_BYTES:
        raise ValueError(f"{folder} holds {size / 2**20:.1f} MB of weights; at most {MAX_BYTES / 2**20:.0f} may travel")
    return size
