"""The tiny SDXL base, data and configuration that the tests train with.

The base has random weights and the real classes. It is written in seconds and runs on one core, and follows every shape
rule of SDXL: its UNet blocks and `text_time` conditioning, an 8x VAE, two text encoders side by side, two CLIP
tokenizers that pad differently.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTokenizer

WORDS = "a the of and in on with circle square background red green blue black white orange purple cyan brown floral"
END = "<|endoftext|>"
SPECIALS = ("<|startoftext|>", END)


def write_tiny_sdxl(
    folder: Path,
    *,
    prediction_type: str = "epsilon",
    zero_snr: bool = False,
    seed: int = 0,
    vae_seed: int | None = None,
    text_seed: int | None = None,
    channels: tuple[int, int, int] = (16, 32, 64),
    variant: str | None = None,
) -> Path:
    """Writes a base in diffusers layout to `folder` and returns the folder.

    seed: of all weights. vae_seed, text_seed: of the VAE or the text encoders alone, with unchanged shapes.
    zero_snr: rescales the schedule to zero terminal SNR.
    """
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    vocab, merges = clip_vocabulary(WORDS.split())
    narrow, wide = text_config(vocab, 16, "quick_gelu"), text_config(vocab, 32, "gelu")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        unet = make_unet(channels, text_width=16 + 32, pooled_width=32)
        torch.manual_seed(seed + 1 if vae_seed is None else vae_seed)
        vae = make_vae()
        torch.manual_seed(seed + 2 if text_seed is None else text_seed)
        text_encoder, text_encoder_2 = CLIPTextModel(narrow), CLIPTextModelWithProjection(wide)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="leading",
        steps_offset=1,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=make_tokenizer(vocab, merges, pad=END),
        tokenizer_2=make_tokenizer(vocab, merges, pad="!"),
        unet=unet,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder, variant=variant)
    return Path(folder)


def make_unet(channels: tuple[int, int, int], text_width: int, pooled_width: int) -> UNet2DConditionModel:
    """A UNet with SDXL's topology: no attention in the first block, deeper transformers further down."""
    from diffusers import UNet2DConditionModel

    time_width = 8
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=channels,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 2, 4),
        cross_attention_dim=text_width,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_width,
        projection_class_embeddings_input_dim=pooled_width + 6 * time_width,
    )


def make_vae() -> AutoencoderKL:
    """A VAE of four levels, so 8x downsampling, with SDXL's scaling factor."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        latent_channels=4,
        block_out_channels=(4, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.13025,
        force_upcast=True,
    )


def text_config(vocab: dict[str, int], width: int, activation: str) -> CLIPTextConfig:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act=activation,
        bos_token_id=vocab[SPECIALS[0]],
        eos_token_id=vocab[END],
        pad_token_id=vocab[END],
    )


def make_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]], pad: str) -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=77)
    assert len(tokenizer) == len(vocab), "transformers ignored the vocabulary: its argument names have changed"
    return tokenizer


def clip_vocabulary(words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's byte alphabet (alone, and at the end of a word), with merges that make each of `words` one token."""
    tokens = [*byte_characters(), *(c + "</w>" for c in byte_characters())]
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        left = word[0] if len(word) > 1 else word + "</w>"
        for right in [*word[1:-1], word[-1] + "</w>"] if len(word) > 1 else []:
            merges[left, right] = None
            left += right
            if left not in tokens:
                tokens.append(left)
    tokens += SPECIALS
    return {token: index for index, token in enumerate(tokens)}, list(merges)


def byte_characters() -> list[str]:
    """GPT-2's printable character for each byte, in its order: the printable bytes, then the others from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]


def write_circles(folder: Path, *, num: int = 8, split: str = "train", size: int = 64, seed: int = 0) -> Path:
    """Writes an image folder of circles: `folder`/`split`/{00000.png, 00000_outline.png, ..., metadata.jsonl}."""
    import json

    import numpy as np
    from PIL import Image, ImageDraw

    colors = ("red", "green", "blue", "white", "orange", "purple", "cyan", "brown")
    choices = np.random.default_rng(seed)
    root = Path(folder) / split
    root.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(num):
        fill, ground = (str(color) for color in choices.choice(colors, 2, replace=False))
        radius = int(choices.integers(size // 8, size // 3))
        x, y = (int(centre) for centre in choices.integers(radius + 1, size - radius - 1, 2))
        box = (x - radius, y - radius, x + radius, y + radius)
        image, outline = Image.new("RGB", (size, size), ground), Image.new("RGB", (size, size))
        ImageDraw.Draw(image).ellipse(box, fill=fill)
        ImageDraw.Draw(outline).ellipse(box, outline="white", width=2)
        names = f"{index:05d}.png", f"{index:05d}_outline.png"
        image.save(root / names[0])
        outline.save(root / names[1])
        text = f"{fill} circle with {ground} background"
        rows.append({"file_name": names[0], "conditioning_image_file_name": names[1], "text": text})
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Path(folder)


def write_adapter(folder: Path, base: Path, *, seed: int = 0) -> Path:
    """Writes an adapter of random weights for a base, with a record of 64 px, into `folder`."""
    import torch

    from t2i_adapter.config.tree import AdapterOptions, BaseOptions
    from t2i_adapter.export.adapter import save_adapter
    from t2i_adapter.models.adapter import build_adapter
    from t2i_adapter.models.open import open_base

    torch.manual_seed(seed)
    network = build_adapter(AdapterOptions(), open_base(BaseOptions(name=str(base))).unet_config)
    save_adapter(network, folder, metadata={"base": {"name": str(base)}, "resolution": 64}, fp16=False)
    return folder
