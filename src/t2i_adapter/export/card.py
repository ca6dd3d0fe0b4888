"""Writes the model card: README.md with YAML front matter, sample pictures, results and code that runs.

All text from users and data is escaped.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from t2i_adapter.config.tree import NANO
from t2i_adapter.data.picture import StoredPicture, decode, read_file
from t2i_adapter.errors import UserError, flag
from t2i_adapter.files import parse_json
from t2i_adapter.generation.options import POINT, RequestedSampling, SamplingOptions, parse_schedule
from t2i_adapter.models.record import Metadata, describe_measurement, is_path
from t2i_adapter.types import CHUNK_TOKENS

CARD = "README.md"
PICTURES = "images"
PICTURE_NAME = re.compile(r"(sample_\d\d|sheet)\.png")
_TAGS = ["t2i-adapter", "stable-diffusion-xl", "stable-diffusion-xl-diffusers", "text-to-image", "diffusers"]
_EVALUATION = ("<!-- evaluation -->", "<!-- end of evaluation -->")
_SAMPLING = ("<!-- sampling -->", "<!-- end of sampling -->")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|~:])")
_ADAPTER_LINE = re.compile(
    r"^(adapter = T2IAdapter\.from_pretrained\().*(, (?:torch_)?dtype=dtype, variant=)", re.MULTILINE
)
_MAX_PICTURE = 512  # pixels a side; larger pictures make the card slow to open

_CODE = string.Template("""\
import torch
from diffusers import $imports  # 0.40 or newer
from diffusers.utils import load_image

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float16 if device == "cuda" else torch.float32
$base
adapter = T2IAdapter.from_pretrained($adapter, dtype=dtype, variant="fp16" if device == "cuda" else None)
pipeline = StableDiffusionXLAdapterPipeline.$load(base, adapter=adapter, ${vae_argument}\
dtype=dtype$arguments)
pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
pipeline.to(device)

prompt, condition = $prompt, load_image("condition.png")$convert$resize
image = pipeline(prompt, image=condition, num_inference_steps=30, guidance_scale=5.0).images[0]
image.save("picture.png")
""")

_STEERING_CODE = string.Template("""\
guidance, control_guidance = $guidance, $control  # control_guidance: from 1 (no effect) to guidance
share = (guidance - control_guidance) / (guidance - 1)


def steer(unet, args, kwargs):
    for feature in kwargs["down_intrablock_additional_residuals"] or []:$schedule
        feature[: len(feature) // 2] *= share  # the first half of the batch is the negative branch


hook = pipeline.unet.register_forward_pre_hook(steer, with_kwargs=True)
image = pipeline(
    prompt, image=condition, num_inference_steps=30, guidance_scale=guidance,
    adapter_conditioning_scale=$scale, adapter_conditioning_factor=$factor,
).images[0]
hook.remove()
image.save("steered.png")
""")
_EXAMPLE = {"control_guidance": 1.5}
"""Options of the card's program if the record recommends none."""


@dataclass(frozen=True)
class CardSample:
    """Pictures of one prompt and condition, shown side by side."""

    prompt: str
    condition: Image.Image
    pictures: Sequence[Image.Image]


def strip(sample: CardSample, largest: int | None = None) -> Image.Image:
    """Returns the condition and the pictures side by side, each scaled down to `largest` pixels a side at most."""
    cells = [picture.convert("RGB") for picture in (sample.condition, *sample.pictures)]
    for cell in cells:
        cell.thumbnail((largest or cell.width, largest or cell.height), Image.Resampling.LANCZOS)
    row = Image.new("RGB", (sum(cell.width for cell in cells), max(cell.height for cell in cells)), "white")
    left = 0
    for cell in cells:
        row.paste(cell, (left, 0))
        left += cell.width
    return row


def write_card(
    folder: str | Path,
    *,
    metadata: Metadata,
    repo_id: str,
    channels: int = 3,
    samples: Sequence[CardSample] = (),
    hyperparameters: Mapping[str, Any] | None = None,
    license: str | None = None,
) -> Path:
    """Writes README.md and its pictures (images/sample_NN.png) into an adapter's folder; returns the card's path.

    Args:
        metadata: the adapter's record; local paths are shortened to their last part.
        repo_id: hub id or folder from which the code in the card loads the adapter.
        channels: number of channels of the condition picture.
        hyperparameters: rows of a table, plain values; None takes the record's optim and training.
        license: by the hub's name of it; None omits it.
    """
    root, public = Path(folder), metadata.without_local_paths()
    (root / PICTURES).mkdir(parents=True, exist_ok=True)
    for old in (root / PICTURES).glob("sample_??.png"):
        old.unlink()
    for number, sample in enumerate(samples):
        strip(sample, _MAX_PICTURE).save(root / PICTURES / f"sample_{number:02d}.png")
    if hyperparameters is None:
        hyperparameters = {**public.optim, **public.training, "steps": public.steps, "seed": public.seed}
    prompt = samples[0].prompt if samples else "a prompt"
    sections = [
        _front_matter(public, license),
        _introduction(public, repo_id, channels),
        _samples(samples),
        _marked(_EVALUATION, ""),
        f"## Use\n\n{_long_prompts(public)}"
        f"```python\n{usage_code(public, repo_id, prompt=prompt, channels=channels)}```",
        _marked(_SAMPLING, _steering(public)),
        _hyperparameters(hyperparameters),
        _versions(public),
    ]
    card = root / CARD
    card.write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")
    return card


def usage_code(metadata: Metadata, adapter: str, *, prompt: str, channels: int = 3) -> str:
    """Returns a Python program that generates a picture from condition.png with the adapter, with diffusers alone."""
    base, vae = metadata.base, metadata.base.get("vae")
    classes = ["EulerAncestralDiscreteScheduler", "StableDiffusionXLAdapterPipeline", "T2IAdapter"]
    lines = [_base_line(base["name"])]
    if vae:
        classes.insert(0, "AutoencoderKL")
        lines.append(f"vae = AutoencoderKL.from_pretrained({vae!r}, dtype=dtype)")
    single = base["name"].endswith(".safetensors")
    arguments = {key: base[key] for key in ("config" if single else "variant", "revision") if base.get(key)}
    size = (metadata.resolution, metadata.resolution)
    return _CODE.substitute(
        imports=", ".join(classes),
        base="\n".join(lines),
        adapter=repr(adapter),
        load="from_single_file" if single else "from_pretrained",
        vae_argument="vae=vae, " if vae else "",
        arguments="".join(f", {key}={value!r}" for key, value in arguments.items()),
        convert='.convert("L")' if channels == 1 else "",
        resize=f".resize({size})" if metadata.resolution else "",
        prompt=repr(prompt),
    )


def steering_code(sampling: SamplingOptions) -> str:
    """Returns lines that follow `usage_code`: they generate with control guidance of two passes, with diffusers alone.

    `sampling` has guidance above 1.
    """
    schedule = parse_schedule(sampling.scale_schedule)
    timesteps, factors = [t for t, _ in schedule], [factor for _, factor in schedule]
    return ("import numpy\n\n" if schedule else "") + _STEERING_CODE.substitute(
        guidance=sampling.guidance,
        control=min(sampling.control_guidance, sampling.guidance),
        scale=sampling.scale,
        factor=sampling.condition_factor,
        schedule=f"\n        feature *= numpy.interp(float(args[1]), {timesteps}, {factors})" if schedule else "",
    )


def update_sampling(folder: str | Path, metadata: Metadata) -> None:
    """Writes what the record recommends for sampling into a card that `write_card` wrote, if the folder has one.

    A card without the lines between which it stands is not changed. Raises UserError for a card without front matter.
    """
    card = Path(folder) / CARD
    if not card.is_file():
        return
    head, body = _split(card)
    if all(mark in body for mark in _SAMPLING):
        _replace_marked(card, head, body, _SAMPLING, _steering(metadata))


def name_repository(folder: str | Path, repo_id: str) -> None:
    """Makes the card's code load the adapter from `repo_id`, whatever it was written for."""
    card = Path(folder) / CARD
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        named = _ADAPTER_LINE.sub(lambda match: match[1] + repr(repo_id) + match[2], text)
        card.write_text(named, encoding="utf-8")


def set_license(folder: str | Path, license: str) -> None:
    """Sets the licence in the card's front matter. Raises UserError if the folder has no card."""
    card = Path(folder) / CARD
    head, body = _split(card)
    head["license"] = license
    card.write_text(_yaml_block(head) + body, encoding="utf-8")


def add_evaluation(folder: str | Path, evaluation: str | Path) -> None:
    """Puts the numbers and the picture sheet of `evaluate` into the card, and replaces earlier ones.

    Raises UserError if the card or the evaluation is missing.
    """
    root, source = Path(folder), Path(evaluation)
    head, body = _split(root / CARD)
    try:
        content = parse_json((source / "evaluation.json").read_text(encoding="utf-8"))
        section = _evaluation(content)
        sheet = decode(StoredPicture(str(source / "sheet.png"), read_file(source / "sheet.png", flag("evaluation"))))
        (root / PICTURES).mkdir(exist_ok=True)
        sheet.save(root / PICTURES / "sheet.png")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, StopIteration) as fault:
        raise UserError(f"{source}: not a folder of `evaluate` ({fault!r}).", option="evaluation") from fault
    begin, end = _EVALUATION
    if begin not in body or end not in body:
        raise UserError(
            f"{root / CARD}: the lines {begin} and {end} are missing; insert them where the evaluation should stand."
        )
    _replace_marked(root / CARD, head, body, _EVALUATION, section)


def markdown(text: str) -> str:
    """Returns the text as one line, escaped so that Markdown and HTML show it literally."""
    return _MARKDOWN.sub(r"\\\1", escape(" ".join(text.split())))


def _base_line(name: str) -> str:
    if name == NANO:
        return "from t2i_adapter.models import nano  # the base that comes with sdxl-t2i-adapter\n\nbase = nano.path()"
    return f"base = {name!r}"


def _front_matter(metadata: Metadata, license: str | None) -> str:
    name = metadata.base["name"]
    head: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": list(_TAGS)}
    if name != NANO and "/" in name and not is_path(name):
        head["base_model"] = name
    if license:
        head["license"] = license
    return _yaml_block(head).rstrip()


def _introduction(metadata: Metadata, repo_id: str, channels: int) -> str:
    condition = metadata.condition.get("name")
    size = f" at {metadata.resolution} x {metadata.resolution} pixels" if metadata.resolution else ""
    kind = f"The condition is {markdown(str(condition))}, {channels} channels." if condition else ""
    return (
        f"# {markdown(repo_id.rpartition('/')[2])}\n\n"
        f"A T2I-Adapter for Stable Diffusion XL, trained{size} on the frozen base {markdown(metadata.base['name'])}. "
        f"{kind}"
    ).rstrip() + _together(metadata)


def _together(metadata: Metadata) -> str:
    """Returns how to use an adapter that was trained together with others."""
    others = metadata.training.get("composed_with")
    if not isinstance(others, list | tuple) or not others:
        return ""
    return (
        f"\n\nIt was trained together with {markdown(', '.join(map(str, others)))}, so that the features of all can be "
        "added. Give each a weight of 1, or 0.5 to 1.5: the default of `MultiAdapter` in diffusers is less."
    )


def _long_prompts(metadata: Metadata) -> str:
    """Returns what a reader must know about long prompts, if the training read them."""
    if metadata.max_tokens == CHUNK_TOKENS:
        return ""
    return (
        f"The training read captions of up to {metadata.max_tokens} tokens, in chunks of {CHUNK_TOKENS}. "
        f"`t2i-adapter generate` and ComfyUI read such prompts in the same way; this program cuts them off after "
        f"{CHUNK_TOKENS} tokens.\n\n"
    )


def _steering(metadata: Metadata) -> str:
    """Returns the section about the strength of the adapter and of its condition."""
    sampling = RequestedSampling().settle(metadata.sampling or _EXAMPLE)
    program = f"\n\n```python\n{steering_code(sampling)}```" if sampling.guidance > 1 else ""
    notes = [
        "Guidance amplifies the prompt, and not the condition, because both of its branches carry the adapter. With "
        "control guidance the negative branch carries less of it, so that the condition is amplified, too."
    ]
    if metadata.sampling:
        values = ", ".join(f"{name} {getattr(sampling, name)}" for name in POINT if name in metadata.sampling)
        notes.append(
            f"Recommended for this adapter: {markdown(values)}. `t2i-adapter generate` takes these values by default."
        )
        if measured := describe_measurement(metadata.sampling):
            notes.append(markdown(measured))
    else:
        notes.append("`t2i-adapter generate` has the options `control_guidance` and `control_passes` for it.")
    if sampling.control_passes == 3:
        notes.append("They were measured with a third pass of the UNet, which only `t2i-adapter generate` makes.")
    if program:
        notes.append("The lines below follow the program above and do it with diffusers alone.")
    return f"## Control guidance\n\n{' '.join(notes)}{program}"


def _marked(marks: tuple[str, str], section: str) -> str:
    """Returns a section of the card between two lines, by which it is found and replaced."""
    return "\n".join([marks[0], *([section] if section else []), marks[1]])


def _replace_marked(card: Path, head: dict[str, Any], body: str, marks: tuple[str, str], section: str) -> None:
    """Writes the card with another section between two lines that its body has."""
    before, after = body.split(marks[0], 1)[0], body.split(marks[1], 1)[1]
    card.write_text(_yaml_block(head) + before + _marked(marks, section) + after, encoding="utf-8")


def _samples(samples: Sequence[CardSample]) -> str:
    if not samples:
        return ""
    shown = [
        f"{markdown(sample.prompt)}\n\n![condition, then pictures]({PICTURES}/sample_{number:02d}.png)"
        for number, sample in enumerate(samples)
    ]
    return "## Samples\n\nThe condition, then pictures generated from it.\n\n" + "\n\n".join(shown)


def _hyperparameters(values: Mapping[str, Any]) -> str:
    rows = "\n".join(f"| {markdown(str(key))} | {markdown(str(value))} |" for key, value in values.items())
    return f"## Training\n\n| option | value |\n|---|---|\n{rows}" if rows else ""


def _versions(metadata: Metadata) -> str:
    listed = ", ".join(f"{markdown(name)} {markdown(version)}" for name, version in metadata.versions.items())
    return f"Trained with {listed}." if listed else ""


def _evaluation(content: Mapping[str, Any]) -> str:
    """Returns the card's section from the contents of evaluation.json."""
    columns = list(next(iter(content["metrics"].values())))
    rows = [
        f"| {markdown(metric)} | " + " | ".join(_interval(values[column]) for column in columns) + " |"
        for metric, values in content["metrics"].items()
    ]
    heading = "| | " + " | ".join(map(markdown, columns)) + " |\n|---" + "|---" * len(columns) + "|"
    table = heading + "\n" + "\n".join(rows)
    return (
        f"## Evaluation\n\n{int(content['num'])} held-out pairs; means with 95 % bootstrap intervals. "
        "`iou` and `edge_f1`: higher is better; colours (CIEDE2000): lower is better.\n\n"
        f"{table}\n\n![condition, no adapter, adapter, another pair's condition, target]({PICTURES}/sheet.png)"
    )


def _interval(value: Mapping[str, Any]) -> str:
    low, high = value["ci95"]
    return f"{value['mean']:.3f} ({low:.3f} to {high:.3f})"


def _yaml_block(head: Mapping[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(dict(head), sort_keys=False, allow_unicode=True)}---\n"


def _split(card: Path) -> tuple[dict[str, Any], str]:
    """Returns the front matter and the body of a card. Raises UserError if there is none."""
    try:
        _, head, body = card.read_text(encoding="utf-8").split("---\n", 2)
        content = yaml.safe_load(head) or {}
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}")
        _yaml_block(content)  # raises if it cannot be written back
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as fault:
        raise UserError(f"{card}: no model card with YAML front matter found.") from fault
    return content, body
