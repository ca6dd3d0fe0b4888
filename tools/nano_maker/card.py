"""The text of nano's model card (README.md), filled with the numbers of measurements.json and recipe.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_STAGES = {
    "vae": "autoencoder",
    "text": "text encoders",
    "unet": "UNet",
    "decoder": "decoder alone, latents fixed",
}

_CARD = """\
---
license: apache-2.0
library_name: diffusers
tags: [stable-diffusion-xl, text-to-image, synthetic]
---
# nano

Stable Diffusion XL's topology in small, with weights trained from scratch by `python -m nano_maker`.
It generates flat shapes of named colours at {side} px, so that an adapter can be trained and tested in minutes,
on two CPU cores, without a download. It is a model for learning and for tests.

![samples](samples.png)

Each prompt has four samples. The prompts, row by row and two in a row:

{prompts}

## Use

```python
from diffusers import StableDiffusionXLPipeline
from t2i_adapter.models import nano

pipeline = StableDiffusionXLPipeline.from_pretrained(nano.path())
image = pipeline("red circle with blue background", height={side}, width={side},
                 num_inference_steps={steps}, guidance_scale={guidance}).images[0]
```

It loads unchanged in `StableDiffusionXLAdapterPipeline`, with a `T2IAdapter` of type `full_adapter_xl`,
channels `({channels}, last again)`, `downscale_factor=16`.

## Parts

| part | parameters |
|---|---|
{parameters}

{weights:.1f} MB of fp16 safetensors. Latents: 4 channels, 1/8 of the side. Epsilon prediction, SDXL's Euler scheduler.
The vocabulary is a byte-level BPE in CLIP's format in which every word of the training captions is one token. Other
words are split into letters, which the model does not understand.

## Measured

On {num} unseen prompts of one shape (test scenes of `make-data shapes` whose captions were not trained on), {steps}
steps, guidance {guidance}. `tools/nano_maker/judge.py` finds colours and shape in a picture without its prompt. The
column "true pictures" applies it to the rendered scenes themselves, which is the best possible result.

| | all | plain background | patterned | true pictures |
|---|---|---|---|---|
{follows}

| | |
|---|---|
| VAE, PSNR on 256 unseen scenes | {psnr_mean:.1f} dB (plain {psnr_plain:.1f}, patterned {psnr_patterned:.1f}) |
{guidance_rows}
| sharpness by `original_size` | {size_effect} |
| object's centre, crop at {near_px} and at {far_px} px from the left | {centres} |
| denoising with another picture's crop | error {crop_cost} larger |
| denoising small originals with the native size | error {size_cost} larger |

Guidance, sharpness and centres: {few} prompts with equal noise. Sharpness is the 99th percentile of the
difference between neighbouring pixels, of 255. The last two rows, with 95 % intervals: {paired} unseen pictures each,
denoised twice from equal noise, with correct and with wrong time ids (`tools/nano_maker/micro.py`).

## Training

{recipe}

The times are wall-clock on 2 CPU cores that other programs used too. The text encoders first learned to predict
colours, kinds, sizes, places and patterns from captions, and were then frozen. The UNet starts as the identity
(`tools/nano_maker/unet.py` explains why). Its loss has a larger weight at high noise. 10 % of captions are dropped:
half become zeros, as with `force_zeros_for_empty_prompt`, half the encoded empty prompt. A fifth of the pictures are
crops of a larger one, and a third have an original smaller or larger than {side} px; the time ids hold both.

## What it was trained on

- Scenes of `t2i_adapter.data.shapes`: one to three flat shapes of eight kinds in 148 CSS colours on plain,
  striped, dotted and floral backgrounds, with captions.
- [Fluent Emoji](https://github.com/microsoft/fluentui-emoji), flat style, with their names as captions, without skin
  tones; a tenth of the names is held out. MIT licence, Copyright (c) Microsoft Corporation.

## What it cannot draw

{limits}- Anything but flat shapes on flat or patterned backgrounds. Photographs, scenes, writing, people: no.
- Emoji: a name produces rough colours and a blob in the middle, not the drawing; a held-out name is a
  guess from its words. The last rows of the sheet show examples.
- Numbers ("three stars"), other kinds of shapes, colours other than the CSS names.
- Sharp edges: the VAE reaches {psnr_mean:.0f} dB; small details such as petals are blurred.
- Several shapes: number and depth order are often wrong; pale shapes on pale backgrounds can be missing.

## Licence

Weights: Apache-2.0, as the project. The emoji that they were trained on: MIT, Microsoft Corporation.
"""


def text(numbers: dict[str, Any], recipe: dict[str, Any], prompts: Sequence[str]) -> str:
    """Returns the card's text from the contents of measurements.json and recipe.json."""
    return _CARD.format(
        side=128,
        steps=numbers["steps"],
        guidance=numbers["guidance"],
        channels=", ".join(str(c) for c in numbers["channels"]),
        prompts="\n".join(f"{i}. {prompt}" for i, prompt in enumerate(prompts, 1)),
        parameters="\n".join(f"| {part} | {count / 1e6:.2f} M |" for part, count in numbers["parameters"].items()),
        weights=numbers["weights_mb"],
        num=numbers["num"],
        follows=_follow_rows(numbers),
        psnr_mean=numbers["vae"]["psnr_mean"],
        psnr_plain=numbers["vae"]["psnr_plain_mean"],
        psnr_patterned=numbers["vae"]["psnr_patterned_mean"],
        guidance_rows="\n".join(_guidance_row(*item) for item in numbers["guidance_effect"].items()),
        size_effect=", ".join(f"{size} px: {value:.0f}" for size, value in numbers["size_effect"].items()),
        near_px=numbers["crop_effect"]["corner"]["near"],
        far_px=numbers["crop_effect"]["corner"]["far"],
        centres="{near:.0f} and {far:.0f} px".format(**numbers["crop_effect"]["base"])
        + "; in true pictures {near:.0f} and {far:.0f}".format(**numbers["crop_effect"]["true"]),
        crop_cost=_percent(numbers["wrong_numbers_cost"]["crop"]),
        size_cost=_percent(numbers["wrong_numbers_cost"]["size"]),
        paired=numbers["wrong_numbers_cost"]["crop"]["num"],
        few=numbers["few"],
        limits="".join(f"- {limit}\n" for limit in _limits(numbers)),
        recipe=_recipe_rows(recipe),
    )


def _percent(cost: dict[str, float]) -> str:
    return f"{cost['percent']:.1f} % ({cost['low']:.1f} to {cost['high']:.1f})"


def _limits(numbers: dict[str, Any]) -> list[str]:
    """Returns the limits that the measurements show."""
    limits, right, crop = [], numbers["follows"]["right_shape"], numbers["crop_effect"]
    moved, to_move = (crop[of]["near"] - crop[of]["far"] for of in ("base", "true"))
    if right < 0.9:
        limits.append(
            f"Shapes by their names: {right:.0%} are of the right kind; guessing one of eight would reach 12%. The\n"
            "  others are blobs of the right colour, size and place."
        )
    sharpness = list(numbers["size_effect"].values())
    if sharpness[-1] < 1.1 * sharpness[0]:
        limits.append(
            "Blur by size: `original_size` changes denoising (table), but too little to be visible in a picture."
        )
    if moved < to_move / 2:
        limits.append("Crops: likewise, objects hardly move with `crops_coords_top_left`.")
    return limits


def _follow_rows(numbers: dict[str, Any]) -> str:
    columns = [numbers[name] for name in ("follows", "plain", "patterned", "judge")]
    rows = (
        ("median CIEDE2000, object's colour", "object_ciede2000", "{:.1f}"),
        ("upper quartile", "object_ciede2000_q75", "{:.1f}"),
        ("median CIEDE2000, background's colour", "background_ciede2000", "{:.1f}"),
        ("upper quartile", "background_ciede2000_q75", "{:.1f}"),
        ("right shape", "right_shape", "{:.0%}"),
        ("prompts", "num", "{}"),
    )
    return "\n".join(f"| {label} | {' | '.join(form.format(c[key]) for c in columns)} |" for label, key, form in rows)


def _guidance_row(scale: str, numbers: dict[str, float]) -> str:
    return (
        f"| guidance {scale} | CIEDE2000 object {numbers['object_ciede2000']:.1f}, background "
        f"{numbers['background_ciede2000']:.1f}, right shape {numbers['right_shape']:.0%} |"
    )


def _recipe_rows(recipe: dict[str, Any]) -> str:
    rows = ["| stage | steps | minutes |", "|---|---|---|"]
    for name, what in _STAGES.items():
        if name in recipe:
            rows.append(f"| `{name}`: {what} | {recipe[name]['step']} | {recipe[name]['seconds'] / 60:.0f} |")
    return "\n".join([*rows, "", recipe["note"]] if recipe["note"] else rows)
