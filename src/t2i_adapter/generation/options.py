"""Options of generating pictures, which `generate` and `evaluate` share. Importing this module loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

from t2i_adapter.errors import require
from t2i_adapter.types import MaxTokens


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How pictures are sampled, for every prompt and condition."""

    steps: int = 30
    """Denoising steps (Euler ancestral)."""
    guidance: float = 5.0
    """Classifier-free guidance scale; 1 or less turns guidance off."""
    scale: float = 1.0
    """Weight of the adapter's features: 0 is the base alone, 1 is as in training."""
    condition_factor: float = 1.0
    """Share of the steps, counted from the first, in which the adapter acts; 0 to 1."""
    batch_size: int | None = None
    """Pictures generated at a time; None takes as many as 512 x 512 pixels hold. It does not change the pictures."""

    def __post_init__(self) -> None:
        require("steps", self.steps >= 1, self.steps, "1 or more")
        require("guidance", 0 <= self.guidance < inf, self.guidance, "allowed is 0 or more")
        require("scale", 0 <= self.scale < inf, self.scale, "allowed is 0 or more")
        factor = self.condition_factor
        require("condition_factor", 0 <= factor <= 1, factor, "allowed is a share from 0 to 1")
        require("batch_size", self.batch_size is None or self.batch_size >= 1, self.batch_size, "1 or more")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The models that generate pictures, and where they run."""

    adapter: str
    """The adapter: its folder, or a hub id."""
    base: str | None = None
    """The text-to-image model: hub id, diffusers folder, single .safetensors file, or `nano`. None takes the
    one that the adapter was trained on, from its t2i_adapter.json."""
    base_config: str | None = None
    """Diffusers folder or hub id with the configs and tokenizers of a single-file base. None takes the one of the
    adapter's training or, if --base is given, guesses it from the file's keys."""
    base_revision: str | None = None
    """Hub revision of the base, if --base is given."""
    base_variant: str | None = None
    """Variant of the base's weight files, for example fp16, if --base is given."""
    base_vae: str | None = None
    """Another VAE for the base: hub id or folder. None takes the one of the adapter's training."""
    max_tokens: MaxTokens | None = None
    """Tokens of a prompt that are read; the rest is cut off. None takes what the adapter's training read or, if that is
    unknown, 75."""
    device: str = "auto"
    """Device to run on: auto, cpu, cuda, cuda:1, mps, ..."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the base; auto is fp16 on a GPU and fp32 elsewhere. The VAE always runs in fp32."""
    offload: Literal["none", "model", "sequential"] = "none"
    """Keep only the running model on the GPU; `sequential` keeps only the running layer: less memory, but slower."""
    xformers: bool = False
    """xFormers' attention instead of torch's scaled dot product attention."""
