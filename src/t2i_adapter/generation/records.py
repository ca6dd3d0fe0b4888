"""What `generate` writes: pictures with their parameters, and a JSON file beside each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from t2i_adapter.annotators.registry import Annotator
from t2i_adapter.files import user_path
from t2i_adapter.flags import command_line
from t2i_adapter.generation.options import SamplingOptions
from t2i_adapter.generation.pipeline import Models
from t2i_adapter.generation.png_text import parameters, png_info
from t2i_adapter.generation.prompts import NO_PICTURE
from t2i_adapter.generation.request import GenerateOptions, Job
from t2i_adapter.generation.schedulers import sampler_title
from t2i_adapter.generation.several import EACH
from t2i_adapter.models.lora_file import Lora
from t2i_adapter.types import CHUNK_TOKENS

LIBRARIES = ("sdxl-t2i-adapter", "torch", "diffusers", "transformers")


@dataclass(frozen=True)
class Settled:
    """Options whose every value is known.

    Attributes:
        sampling, models, annotators: one for each adapter; an annotator only if it is used.
        size: (height, width) in pixels.
        strength: of the start from a picture, if there is one.
        scheduler: its short name.
    """

    options: GenerateOptions
    sampling: Sequence[SamplingOptions]
    models: Sequence[Models]
    annotators: Sequence[Annotator | None]
    size: tuple[int, int]
    strength: float | None
    scheduler: str

    def single(self, job: Job) -> GenerateOptions:
        """Returns the options that generate one picture, and nothing else."""
        model, first = self.models[0], self.sampling[0]
        base, photos = model.base.options, [picture.is_photo for picture in job.pictures]
        kinds = [annotator.spec if annotator else NO_PICTURE for annotator in self.annotators]

        def files(is_photo: bool) -> tuple[str, ...]:
            names = tuple(picture.file if picture.is_photo is is_photo else NO_PICTURE for picture in job.pictures)
            return names if is_photo in photos else ()

        return replace(
            self.options,
            prompt=(job.prompt,),
            prompt_file=None,
            image=files(False),
            photo=files(True),
            condition=tuple(kinds) if any(photos) else (),
            init_image=_one(job.init_image),
            mask=_one(job.mask),
            controlnet_image=_one(job.controlnet_image),
            strength=self.strength,
            scheduler=self.scheduler,
            seed=job.seed,
            num=1,
            grid=None,
            height=self.size[0],
            width=self.size[1],
            base=base.name,
            base_config=base.config,
            base_revision=base.revision,
            base_variant=base.variant,
            base_vae=base.vae,
            device=model.device,
            precision=model.precision,
            max_tokens=model.max_tokens,
            steps=first.steps,
            guidance=first.guidance,
            control_passes=first.control_passes,
            **{name: tuple(getattr(one, name) for one in self.sampling) for name in EACH},
        )


def _one(value: str | None) -> tuple[str, ...]:
    return () if value is None else (value,)


def picture_record(settled: Settled, job: Job) -> dict[str, Any]:
    """Returns everything that a picture depends on, and the command that generates it again. Plain JSON types."""
    single = settled.single(job)
    others = {name: getattr(job, name) for name in ("init_image", "mask", "controlnet_image")}
    loras = [Lora.parse(text).source for text in single.lora]
    return {
        "command": command_line("generate", single),
        "options": asdict(single),
        "adapter_sha256": [model.digest for model in settled.models],
        "image_sha256": [_digest(picture.file) for picture in job.pictures],
        **{f"{name}_sha256": _digest(file) for name, file in others.items() if file},
        **({"lora_sha256": [_digest(file) if user_path(file).is_file() else None for file in loras]} if loras else {}),
        "versions": {name: version(name) for name in LIBRARIES},
    }


def _digest(file: str) -> str:
    return hashlib.sha256(user_path(file).read_bytes()).hexdigest()


def png_parameters(settled: Settled, job: Job) -> str:
    """Returns the text that the picture's PNG file carries. Of paths it holds the last part only."""
    options, first = settled.options, settled.sampling[0]
    max_tokens = settled.models[0].max_tokens
    fields: dict[str, Any] = {
        "Steps": first.steps,
        "Sampler": sampler_title(settled.scheduler),
        "CFG scale": first.guidance,
        "Seed": job.seed,
        "Size": f"{settled.size[1]}x{settled.size[0]}",
        "Model": Path(settled.models[0].base.name).name.removesuffix(".safetensors"),
        "RNG": "CPU",
    }
    if job.init_image:
        fields |= {"Denoising strength": settled.strength, "Init picture": Path(job.init_image).name}
    if job.mask:
        fields |= {"Mask blur": options.mask_blur, "Mask": Path(job.mask).name}
    for number in range(len(settled.models)):
        fields |= _adapter_fields(settled, job, number)
    if options.controlnet and job.controlnet_image:
        model, picture = Path(options.controlnet).name, Path(job.controlnet_image).name
        fields["ControlNet 0"] = f"Module: none, Model: {model}, Weight: {options.controlnet_scale}, Picture: {picture}"
    if options.quantize != "none":
        fields["Quantized"] = options.quantize
    if max_tokens > CHUNK_TOKENS:
        fields["Max tokens"] = max_tokens
    fields["Version"] = f"sdxl-t2i-adapter {version('sdxl-t2i-adapter')}"
    loras = [Lora.parse(text) for text in options.lora]
    prompt = " ".join([job.prompt, *(f"<lora:{lora.name}:{lora.weight:g}>" for lora in loras)])
    return parameters(prompt, options.negative, fields)


def _adapter_fields(settled: Settled, job: Job, number: int) -> dict[str, Any]:
    """Returns the fields of one of the adapters; options that most pictures leave at their plain values only if they
    differ from them."""
    sampling, plain, picture = settled.sampling[number], SamplingOptions(), job.pictures[number]
    title = f"T2I-Adapter {number + 1}" if number else "T2I-Adapter"
    rare = {"start": "condition_start", "guidance": "control_guidance", "schedule": "scale_schedule"}
    if not number:
        rare["passes"] = "control_passes"
    values = {shown: (getattr(sampling, name), getattr(plain, name)) for shown, name in rare.items()}
    annotator = settled.annotators[number]
    return {
        title: user_path(settled.options.adapter[number]).resolve().name,
        f"{title} hash": settled.models[number].digest[:10],
        f"{title} scale": sampling.scale,
        f"{title} end": sampling.condition_factor,
        **{f"{title} {shown}": value for shown, (value, usual) in values.items() if value != usual},
        f"{title} picture": Path(picture.file).name,
        **({f"{title} condition": annotator.spec} if annotator and picture.is_photo else {}),
    }


def save_picture(
    out: Path, picture: Image.Image, record: dict[str, Any], text: str, made: Sequence[Image.Image | None]
) -> Path:
    """Writes the picture with its parameters, and its record, under the next free number; returns the picture's path.

    made: each adapter's condition, if it was made of a photo; it is written, too.
    """
    taken = [int(path.stem) for path in out.glob("*.png") if path.stem.isdigit()]
    path = out / f"{max(taken, default=-1) + 1:05d}.png"
    picture.save(path, pnginfo=png_info(text))
    for number, condition in enumerate(made, start=1):
        if condition:
            condition.save(path.with_name(f"{path.stem}_condition{number if number > 1 else ''}.png"))
    content = json.dumps(record, indent=2, ensure_ascii=False)
    path.with_suffix(".json").write_text(content + "\n", encoding="utf-8")
    return path
