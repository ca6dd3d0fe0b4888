"""Measures an exported base and writes its model card: measurements.json, samples.png and README.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from nano_maker import card, micro, pictures, vae
from nano_maker.corpus import Corpus
from nano_maker.judge import judge
from t2i_adapter.data import shapes
from t2i_adapter.evaluation.color import ciede2000, srgb_to_lab

STEPS = 20
GUIDANCE = 3.0
_BATCH = 32
_SEED = 0  # of the test scenes: make-data writes the first of them
_SEEN = 20 * 1024  # training captions; prompts equal to one of them are not used
_PAIRED = 512  # pictures denoised twice, with correct and with wrong time ids
_FEW = 48  # prompts of the comparisons between settings


def write_recipe(folder: Path, stages: dict[str, Any]) -> None:
    (folder / "recipe.json").write_text(json.dumps(stages, indent=1) + "\n")


def run(folder: Path, num: int) -> None:
    """Measures the base in `folder` on `num` unseen prompts and writes the files of its model card there."""
    base = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32)
    base.set_progress_bar_config(disable=True)
    scenes = unseen(num)
    images = sample(base, [scene.caption for scene in scenes])
    numbers = {
        "num": num,
        "steps": STEPS,
        "guidance": GUIDANCE,
        "few": min(num, _FEW),
        "channels": list(base.unet.config["block_out_channels"]),
        "parameters": {name: _count(getattr(base, name)) for name in ("unet", "vae", "text_encoder", "text_encoder_2")},
        "weights_mb": sum(p.stat().st_size for p in folder.rglob("*.safetensors")) / 2**20,
        "vae": _vae_numbers(base),
        "judge": follow_numbers([np.asarray(shapes.render(s, pictures.NATIVE)) for s in scenes], scenes),
        "follows": follow_numbers(images, scenes),
        "plain": _only(images, scenes, patterned=False),
        "patterned": _only(images, scenes, patterned=True),
        "guidance_effect": _guidance_effect(base, scenes[:_FEW]),
        "size_effect": _size_effect(base, scenes[:_FEW]),
        "crop_effect": micro.crop_effect(base, scenes[:_FEW], sample),
        "wrong_numbers_cost": micro.costs(base, _PAIRED),
    }
    (folder / "measurements.json").write_text(json.dumps(numbers, indent=1) + "\n")
    sheet(base).save(folder / "samples.png")
    recipe = json.loads((folder / "recipe.json").read_text())
    (folder / "README.md").write_text(card.text(numbers, recipe, SHEET_PROMPTS))


def unseen(num: int) -> list[shapes.Scene]:
    """Returns test scenes of one shape whose captions are not among the training captions."""
    seen = {Corpus.caption_of_scene(i) for i in range(_SEEN)}
    found, index = [], shapes.TEST_START
    while len(found) < num:
        scene = shapes.sample_scene(_SEED, index, max_shapes=1)
        if scene.caption not in seen:
            found.append(scene)
        index += 1
    return found


@torch.inference_mode()
def sample(base: StableDiffusionXLPipeline, prompts: Sequence[str], **options: Any) -> list[np.ndarray]:
    """Returns a picture for each prompt, (H,W,3) uint8. The noise of prompt i has seed i, whatever the options."""
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "np", **options}
    images: list[np.ndarray] = []
    for start in range(0, len(prompts), _BATCH):
        part = list(prompts[start : start + _BATCH])
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        result: Any = base(part, height=pictures.NATIVE, width=pictures.NATIVE, generator=generators, **settings)
        images += [np.rint(image * 255).astype(np.uint8) for image in result.images]
    return images


def follow_numbers(images: Sequence[np.ndarray], scenes: Sequence[shapes.Scene]) -> dict[str, float]:
    """Returns the colour differences to the prompts (median, upper quartile) and the share of correct shapes."""
    contents = [judge(image) for image in images]
    object_error = _differences([c.color for c in contents], [s.shapes[0].color for s in scenes])
    ground_error = _differences([c.background for c in contents], [s.background.color for s in scenes])
    return {
        "object_ciede2000": float(np.median(object_error)),
        "object_ciede2000_q75": float(np.quantile(object_error, 0.75)),
        "background_ciede2000": float(np.median(ground_error)),
        "background_ciede2000_q75": float(np.quantile(ground_error, 0.75)),
        "right_shape": float(np.mean([c.kind == s.shapes[0].kind for c, s in zip(contents, scenes, strict=True)])),
        "num": len(images),
    }


def _differences(found: Sequence[np.ndarray], names: Sequence[str]) -> np.ndarray:
    return ciede2000(srgb_to_lab(np.stack(found)), srgb_to_lab([shapes.COLORS[name] for name in names]))


def _only(images: Sequence[np.ndarray], scenes: Sequence[shapes.Scene], patterned: bool) -> dict[str, float]:
    chosen = [i for i, scene in enumerate(scenes) if (scene.background.pattern != "plain") == patterned]
    return follow_numbers([images[i] for i in chosen], [scenes[i] for i in chosen])


def _vae_numbers(base: StableDiffusionXLPipeline) -> dict[str, float]:
    """Returns the PSNR over 256 unseen scenes of one to three shapes, also by background."""
    scenes = [shapes.sample_scene(_SEED, shapes.TEST_START + i) for i in range(256)]
    images = np.stack([np.asarray(shapes.render(s, pictures.NATIVE)) for s in scenes])
    values = np.concatenate([vae.psnr(base.vae, images[i : i + _BATCH]) for i in range(0, len(images), _BATCH)])
    plain = np.asarray([s.background.pattern == "plain" for s in scenes])
    return {
        "psnr_mean": float(values.mean()),
        "psnr_plain_mean": float(values[plain].mean()),
        "psnr_patterned_mean": float(values[~plain].mean()),
    }


def _guidance_effect(base: StableDiffusionXLPipeline, scenes: Sequence[shapes.Scene]) -> dict[str, dict[str, float]]:
    """Returns the numbers at three guidance scales, with equal prompts and noise. Scale 1 is without guidance."""
    prompts = [scene.caption for scene in scenes]
    return {
        str(scale): follow_numbers(sample(base, prompts, guidance_scale=scale), scenes)
        for scale in (1.0, GUIDANCE, 6.0)
    }


def _size_effect(base: StableDiffusionXLPipeline, scenes: Sequence[shapes.Scene]) -> dict[str, float]:
    """Returns the mean sharpness by `original_size`: a small original should look blurred."""

    def sharpness(original: int) -> float:
        images = sample(base, [scene.caption for scene in scenes], original_size=(original, original))
        return float(np.mean([_sharpness(image) for image in images]))

    return {str(original): sharpness(original) for original in (24, 64, pictures.NATIVE)}


def _sharpness(image: np.ndarray) -> float:
    """Returns the 99th percentile of the differences between neighbouring pixels, 0 to 255."""
    values = image.astype(np.float32)
    return float(np.quantile(np.abs(np.diff(values, axis=1)).max(axis=-1), 0.99))


SHEET_PROMPTS = (
    "red circle with blue background",
    "pale golden rod circle with old lace background",
    "cyan circle with brown floral background",
    "a hot pink heart on a navy background",
    "gold star with dark slate blue striped background",
    "a lime green triangle in front of a white dotted background",
    "an orange cross on a teal background",
    "a white ring over a dark red background",
    "a red circle in front of a blue square on a yellow background",
    "a large purple diamond at the top left on a light pink background",
    "a green square behind a yellow star, black background",
    "a small orange red circle at the bottom right on a sky blue background",
    "flat emoji of a red apple on a white background",
    "flat emoji of a cat face on a white background",
    "flat emoji of a blue heart on a white background",
    "flat emoji of a tangerine on a light blue background",
)


def sheet(base: StableDiffusionXLPipeline) -> Image.Image:
    """Returns the sheet of samples: four for each prompt, two prompts side by side."""
    each, side = 4, pictures.NATIVE
    prompts = [prompt for prompt in SHEET_PROMPTS for _ in range(each)]
    images = sample(base, prompts)
    canvas = Image.new("RGB", (2 * each * side, len(SHEET_PROMPTS) // 2 * side))
    for i, image in enumerate(images):
        prompt, column = divmod(i, each)
        canvas.paste(Image.fromarray(image), (((prompt % 2) * each + column) * side, prompt // 2 * side))
    return canvas


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
