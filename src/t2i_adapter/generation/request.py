"""What `generate` is asked for: its options, and the pictures that they name, one by one.

Importing this module loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import Any, Literal

from t2i_adapter.config.read import allowed, option_types, read_value, read_values
from t2i_adapter.errors import UserError, flag, require
from t2i_adapter.generation.prompts import GivenFiles, Picture, Request, is_unicode, match_files, read_prompts
from t2i_adapter.generation.schedulers import find_sampler
from t2i_adapter.generation.several import EACH, SeveralAdapters
from t2i_adapter.models.lora_file import Lora

SEEDS = "seeds"
"""The `grid` whose columns are seeds."""
SWEPT = (
    "scale",
    "condition_start",
    "condition_factor",
    "control_guidance",
    "guidance",
    "steps",
    "strength",
    "scheduler",
)
"""Options whose values may be the columns of a grid."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(SeveralAdapters):
    """Generate pictures from prompts and condition pictures, or from photos of which conditions are made."""

    prompt: tuple[str, ...] = ()
    """What the picture shows: one prompt, or as many as there are images. Either this or --prompt_file."""
    prompt_file: str | None = None
    """File with one prompt a line; or a .jsonl or .csv file with prompt, image or photo, and seed."""
    image: tuple[str, ...] = ()
    """Condition picture files: one, or as many as there are prompts; with several adapters one for each adapter, `none`
    for one that has a photo. Either these or --photo, or --prompt_file names them."""
    photo: tuple[str, ...] = ()
    """Photo files: their conditions are made as in the adapter's training, which its t2i_adapter.json describes."""
    condition: tuple[str, ...] = ()
    """Condition kind for photos: one of `t2i-adapter conditions`, options after commas; one for each adapter, or one
    for all. Empty or `none` takes the one of the adapter's training."""
    init_image: tuple[str, ...] = ()
    """Picture files to begin from (img2img): one, or as many as there are prompts."""
    strength: float | None = None
    """Share of the steps that are made from --init_image: 0 is the picture itself, 1 begins from noise alone. None is
    0.6, or 1 with --mask."""
    mask: tuple[str, ...] = ()
    """Mask files of --init_image (inpainting): what is white is generated anew, what is black stays."""
    mask_blur: int = 4
    """Pixels over which the border of a mask becomes soft, on its white side."""
    negative: str | None = None
    """Negative prompt: what the picture should not show."""
    lora: tuple[str, ...] = ()
    """LoRAs to add to the base: FILE or FILE:WEIGHT, .safetensors; or hub ids."""
    scheduler: str | None = None
    """Scheduler: a short name such as euler, dpmpp_2m_karras, unipc or lcm, or a class of diffusers. None takes what a
    base for few steps is made for, else euler_a."""
    controlnet: str | None = None
    """A ControlNet that acts beside the adapter: its folder, or a hub id."""
    controlnet_image: tuple[str, ...] = ()
    """Condition picture files for the ControlNet: one, or as many as there are prompts."""
    controlnet_scale: float = 1.0
    """Weight of the ControlNet's residuals."""
    quantize: Literal["none", "float8", "int8", "nf4"] = "none"
    """Store the base's large matrices in 8 or 4 bits: less memory, slower, and slightly other pictures."""
    num: int = 1
    """Pictures for each prompt; their seeds count up from --seed."""
    seed: int = 0
    """Seed of the first picture's noise; a picture depends on its own seed only, not on the others of its batch."""
    width: int | None = None
    """Width in pixels. None takes the training resolution or, if that is unknown, the condition picture's width."""
    height: int | None = None
    """Height in pixels. None takes the training resolution or, if that is unknown, the condition picture's height."""
    grid: str | None = None
    """Write one sheet of all pictures, too. Its columns are `seeds`, or values of an option, for example
    scale=0.5,0.8,1; a row is a prompt."""
    out: str = "pictures"
    """Folder for the pictures and, beside each, a JSON file with the command that generates it again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require("num", self.num >= 1, self.num, "1 or more")
        require("seed", 0 <= self.seed < 2**63, self.seed, "allowed is 0 to 2^63 - 1")
        for name, side in (("width", self.width), ("height", self.height)):
            require(name, side is None or side >= 1, side, "1 or more")
        strength = 0 if self.strength is None else self.strength
        require("strength", 0 <= strength <= 1, self.strength, "allowed is a share from 0 to 1")
        require("mask_blur", 0 <= self.mask_blur <= 512, self.mask_blur, "allowed is 0 to 512 pixels")
        scale = self.controlnet_scale
        require("controlnet_scale", 0 <= scale < inf, scale, "allowed is 0 or more")
        self.check_count("condition", self.condition)
        self._check_texts()
        if self.scheduler is not None:
            find_sampler(self.scheduler)
        for text in self.lora:
            Lora.parse(text)
        if self.quantize != "none" and self.offload == "sequential":
            raise UserError(
                f"{self.quantize}: cannot be moved layer by layer; use {flag('offload')} model or none.",
                option="quantize",
            )
        if bool(self.controlnet_image) and not self.controlnet:
            raise UserError("is needed for its pictures: a folder or hub id.", option="controlnet")
        self.columns()
        if self.prompt:
            make_jobs(self)

    def _check_texts(self) -> None:
        """Raises UserError unless there are prompts and pictures, in UTF-8."""
        _check_one("prompt", "prompt_file", bool(self.prompt), bool(self.prompt_file))
        if len(self.adapter) == 1 and (self.prompt or (self.image and self.photo)):
            _check_one("image", "photo", bool(self.image), bool(self.photo))
        for name, texts in (("prompt", self.prompt), ("negative", (self.negative or "",))):
            for text in texts:
                require(name, is_unicode(text), repr(text), "is not UTF-8 text; set the terminal to UTF-8")

    def columns(self) -> list[tuple[str, GenerateOptions]]:
        """Returns a heading and the options for each swept value of the grid; just these options without such values.

        Raises UserError.
        """
        if self.grid in (None, SEEDS):
            return [("", self)]
        name, equals, values = str(self.grid).partition("=")
        if name not in SWEPT or not equals or not values:
            raise UserError(
                f"{self.grid}: allowed is {SEEDS}, or values of one of {', '.join(SWEPT)}, such as scale=0.5,0.8,1.",
                option="grid",
            )
        kind = option_types(GenerateOptions)[name]
        found = []
        for text in values.split(","):
            try:
                value: Any = read_values([text], kind) if name in EACH else read_value(text, kind)
            except ValueError:
                raise UserError(
                    f"{self.grid}: {text!r} is no value of {name}; {allowed(kind, text)}.", option="grid"
                ) from None
            found.append((f"{name} {text}", replace(self, **{name: value, "grid": None})))
        return found


def _check_one(first: str, second: str, has_first: bool, has_second: bool) -> None:
    """Raises UserError unless one of two options is set."""
    if has_first == has_second:
        names = flag(first), flag(second)
        given = f"{names[0]} and {names[1]} are both set" if has_first else f"neither {names[0]} nor {names[1]} is set"
        raise UserError(f"{given}; set one of them")


@dataclass(frozen=True)
class Job:
    """One picture to generate.

    Attributes:
        pictures: what each adapter's condition is made of.
        init_image, mask, controlnet_image: files, if there are any.
        row: number of its prompt, from 0.
    """

    prompt: str
    pictures: tuple[Picture, ...]
    seed: int
    init_image: str | None = None
    mask: str | None = None
    controlnet_image: str | None = None
    row: int = 0


def make_jobs(options: GenerateOptions) -> list[Job]:
    """Returns the pictures to generate, in order: `num` for each prompt. Raises UserError."""
    count = len(options.adapter)
    requests = read_prompts(options.prompt_file, count) if options.prompt_file else [Request(p) for p in options.prompt]
    others = {name: getattr(options, name) for name in ("image", "photo", "init_image", "mask", "controlnet_image")}
    matched = match_files(requests, GivenFiles(**others, adapters=count))
    jobs = [
        Job(
            request.prompt,
            tuple(picture for picture in request.pictures if picture),
            (options.seed if request.seed is None else request.seed) + index,
            request.init_image,
            request.mask,
            request.controlnet_image,
            row,
        )
        for row, request in enumerate(matched)
        for index in range(options.num)
    ]
    _check_jobs(options, jobs)
    return jobs


def _check_jobs(options: GenerateOptions, jobs: list[Job]) -> None:
    """Raises UserError unless options that need pictures have them."""
    if options.condition and not any(picture.is_photo for job in jobs for picture in job.pictures):
        raise UserError(
            f"{' '.join(options.condition)}: only {flag('photo')} needs it, which is not set", option="condition"
        )
    for name in ("init_image", "controlnet_image"):
        has = {getattr(job, name) is not None for job in jobs}
        if len(has) > 1:
            raise UserError("some prompts have one and some have none; give all of them one, or none.", option=name)
    for job in jobs:
        if job.mask and not job.init_image:
            raise UserError(f"{job.mask}: needs {flag('init_image')}, the picture that it masks.", option="mask")
        if options.strength is not None and not job.init_image:
            raise UserError(
                f"{options.strength:g}: needs {flag('init_image')}, the picture to begin from.", option="strength"
            )
        if options.controlnet and not job.controlnet_image:
            raise UserError(f"is needed for {flag('controlnet')} {options.controlnet}.", option="controlnet_image")
