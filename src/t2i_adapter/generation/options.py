"""Options of drawing pictures. Importing this module loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

from t2i_adapter.errors import UserError


def check(flag: str, ok: bool, got: object, allowed: str) -> None:
    """UserError naming the flag, unless `ok`."""
    if not ok:
        raise UserError(f"--{flag} {got}: {allowed}")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How pictures are drawn, whichever prompt and condition they have."""

    steps: int = 30
    """Denoising steps (Euler ancestral)."""
    guidance: float = 5.0
    """Classifier-free guidance scale; 1 or less is none."""
    scale: float = 1.0
    """Weight of the adapter: 0 is the base alone, 1 as it was trained."""
    condition_factor: float = 1.0
    """Share of the steps, from the first one on, in which the adapter acts, 0 to 1."""
    batch_size: int | None = None
    """Pictures drawn together; None takes as many as 512 x 512 pixels hold. It does not change the pictures."""

    def __post_init__(self) -> None:
        check("steps", self.steps >= 1, self.steps, "1 or more")
        check("guidance", 0 <= self.guidance < inf, self.guidance, "allowed is 0 or more")
        check("scale", 0 <= self.scale < inf, self.scale, "allowed is 0 or more")
        factor = self.condition_factor
        check("condition_factor", 0 <= factor <= 1, factor, "allowed is a share from 0 to 1")
        check("batch_size", self.batch_size is None or self.batch_size >= 1, self.batch_size, "1 or more")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which models draw, and where they run."""

    adapter: str
    """The adapter: its folder, or a hub id."""
    base: str | None = None
    """The text-to-image model: hub id, diffusers folder, single .safetensors file, or `nano`. None takes the one the
    adapter was trained on, from its t2i_adapter.json."""
    base_config: str | None = None
    """What gives a single-file base its configs and tokenizers: diffusers folder or hub id. None takes the one of the
    adapter's training, or, where --base is given, what the file's keys tell."""
    base_revision: str | None = None
    """Hub revision of the base, where --base is given."""
    base_variant: str | None = None
    """Weight file variant of the base, for example fp16, where --base is given."""
    base_vae: str | None = None
    """Another VAE for the base: hub id or folder. None takes the one of the adapter's training."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda, cuda:1, mps, ..."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the base; auto is fp16 on a GPU and fp32 elsewhere. The VAE always runs in fp32."""
    offload: Literal["none", "model", "sequential"] = "none"
    """Keep on the GPU only the model (or, slower and smaller still, the layer) that is at work."""
    xformers: bool = False
    """xFormers' attention instead of torch's scaled dot product attention."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ModelOptions, SamplingOptions):
    """Draw pictures from prompts and condition pictures, or photos to make those of."""

    prompt: tuple[str, ...]
    """What to draw: one prompt, or as many as there are images."""
    image: tuple[str, ...] = ()
    """Condition picture files: one, or as many as there are prompts. These or --photo."""
    photo: tuple[str, ...] = ()
    """Files of photos: their conditions are made as in the adapter's training, as its t2i_adapter.json tells."""
    condition: str | None = None
    """What makes the conditions of photos: a kind of `t2i-adapter conditions`, options after commas. None takes the one
    of the adapter's training."""
    negative: str | None = None
    """What not to draw."""
    num: int = 1
    """Pictures for each prompt; their seeds are counted up from --seed."""
    seed: int = 0
    """Where the noise starts; a picture depends on its own seed alone, not on those that are drawn with it."""
    width: int | None = None
    """Width in pixels. None: as the adapter was trained, or else the condition picture's own."""
    height: int | None = None
    """Height in pixels. None: as the adapter was trained, or else the condition picture's own."""
    out: str = "pictures"
    """Folder for the pictures and, beside each, the JSON that tells how to draw it again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check("num", self.num >= 1, self.num, "1 or more")
        check("seed", 0 <= self.seed < 2**63, self.seed, "allowed is 0 to 2^63 - 1")
        for name, side in (("width", self.width), ("height", self.height)):
            check(name, side is None or side >= 1, side, "1 or more")
        if bool(self.image) == bool(self.photo):
            given = "--image and --photo are both" if self.image else "neither --image nor --photo is"
            raise UserError(f"{given} given: give one of them")
        if self.condition and not self.photo:
            raise UserError(f"--condition {self.condition}: makes conditions of --photo FILE, which is not given")
        prompts, images = len(self.prompt), len(self.files)
        if not prompts or not images or (prompts != images and 1 not in (prompts, images)):
            raise UserError(
                f"--prompt has {prompts} entries and --{'photo' if self.photo else 'image'} {images}: "
                "give as many of one as of the other, or a single one of either."
            )

    @property
    def files(self) -> tuple[str, ...]:
        """The images or photos, whichever are given."""
        return self.image or self.photo

    def pairs(self) -> list[tuple[str, str]]:
        """(prompt, file) of each picture row, the single one of either repeated."""
        count = max(len(self.prompt), len(self.files))
        prompts = self.prompt * count if len(self.prompt) == 1 else self.prompt
        files = self.files * count if len(self.files) == 1 else self.files
        return list(zip(prompts, files, strict=True))
