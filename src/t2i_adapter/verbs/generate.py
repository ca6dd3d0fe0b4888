"""The verb `generate`: pictures from prompts and condition pictures, each with a JSON file to generate it again."""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_adapter.errors import UserError, flag, require
from t2i_adapter.files import output_folder, user_path
from t2i_adapter.generation.options import ModelOptions, SamplingOptions
from t2i_adapter.imports import preload

if TYPE_CHECKING:
    from PIL import Image

    from t2i_adapter.annotators.registry import Annotator
    from t2i_adapter.generation.pipeline import Models

LIBRARIES = ("sdxl-t2i-adapter", "torch", "diffusers", "transformers")


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ModelOptions, SamplingOptions):
    """Generate pictures from prompts and condition pictures, or from photos of which conditions are made."""

    prompt: tuple[str, ...]
    """What the picture shows: one prompt, or as many as there are images."""
    image: tuple[str, ...] = ()
    """Condition picture files: one, or as many as there are prompts. Either these or --photo."""
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
        if bool(self.image) == bool(self.photo):
            image, photo = flag("image"), flag("photo")
            given = f"{image} and {photo} are both set" if self.image else f"neither {image} nor {photo} is set"
            raise UserError(f"{given}; set one of them")
        if self.condition and not self.photo:
            raise UserError(f"{self.condition}: only {flag('photo')} needs it, which is not set", option="condition")
        prompts, files = len(self.prompt), len(self.files)
        if not prompts or not files or (prompts != files and 1 not in (prompts, files)):
            raise UserError(
                f"{flag('prompt')} has {prompts} entries and {flag('photo' if self.photo else 'image')} {files}: "
                "set as many of one as of the other, or a single one of either."
            )

    @property
    def files(self) -> tuple[str, ...]:
        """The images or the photos, whichever are set."""
        return self.image or self.photo

    def pairs(self) -> list[tuple[str, str]]:
        """Returns (prompt, file) of each pair; a single prompt or file is repeated."""
        count = max(len(self.prompt), len(self.files))
        prompts = self.prompt * count if len(self.prompt) == 1 else self.prompt
        files = self.files * count if len(self.files) == 1 else self.files
        return list(zip(prompts, files, strict=True))


def run(options: GenerateOptions) -> None:
    """Generates `num` pictures for each pair of prompt and file, and writes them to `out`."""
    preload("t2i_adapter.generation.pipeline")
    from t2i_adapter.generation.condition import (
        find_annotator,
        fit_condition,
        make_condition,
        read_condition,
        read_photo,
    )
    from t2i_adapter.generation.generate import generate
    from t2i_adapter.generation.pipeline import open_models

    pairs = options.pairs()
    read = read_photo if options.photo else read_condition
    opened = {path: read(path) for _, path in pairs}
    models = open_models(options)
    size = _picture_size(options, models, opened[pairs[0][1]])
    annotator = find_annotator(options.condition, models.metadata, options.adapter) if options.photo else None
    conditions = {
        path: make_condition(picture, size, models.channels, annotator)
        if annotator
        else fit_condition(picture, size, models.channels)
        for path, picture in opened.items()
    }
    jobs = [(prompt, path, options.seed + i) for prompt, path in pairs for i in range(options.num)]
    out = output_folder(options.out)
    pictures = generate(
        models.pipeline(),
        [prompt for prompt, _, _ in jobs],
        [conditions[path] for _, path, _ in jobs],
        [seed for _, _, seed in jobs],
        size=size,
        sampling=options,
        negative=options.negative,
    )
    for picture, (prompt, path, seed) in zip(pictures, jobs, strict=True):
        record = _picture_record(options, models, size, prompt, path, seed, annotator)
        print(_save(out, picture, record, conditions[path] if annotator else None))


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
    models: Models,
    size: tuple[int, int],
    prompt: str,
    file: str,
    seed: int,
    annotator: Annotator | None,
) -> dict[str, Any]:
    """Returns everything that a picture depends on, and the command that generates it again. Plain JSON types."""
    base = models.base.options
    single = replace(
        options,
        prompt=(prompt,),
        **{"photo" if options.photo else "image": (file,)},
        condition=annotator.spec if annotator else None,
        seed=seed,
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
    )
    return {
        "command": _command(single),
        "options": asdict(single),
        "adapter_sha256": models.digest,
        "image_sha256": hashlib.sha256(user_path(file).read_bytes()).hexdigest(),
        "versions": {name: version(name) for name in LIBRARIES},
    }


def _command(options: GenerateOptions) -> str:
    """Returns the command line that sets these options; options at their default are omitted."""
    words = ["t2i-adapter", "generate"]
    for name, field in GenerateOptions.__dataclass_fields__.items():
        value = getattr(options, name)
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{name}")
        elif isinstance(value, tuple):
            words += [f"--{name}", *value]
        else:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def _save(out: Path, picture: Image.Image, record: dict[str, Any], condition: Image.Image | None) -> Path:
    """Writes the picture, its record and, if one was made of a photo, its condition under the next free number;
    returns the picture's path."""
    taken = [int(path.stem) for path in out.glob("*.png") if path.stem.isdigit()]
    path = out / f"{max(taken, default=-1) + 1:05d}.png"
    picture.save(path)
    if condition:
        condition.save(path.with_name(f"{path.stem}_condition.png"))
    text = json.dumps(record, indent=2, ensure_ascii=False)
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    return path
