"""The model card, written from the measurements: no number in it is typed by hand."""

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
It draws flat shapes of named colours at {side} px, so that an adapter can be trained, watched and tested in minutes,
on two CPU cores, without a download. It is a teaching and test model, not a picture maker.

![samples](samples.png)

Each prompt of the sheet has four samples, left to right and then down:

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
The vocabulary is a byte-level BPE in CLIP's form in which every word of the domain is one token; other words fall
apart into letters and mean nothing to it.

## Measured

On {num} unseen prompts of one shape (test scenes of the generator, none of whose captions was trained on), {steps}
steps, guidance {guidance}. A picture is judged without being told what should be in it: `tools/nano_maker/judge.py`.
The column "true pictures" is what that judge says of the generator's own pictures, and so the best that can be reached.

| | all | plain background | patterned | true pictures |
|---|---|---|---|---|
{follows}

| | |
|---|---|
| VAE, PSNR on 256 unseen scenes | {psnr_mean:.1f} dB (plain {psnr_plain:.1f}, patterned {psnr_patterned:.1f}) |
{guidance_rows}
| sharpest edges by `original_size` | {size_effect} |
| object's centre, cut at {near_px} and at {far_px} px from the left | {centres} |
| denoising with another picture's crop | error {crop_cost} larger |
| denoising small pictures as if of native size | error {size_cost} larger |

Guidance, edges and centres: {few} prompts, the same noise in each column. Sharpness is the 99th percentile of the
step between neighbouring pixels, of 255. The last two rows, with 95 % intervals: {paired} unseen pictures each,
denoised twice from the same noise, with their own numbers and with wrong ones (`tools/nano_maker/micro.py`).

## Training

{recipe}

The times are wall-clock on 2 CPU cores that other programs used too. The text encoders were first taught to tell
colours, kinds, sizes, places and patterns from captions, then frozen. The UNet starts as the identity
(`tools/nano_maker/unet.py` says why), its loss is weighted towards high noise, 10 % of captions are dropped: half
become zeros, which is what `force_zeros_for_empty_prompt` passes, half the encoded empty prompt. A fifth of the pictures is
cut out of a larger one, another third was smaller or larger than {side} px, with time ids that say so.

## What it was trained on

- Scenes of `t2i_adapter.data.shapes`: one to three flat shapes of eight kinds in 148 CSS colours on plain,
  striped, dotted and floral backgrounds, with captions.
- [Fluent Emoji](https://github.com/microsoft/fluentui-emoji), flat style, by their names, skin tones left out; a
  tenth of the names is held out. MIT licence, Copyright (c) Microsoft Corporation.

## What it cannot draw

{limits}- Anything but flat shapes on flat or patterned backgrounds. Photographs, scenes, writing, people: no.
- Emoji: a name gives the rough colours and a blob in the middle, not the drawing; a name that was held out is a
  guess from its words. The bottom rows of the sheet show how far it came.
- Numbers of things ("three stars"), kinds that it has not met, colours other than the CSS names.
- Edges are as soft as the VAE's {psnr_mean:.0f} dB let them be; small details such as petals are blurred.
- With several shapes, number and depth order are often wrong; pale shapes on pale grounds can be missing.

## Licence

Weights: Apache-2.0, as the project. The emoji that they were trained on: MIT, Microsoft Corporation.
"""


def text(numbers: dict[str, Any], recipe: dict[str, Any], prompts: Sequence[str]) -> str:
    """The card, from measurements.json and recipe.json."""
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
    """What the measurements show to be missing."""
    limits, right, crop = [], numbers["follows"]["right_shape"], numbers["crop_effect"]
    moved, to_move = (crop[of]["near"] - crop[of]["far"] for of in ("base", "true"))
    if right < 0.9:
        limits.append(
            f"Shapes by their names: {right:.0%} are of the right kind, where guessing one of eight gives 12%. The\n"
            "  others are blobs of the right colour, size and place."
        )
    sharpness = list(numbers["size_effect"].values())
    if sharpness[-1] < 1.1 * sharpness[0]:
        limits.append(
            "Blur by size: `original_size` is heeded in denoising (table), too faintly to be seen in a picture."
        )
    if moved < to_move / 2:
        limits.append("Cuts by crop: likewise; objects hardly move with `crops_coords_top_left`.")
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
