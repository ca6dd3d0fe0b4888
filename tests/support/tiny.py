"""The tiny bases, data and configuration that the tests train with.

The bases have random weights and the real classes. They are written in seconds and run on one core. The tiny SDXL
follows every shape rule of SDXL: its UNet blocks and `text_time` conditioning, an 8x VAE, two text encoders side by
side, two CLIP tokenizers that pad differently. The tiny Stable Diffusion 1.5 and 2.1 have the files that the real ones
have, with the keys that those leave out.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def write_tiny_sd(
    folder: Path,
    *,
    is_v2: bool = False,
    seed: int = 0,
    channels: tuple[int, int, int, int] = (16, 32, 64, 64),
    scheduler: dict[str, Any] | None = None,
    variant: str | None = None,
) -> Path:
    """Writes a Stable Diffusion 1.5 in diffusers layout to `folder`, and returns the folder.

    is_v2: writes a 2.1 of 768 px instead: linear projections, a wide gelu text encoder, padding by "!", v-prediction.
    scheduler: further settings of the scheduler's file.

    As in the real 1.5, the scheduler's file names no prediction type and the VAE's no scaling factor, weights have the
    names of the libraries' first releases, and there is a folder of a safety checker.
    """
    import json

    import torch
    from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from safetensors.torch import load_file, save_file
    from transformers import CLIPTextModel

    vocab, merges = clip_vocabulary(WORDS.split())
    width = 32 if is_v2 else 16
    attention: dict[str, Any] = {"attention_head_dim": (2, 4, 8, 8), "use_linear_projection": True} if is_v2 else {}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=12 if is_v2 else 8,
            layers_per_block=1,
            block_out_channels=channels,
            norm_num_groups=8,
            cross_attention_dim=width,
            **{"attention_head_dim": 2, **attention},
        )
        torch.manual_seed(seed + 1)
        vae = make_vae(scaling_factor=0.18215)
        torch.manual_seed(seed + 2)
        text_encoder = CLIPTextModel(text_config(vocab, width, "gelu" if is_v2 else "quick_gelu"))
    steps = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=make_tokenizer(vocab, merges, pad="!" if is_v2 else END),
        unet=unet,
        scheduler=DDIMScheduler(**steps, prediction_type="v_prediction", clip_sample=False)
        if is_v2
        else PNDMScheduler(**steps, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, variant=variant)

    def edit(file: Path, *missing: str, **changes: Any) -> None:
        content = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({key: value for key, value in content.items() if key not in missing}))

    edit(folder / "scheduler" / "scheduler_config.json", *(() if is_v2 else ("prediction_type",)), **(scheduler or {}))
    if not is_v2:
        edit(folder / "vae" / "config.json", "scaling_factor", "latents_mean", "latents_std")
        edit(folder / "unet" / "config.json", *(key for key in unet.config if key.startswith("addition_")))
        for part in ("vae", "text_encoder"):
            (file,) = (folder / part).glob("*.safetensors")
            save_file({_first_name(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
        (folder / "safety_checker").mkdir()
        (folder / "safety_checker" / "config.json").write_text("{}")
    return Path(folder)


def _first_name(name: str) -> str:
    """A weight's name in the VAE or the text encoder as the first releases of the libraries wrote it."""
    if name.startswith(("embeddings.", "encoder.layers.", "final_layer_norm.")):
        return f"text_model.{name}"
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        name = name.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
    return name


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


def make_vae(scaling_factor: float = 0.13025) -> AutoencoderKL:
    """A VAE of four levels, so 8x downsampling; the factor is SDXL's by default."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        latent_channels=4,
        block_out_channels=(4, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=scaling_factor,
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


def write_adapter(folder: Path, base: Path, *, seed: int = 0, **options: Any) -> Path:
    """Writes an adapter of random weights for a base, with a record of 64 px, into `folder`.

    options: as in `AdapterOptions`.
    """
    import torch

    from t2i_adapter.config.tree import AdapterOptions, BaseOptions
    from t2i_adapter.export.adapter import save_adapter
    from t2i_adapter.models.adapter import build_adapter
    from t2i_adapter.models.open import open_base

    torch.manual_seed(seed)
    network = build_adapter(AdapterOptions(**options), open_base(BaseOptions(name=str(base))).unet_config)
    save_adapter(network, folder, metadata={"base": {"name": str(base)}, "resolution": 64}, fp16=False)
    return folder
