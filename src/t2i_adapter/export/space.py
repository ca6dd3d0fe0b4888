"""Writes a Hugging Face Space that shows an adapter: a page by gradio, which this package does not install."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from t2i_adapter.config.tree import NANO
from t2i_adapter.errors import UserError
from t2i_adapter.export.layouts import XL, Network
from t2i_adapter.export.modelspec import plain
from t2i_adapter.export.programs import size_multiple
from t2i_adapter.models.record import is_path

GRADIO = "6.31.0"
"""Version of gradio for which app.py is written."""
_REQUIREMENTS = ("diffusers", "transformers", "accelerate", "safetensors")
"""Packages that are pinned to the installed versions, with which the tests ran."""

_APP = string.Template('''\
"""Makes pictures that follow a prompt and a condition picture, with a T2I-Adapter. Needs a GPU to be fast."""

from functools import lru_cache
from pathlib import Path

import torch
from diffusers import $imports
from PIL import Image

ADAPTER = Path(__file__).parent / "adapter"
TITLE = $title
BASE = $base
SIZE = $size  # width and height in pixels
MODE = $mode  # of the condition picture
ON_GPU = torch.cuda.is_available()
DTYPE = torch.float16 if ON_GPU else torch.float32


@lru_cache
def load_pipeline():
    adapter = T2IAdapter.from_pretrained(ADAPTER, dtype=DTYPE)
    pipeline = $pipeline.$load(BASE, adapter=adapter, dtype=DTYPE$arguments)
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    return pipeline.to("cuda" if ON_GPU else "cpu")


def make_picture(condition, prompt, negative, strength, end, guidance, steps, seed):
    """Returns the picture. condition: PIL picture; end: share of the steps after which the adapter acts no more."""
    if condition is None:
        raise ValueError("Choose a condition picture first.")
    condition = condition.convert("RGB").convert(MODE).resize(SIZE, Image.Resampling.LANCZOS)
    return load_pipeline()(
        prompt,
        negative_prompt=negative or None,
        image=condition,
        width=SIZE[0],
        height=SIZE[1],
        num_inference_steps=int(steps),
        guidance_scale=guidance,
        adapter_conditioning_scale=strength,
        adapter_conditioning_factor=end,
        generator=torch.Generator("cpu").manual_seed(int(seed)),
    ).images[0]


def build():
    import gradio as gr

    controls = [
        gr.Image(label=$label, type="pil"),
        gr.Textbox(label="Prompt"),
        gr.Textbox(label="Negative prompt"),
        gr.Slider(0, 2, value=$strength, step=0.05, label="Strength of the adapter"),
        gr.Slider(0, 1, value=$end, step=0.05, label="Share of the steps in which it acts"),
        gr.Slider(1, 12, value=$guidance, step=0.5, label="Guidance"),
        gr.Slider(1, 60, value=30, step=1, label="Steps"),
        gr.Number(value=0, precision=0, label="Seed"),
    ]
    return gr.Interface(make_picture, controls, gr.Image(label="Picture"), title=TITLE, flagging_mode="never")


if __name__ == "__main__":
    build().launch()
''')

_README = string.Template("""\
A T2I-Adapter for $family: choose a condition picture$how, write a prompt, and press Submit.

`adapter/` holds the adapter's weights; the base `$base` is downloaded when the Space starts. Upload this folder with

    hf upload ACCOUNT/SPACE . . --repo-type space

and choose a GPU with 16 GB or more as the hardware. On a CPU a picture at 1024 x 1024 takes many minutes.
""")


@dataclass(frozen=True, kw_only=True)
class SpaceText:
    """What the Space says. strength, end, guidance: the values at which its sliders begin."""

    title: str
    made_by: str
    license: str | None
    strength: float
    end: float
    guidance: float


def space_base(base: Mapping[str, Any] | None, named: str | None) -> dict[str, Any]:
    """Returns the base that the Space loads: the one that is `named`, else the record's. Raises UserError."""
    found = {"name": named} if named else dict(base or {})
    if not found:
        raise UserError("is needed: the adapter has no record of its base. Name a hub id.", option="base")
    if found["name"] == NANO:
        raise UserError(f"{NANO}: this base is inside the package, which a Space does not have.", option="base")
    return found


def describe_base(base: Mapping[str, Any]) -> str | None:
    """Returns a warning if a Space on the hub cannot load the base."""
    local = [name for key in ("name", "vae", "config") if (name := base.get(key)) and is_path(name)]
    if not local:
        return None
    return f"{local[0]} is on this machine: the app runs here, but not on the hub. Name a hub id with --base there."


def write_space(folder: Path, network: Network, base: Mapping[str, Any], size: int, text: SpaceText) -> None:
    """Writes README.md, app.py and requirements.txt into an existing folder. size: side of the pictures in pixels."""
    multiple = size_multiple(network)
    side = max(size // multiple, 1) * multiple
    (folder / "app.py").write_text(_app(network, base, side, text), encoding="utf-8")
    pins = [f"{name}=={version(name)}" for name in _REQUIREMENTS]
    (folder / "requirements.txt").write_text("\n".join(["torch>=2.4", *pins]) + "\n", encoding="utf-8")
    head = {
        "title": text.title,
        "sdk": "gradio",
        "sdk_version": GRADIO,
        "app_file": "app.py",
        "pinned": False,
        "tags": ["t2i-adapter"],
        **({"models": [base["name"]]} if not is_path(base["name"]) else {}),
        **({"license": text.license} if text.license else {}),
    }
    family = "Stable Diffusion XL" if network.adapter_type == XL else "Stable Diffusion 1.5"
    body = _README.substitute(
        family=family, how=f" (made by `{text.made_by}`)" if text.made_by else "", base=plain(base["name"])
    )
    front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    (folder / "README.md").write_text(f"---\n{front}---\n\n{body}", encoding="utf-8")


def _app(network: Network, base: Mapping[str, Any], side: int, text: SpaceText) -> str:
    """Returns the program. Every text from outside is written as a Python literal."""
    pipeline = "StableDiffusionXLAdapterPipeline" if network.adapter_type == XL else "StableDiffusionAdapterPipeline"
    name, vae = base["name"], base.get("vae")
    single = name.endswith(".safetensors")
    arguments = {key: base[key] for key in ("config" if single else "variant", "revision") if base.get(key)}
    shown = "".join(f", {key}={value!r}" for key, value in arguments.items())
    if vae:
        shown += f", vae=AutoencoderKL.from_pretrained({vae!r}, dtype=DTYPE)"
    classes = ["AutoencoderKL"] * bool(vae) + ["EulerAncestralDiscreteScheduler", pipeline, "T2IAdapter"]
    return _APP.substitute(
        imports=", ".join(classes),
        title=repr(text.title),
        base=repr(name),
        size=(side, side),
        mode=repr("L" if network.in_channels == 1 else "RGB"),
        pipeline=pipeline,
        load="from_single_file" if single else "from_pretrained",
        arguments=shown,
        label=repr(f"Condition picture{f' ({text.made_by})' if text.made_by else ''}"),
        strength=text.strength,
        end=text.end,
        guidance=text.guidance,
    )
