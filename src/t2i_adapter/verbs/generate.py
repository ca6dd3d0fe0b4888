"""The verb `generate`: pictures, and beside each a JSON from which it can be drawn again."""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from t2i_adapter.annotators.registry import Annotator
from t2i_adapter.files import output_folder, user_path
from t2i_adapter.generation.condition import find_annotator, fit_condition, make_condition, read_condition
from t2i_adapter.generation.generate import generate
from t2i_adapter.generation.options import GenerateOptions
from t2i_adapter.generation.pipeline import Models, open_models
from t2i_adapter.models.adapter import check_resolution

LIBRARIES = ("sdxl-t2i-adapter", "torch", "diffusers", "transformers")


def run(options: GenerateOptions) -> None:
    """Draws `num` pictures for each pair of prompt and file and writes them to `out`."""
    pairs = options.pairs()
    read = {path: read_condition(path, "--photo" if options.photo else "--image") for _, path in pairs}
    models = open_models(options)
    size = picture_size(options, models, read[pairs[0][1]])
    annotator = find_annotator(options.condition, models.metadata, options.adapter) if options.photo else None
    fitted = {path: _condition(picture, size, models.channels, annotator) for path, picture in read.items()}
    wanted = [(prompt, path, options.seed + i) for prompt, path in pairs for i in range(options.num)]
    out = output_folder(options.out)
    pictures = generate(
        models.pipeline(),
        [prompt for prompt, _, _ in wanted],
        [fitted[path] for _, path, _ in wanted],
        [seed for _, _, seed in wanted],
        size=size,
        sampling=options,
        negative=options.negative,
    )
    for picture, (prompt, path, seed) in zip(pictures, wanted, strict=True):
        record = picture_record(options, models, size, prompt, path, seed, annotator)
        print(_save(out, picture, record, fitted[path] if annotator else None))


def picture_size(options: GenerateOptions, models: Models, condition: Image.Image) -> tuple[int, int]:
    """(height, width) in pixels: what the flags say, else the training resolution, else the condition's own size."""
    own = (models.resolution,) * 2 if models.resolution else (condition.height, condition.width)
    height, width = options.height or own[0], options.width or own[1]
    check_resolution(height, height, models.adapter_config, "--height")
    check_resolution(width, width, models.adapter_config, "--width")
    return height, width


def picture_record(
    options: GenerateOptions,
    models: Models,
    size: tuple[int, int],
    prompt: str,
    file: str,
    seed: int,
    annotator: Annotator | None = None,
) -> dict[str, Any]:
    """All that a picture depends on, and the command that draws it again. Plain JSON types."""
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
        "command": command_line(single),
        "options": asdict(single),
        "adapter_sha256": models.digest,
        "image_sha256": hashlib.sha256(user_path(file).read_bytes()).hexdigest(),
        "versions": {name: version(name) for name in LIBRARIES},
    }


def command_line(options: GenerateOptions) -> str:
    """The command with which these options are given; what is at its default is left out."""
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


def _condition(picture: Image.Image, size: tuple[int, int], channels: int, annotator: Annotator | None) -> Image.Image:
    if annotator is None:
        return fit_condition(picture, size, channels)
    return make_condition(picture, size, channels, annotator)


def _save(out: Path, picture: Image.Image, record: dict[str, Any], made: Image.Image | None) -> Path:
    """Writes picture and record, and the condition where it was made here, under the next free number; returns the
    picture's path."""
    taken = [int(path.stem) for path in out.glob("*.png") if path.stem.isdigit()]
    path = out / f"{max(taken, default=-1) + 1:05d}.png"
    picture.save(path)
    if made:
        made.save(path.with_name(f"{path.stem}_condition.png"))
    text = json.dumps(record, indent=2, ensure_ascii=False)
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    return path
