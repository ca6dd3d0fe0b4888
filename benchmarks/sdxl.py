"""SDXL at its true size with random weights, and its training step: what several benchmarks measure.

Nothing is downloaded. A network is built on the meta device and gets its weights on the device that it runs on, so
2.6 billion parameters take seconds. Speed and memory do not depend on the weights' values.

`TRUE` has SDXL's published configs. `TINY` has the same classes and blocks with few channels, to try a benchmark on a
CPU in seconds; its figures mean nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from t2i_adapter.batches.example import example_batch
from t2i_adapter.config.tree import AdapterOptions, BaseOptions, Config, OptimOptions, TrainOptions
from t2i_adapter.devices import release
from t2i_adapter.models import nano
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.base import Base, freeze
from t2i_adapter.models.known import KnownBase
from t2i_adapter.training.frozen_model import load_frozen_model
from t2i_adapter.training.memory import Memory, Shapes
from t2i_adapter.training.optim import make_optimizer
from t2i_adapter.training.step import FrozenModel, batch_losses

UNET: dict[str, Any] = KnownBase(BaseOptions(name="stabilityai/stable-diffusion-xl-base-1.0")).unet_config
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
TEXT: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
    },
    "text_encoder_2": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    },
}
_TINY_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 32, 64),
    "transformer_layers_per_block": (1, 1, 1),
    "attention_head_dim": (1, 1, 2),
    "cross_attention_dim": 64,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
}


@dataclass(frozen=True)
class Size:
    """Configs of a base. resolution: side of its pictures in pixels."""

    resolution: int
    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, dict[str, Any]]


TRUE = Size(1024, UNET, VAE, TEXT)
TINY = Size(
    64,
    {**UNET, **_TINY_UNET},
    {**VAE, "block_out_channels": (32,) * 4, "layers_per_block": 1, "sample_size": 64},
    {part: {**config, **_TINY_TEXT, "projection_dim": 32} for part, config in TEXT.items()},
)
SIZES = {"true": TRUE, "tiny": TINY}

CLASSES: dict[str, Any] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}


# The base ------------------------------------------------------------------------------------------------------------


def write_configs(folder: Path, size: Size) -> Path:
    """Writes a base in diffusers layout without weights; returns the folder."""
    for part in ("scheduler", "tokenizer", "tokenizer_2"):
        shutil.copytree(nano.path() / part, folder / part, dirs_exist_ok=True)
    with torch.device("meta"):
        UNet2DConditionModel(**size.unet).save_config(folder / "unet")
        AutoencoderKL(**size.vae).save_config(folder / "vae")
    for part, config in size.text.items():
        small = json.loads((nano.path() / part / "config.json").read_text())
        special = {name: small[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, **special, **config).save_pretrained(folder / part)
    return folder


def write_base(folder: Path, size: Size = TRUE, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> Path:
    """Writes the base with random weights, 7 GB at the true size, unless `folder` holds it; returns the folder."""
    if not (folder / "model_index.json").is_file():
        write_configs(folder, size)
        for part in CLASSES:
            make_part(folder, part, device, dtype).to("cpu").save_pretrained(folder / part)
        shutil.copy(nano.path() / "model_index.json", folder)  # last: marks the folder as complete
    return folder


def make_part(folder: Path, part: str, device: torch.device | str, dtype: torch.dtype) -> Any:
    """Builds a network of the base by its config in `folder`, with random weights, on the device."""
    kind = CLASSES[part]
    is_text = part.startswith("text")
    config = CLIPTextConfig.from_pretrained(folder / part) if is_text else kind.load_config(folder / part)
    return materialise(lambda: kind(config) if is_text else kind.from_config(config), device, dtype)


def materialise(make: Callable[[], nn.Module], device: torch.device | str, dtype: torch.dtype) -> Any:
    """Builds a network on the meta device, and gives it memory and random weights on the device."""
    with torch.device("meta"):
        model = make()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # diffusers' own `to` warns of a dtype without a checkpoint
    return fill(model.to_empty(device=device))


@torch.no_grad()
def fill(model: nn.Module) -> Any:
    """Sets weights that preserve the scale of activations: a repeated block of normals times 1/sqrt(inputs).

    Norm weights are 1, biases 0.
    """
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    for name, buffer in model.named_buffers():
        buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer)) if "position" in name else buffer.zero_()
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(float(name.endswith("weight")))
            continue
        block, flat = block.to(parameter.device), parameter.view(-1)
        scaled = (block * parameter[0].numel() ** -0.5).to(parameter.dtype)
        for start in range(0, flat.numel(), scaled.numel()):
            piece = flat[start : start + scaled.numel()]
            piece.copy_(scaled[: piece.numel()])
    return model


class RandomBase(Base):
    """A base whose folder has configs only: each part gets random weights when it is loaded."""

    def _load(self, kind: Any, part: str, device: torch.device | str, dtype: torch.dtype) -> Any:
        return freeze(make_part(self.folder, part, device, dtype), device)


# The step ------------------------------------------------------------------------------------------------------------


def config_of(settings: dict[str, Any], folder: Path) -> Config:
    """The options of a row. Its keys: batch, quantize, recompute (the blocks), compile, optimizer."""
    train = TrainOptions(
        gradient_checkpointing="recompute" in settings,
        checkpoint_blocks=settings.get("recompute", "all"),
        compile=settings.get("compile", "off"),
    )
    base = BaseOptions(name=str(folder), quantize=settings.get("quantize", "none"))
    optim = OptimOptions(name=settings.get("optimizer", "adamw"), lr=1e-5)
    return replace(Config(), base=base, train=train, optim=optim)


class Bench:
    """An adapter on a base of this size, and its training step as a run makes it, without the run's loop.

    folder: the base's configs (`write_configs`). settings: as in `config_of`, and `unfrozen`: the base's weights get
    gradients too, which stay in memory, as in the diffusers script.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], device: torch.device) -> None:
        self.device, self.config = device, config_of(settings, folder)
        self.base = RandomBase(self.config.base, folder)
        self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16")
        self.frozen: FrozenModel = load_frozen_model(self.config, self.base, device, torch.bfloat16)
        self.frozen.unet.requires_grad_(settings.get("unfrozen", False))
        torch.manual_seed(0)
        self.plain_adapter = build_adapter(AdapterOptions(), self.base.unet_config).to(device)
        self.optimizer = make_optimizer(self.config.optim, list(self.plain_adapter.parameters()), self.config.optim.lr)
        self.adapter = self.accelerator.prepare(self.plain_adapter)

    def batch(self, size: int, resolution: int, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        return example_batch(self.base.unet_config, size, height=resolution, width=resolution, device=self.device)

    def gradients(self, batch: Any) -> Tensor:
        """Adds the adapter's gradients; returns the loss ()."""
        loss = batch_losses(self.adapter, self.frozen, batch).mean()
        self.accelerator.backward(loss)
        return loss.detach()

    def step(self, batch: Any) -> Tensor:
        loss = self.gradients(batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def clear(self) -> None:
        """Drops gradients, such as those that a step without memory left, and returns free memory to the device."""
        self.optimizer.zero_grad()
        self.frozen.unet.zero_grad()
        release(self.device)

    def gradient(self, batch: Any) -> Tensor:
        """The adapter's gradient as one vector on the CPU, float32."""
        self.clear()
        self.gradients(batch)
        found = [p.grad.flatten().float().cpu() for p in self.plain_adapter.parameters() if p.grad is not None]
        self.clear()
        return torch.cat(found)

    def forecast(self, size: int, resolution: int) -> Memory:
        """What `t2i-adapter plan` says that the step takes."""
        shapes = Shapes(self.config, self.base, self.plain_adapter, torch.bfloat16)
        return shapes.memory(size, height=resolution, width=resolution)


def step_tflop(folder: Path, resolution: int) -> float:
    """10^12 FLOPs of one sample's forward and backward pass with a frozen base, counted on the meta device."""
    base, side = RandomBase(BaseOptions(name=str(folder)), folder), resolution
    adapter = build_adapter(AdapterOptions(), base.unet_config)
    return Shapes(Config(), base, adapter, torch.float32).flops(height=side, width=side).total / 1e12


def train_words(base: Path, data: Path, run: Path, resolution: int, steps: int, changes: dict[str, Any]) -> list[str]:
    """The words of `t2i-adapter train` behind the interpreter: in bf16, without measuring control.

    changes: option by path, beside these.
    """
    options = {
        "base.name": base,
        "data.location": data,
        "data.resolution": resolution,
        "data.num_workers": 0,
        "data.prepared_dir": run.with_name("prepared"),
        "train.max_steps": steps,
        "train.mixed_precision": "bf16",
        "train.seed": 0,
        "tracking.report_to": "none",
        "validation.budget": 0,
        "output_dir": run,
        **changes,
    }
    return [
        "-m",
        "t2i_adapter",
        "train",
        *(word for name, value in options.items() for word in (f"--{name}", str(value))),
    ]
