"""Writes the trained parts as a folder in the layout of diffusers, in half precision; any SDXL pipeline loads it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel

from nano_maker.text import TextModels
from nano_maker.unet import scheduler
from t2i_adapter.errors import UserError
from t2i_adapter.files import show_bytes

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
        force_zeros_for_empty_prompt=True,  # as SDXL; the UNet was trained with zeros and with the encoded ""
        add_watermarker=False,
    )


def _load_as_float32(config: Path) -> None:
    """Makes transformers load an encoder as float32, as diffusers does; without it the type would be the stored one."""
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "dtype": "float32"}, indent=2, sort_keys=True) + "\n")


def write(folder: Path, base: StableDiffusionXLPipeline) -> int:
    """Writes the base in half precision; returns the bytes of its weights. Raises UserError above MAX_BYTES."""
    base.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    base.to(torch.float32)
    for encoder in ("text_encoder", "text_encoder_2"):
        _load_as_float32(folder / encoder / "config.json")
    for weights in folder.rglob("*.safetensors"):
        weights.chmod(0o644)  # safetensors makes them readable by their owner only
    size = sum(p.stat().st_size for p in folder.rglob("*.safetensors"))
    if size > MAX_BYTES:
        raise UserError(
            f"{folder} holds {show_bytes(size)} of weights; the package may contain {show_bytes(MAX_BYTES)}."
        )
    return size
