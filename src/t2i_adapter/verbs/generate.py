"""The verb `generate`: pictures from prompts and condition pictures, each with a JSON file to generate it again.

Importing this module loads no torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_adapter.errors import UserError, flag, require
from t2i_adapter.files import output_folder, show_path, user_path
from t2i_adapter.flags import command_line
from t2i_adapter.generation.options import POINT, ModelOptions, RequestedSampling, SamplingOptions
from t2i_adapter.generation.prompts import Request, is_unicode, match_files, read_prompts
from t2i_adapter.imports import preload
from t2i_adapter.types import CHUNK_TOKENS

if TYPE_CHECKING:
    from PIL import Image

    from t2i_adapter.annotators.registry import Annotator
    from t2i_adapter.generation.pipeline import Models

LIBRARIES = ("sdxl-t2i-adapter", "torch", "diffusers", "transformers")


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ModelOptions, RequestedSampling):
    """Generate pictures from prompts and condition pictures, or from photos of which conditions are made."""

    prompt: tuple[str, ...] = ()
    """What the picture shows: one prompt, or as many as there are images. Either this or --prompt_file."""
    prompt_file: str | None = None
    """File with one prompt a line; or a .jsonl or .csv file with prompt, image or photo, and seed."""
    image: tuple[str, ...] = ()
    """Condition picture files: one, or as many as there are prompts. Either these or --photo, or --prompt_file names
    them."""
    photo: tuple[str, ...] = ()
    """Photo files: their conditions are made as in the adapter's training, which its t2i_adapter.json describes."""
    condition: str | None = None
    """Condition kind for photos: one of `t2i-adapter conditions`, options after commas. None takes the one of the
    adapter's training."""
    negative: str | None = None
    """Negative prompt: what the picture should not show."""
    num: int = 1
    """Pictures for each prompt; their seeds count up from --seed."""
    seed: int = 0
    """Seed of the first picture's noise; a picture depends on its own seed only, not on the others of its batch."""
    width: int | None = None
    """Width in pixels. None takes the training resolution or, if that is unknown, the condition picture's width."""
    height: int | None = None
    """Height in pixels. None takes the training resolution or, if that is unknown, the condition picture's height."""
    out: str = "pictures"
    """Folder for the pictures and, beside each, a JSON file with the command that generates it again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require("num", self.num >= 1, self.num, "1 or more")
        require("seed", 0 <= self.seed < 2**63, self.seed, "allowed is 0 to 2^63 - 1")
        for name, side in (("width", self.width), ("height", self.height)):
            require(name, side is None or side >= 1, side, "1 or more")
        _check_one("prompt", "prompt_file", bool(self.prompt), bool(self.prompt_file))
        if self.prompt or (self.image and self.photo):
            _check_one("image", "photo", bool(self.image), bool(self.photo))
        for name, texts in (("prompt", self.prompt), ("negative", (self.negative or "",))):
            for text in texts:
                require(name, is_unicode(text), repr(text), "is not UTF-8 text; set the terminal to UTF-8")
        if self.prompt:
            make_jobs(self)


def _check_one(first: str, second: str, has_first: bool, has_second: bool) -> None:
    """Raises UserError unless one of two options is set."""
    if has_first == has_second:
        names = flag(first), flag(second)
        given = f"{names[0]} and {names[1]} are both set" if has_first else f"neither {names[0]} nor {names[1]} is set"
        raise UserError(f"{given}; set one of them")


def run(options: GenerateOptions) -> None:
    """Generates `num` pictures for each prompt, and writes each to `out` when its batch is finished."""
    preload("t2i_adapter.generation.pipeline")
    from tqdm import tqdm

    from t2i_adapter.generation.condition import (
        find_annotator,
        fit_condition,
        make_condition,
        read_condition,
        read_photo,
    )
    from t2i_adapter.generation.generate import encode_prompts, generate_batches
    from t2i_adapter.generation.pipeline import open_models

    def read(job: Job) -> Image.Image:
        return read_photo(job.file) if job.is_photo else read_condition(job.file)

    jobs = make_jobs(options)
    first = read(jobs[0])
    models = open_models(options)
    size = _picture_size(options, models, first)
    has_photos = any(job.is_photo for job in jobs)
    annotator = find_annotator(options.condition, models.metadata, options.adapter) if has_photos else None
    conditions: dict[tuple[str, bool], Image.Image] = {}
    for job in jobs:
        if job.source not in conditions:
            picture = read(job)
            conditions[job.source] = (
                make_condition(picture, size, models.channels, annotator)
                if job.is_photo and annotator
                else fit_condition(picture, size, models.channels)
            )
    out = output_folder(options.out)
    sampling = options.settle(models.recommended)
    for line in filter(None, (models.describe_text(), options.describe_point(models.recommended))):
        print(line, flush=True)
    pipeline = models.pipeline()
    texts = encode_prompts(
        pipeline,
        [job.prompt for job in jobs],
        guidance=sampling.guidance,
        negative=options.negative,
        max_tokens=models.max_tokens,
    )
    batches = generate_batches(
        pipeline,
        texts,
        [conditions[job.source] for job in jobs],
        [job.seed for job in jobs],
        size=size,
        sampling=sampling,
        progress="generating",
    )
    for job, picture in zip(jobs, (picture for batch in batches for picture in batch), strict=True):
        record = _picture_record(options, sampling, models, size, job, annotator)
        text = _parameters(options, sampling, models, size, job, annotator)
        path = _save(out, picture, record, text, conditions[job.source] if job.is_photo else None)
        with tqdm.external_write_mode():
            print(show_path(path), flush=True)


@dataclass(frozen=True)
class Job:
    """One picture to generate. file: its condition picture or, if `is_photo`, its photo."""

    prompt: str
    file: str
    is_photo: bool
    seed: int

    @property
    def source(self) -> tuple[str, bool]:
        """What the condition is made of."""
        return self.file, self.is_photo


def make_jobs(options: GenerateOptions) -> list[Job]:
    """Returns the pictures to generate, in order: `num` for each prompt. Raises UserError."""
    requests = read_prompts(options.prompt_file) if options.prompt_file else list(map(Request, options.prompt))
    matched = match_files(requests, options.image, options.photo)
    if options.condition and not any(request.photo for request in matched):
        raise UserError(f"{options.condition}: only {flag('photo')} needs it, which is not set", option="condition")
    return [
        Job(
            request.prompt,
            request.photo or request.image or "",
            request.photo is not None,
            (options.seed if request.seed is None else request.seed) + index,
        )
        for request in matched
        for index in range(options.num)
    ]


def _picture_size(options: GenerateOptions, models: Models, condition: Image.Image) -> tuple[int, int]:
    """Returns (height, width) in pixels: from the options, else the training resolution, else the condition's size."""
    from t2i_adapter.models.adapter import check_resolution

    default = (models.resolution,) * 2 if models.resolution else (condition.height, condition.width)
    height, width = options.height or default[0], options.width or default[1]
    check_resolution(height, height, models.adapter_config, "height")
    check_resolution(width, width, models.adapter_config, "width")
    return height, width


def _picture_record(
    options: GenerateOptions,
    sampling: SamplingOptions,
    models: Models,
    size: tuple[int, int],
    job: Job,
    annotator: Annotator | None,
) -> dict[str, Any]:
    """Returns everything that a picture depends on, and the command that generates it again. Plain JSON types."""
    base = models.base.options
    single = replace(
        options,
        prompt=(job.prompt,),
        prompt_file=None,
        image=() if job.is_photo else (job.file,),
        photo=(job.file,) if job.is_photo else (),
        condition=annotator.spec if annotator and job.is_photo else None,
        seed=job.seed,
        num=1,
        height=size[0],
        width=size[1],
        base=base.name,
        base_config=base.config,
        base_revision=base.revision,
        base_variant=base.variant,
        base_vae=base.vae,
        device=models.device,
        precision=models.precision,
        max_tokens=models.max_tokens,
        **{name: getattr(sampling, name) for name in POINT},
    )
    return {
        "command": command_line("generate", single),
        "options": asdict(single),
        "adapter_sha256": models.digest,
        "image_sha256": hashlib.sha256(user_path(job.file).read_bytes()).hexdigest(),
        "versions": {name: version(name) for name in LIBRARIES},
    }


def _parameters(
    options: GenerateOptions,
    sampling: SamplingOptions,
    models: Models,
    size: tuple[int, int],
    job: Job,
    annotator: Annotator | None,
) -> str:
    """Returns the text that the picture's PNG file carries. Of paths it holds the last part only."""
    from t2i_adapter.generation.png_text import parameters

    fields = {
        "Steps": sampling.steps,
        "Sampler": "Euler a",
        "CFG scale": sampling.guidance,
        "Seed": job.seed,
        "Size": f"{size[1]}x{size[0]}",
        "Model": Path(models.base.name).name.removesuffix(".safetensors"),
        "RNG": "CPU",
        "T2I-Adapter": user_path(options.adapter).resolve().name,
        "T2I-Adapter hash": models.digest[:10],
        "T2I-Adapter scale": sampling.scale,
        "T2I-Adapter end": sampling.condition_factor,
        **_steering(sampling),
        "T2I-Adapter picture": Path(job.file).name,
        **({"T2I-Adapter condition": annotator.spec} if annotator and job.is_photo else {}),
        **({"Max tokens": models.max_tokens} if models.max_tokens > CHUNK_TOKENS else {}),
        "Version": f"sdxl-t2i-adapter {version('sdxl-t2i-adapter')}",
    }
    return parameters(job.prompt, options.negative, fields)


def _steering(sampling: SamplingOptions) -> dict[str, Any]:
    """Returns the fields of options that most pictures leave at their plain values, if these differ from them."""
    plain = SamplingOptions()
    names = {
        "T2I-Adapter start": "condition_start",
        "T2I-Adapter guidance": "control_guidance",
        "T2I-Adapter passes": "control_passes",
        "T2I-Adapter schedule": "scale_schedule",
    }
    values = {shown: (getattr(sampling, name), getattr(plain, name)) for shown, name in names.items()}
    return {shown: value for shown, (value, usual) in values.items() if value != usual}


def _save(
    out: Path, picture: Image.Image, record: dict[str, Any], parameters: str, condition: Image.Image | None
) -> Path:
    """Writes the picture with its parameters, its record and, if one was made of a photo, its condition under the next
    free number; returns the picture's path."""
    from t2i_adapter.generation.png_text import png_info

    taken = [int(path.stem) for path in out.glob("*.png") if path.stem.isdigit()]
    path = out / f"{max(taken, default=-1) + 1:05d}.png"
    picture.save(path, pnginfo=png_info(parameters))
    if condition:
        condition.save(path.with_name(f"{path.stem}_condition.png"))
    text = json.dumps(record, indent=2, ensure_ascii=False)
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    return path
