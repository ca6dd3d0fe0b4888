"""Measures whether the base uses SDXL's size and crop conditioning, the time ids (SDXL report, 2.2).

`costs` denoises pictures with their own time ids and with wrong ones. `crop_effect` generates pictures with two crop
corners, and compares them with pictures of the shapes' generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline

from nano_maker import pictures
from nano_maker.judge import judge
from nano_maker.text import TextModels
from nano_maker.unet import noise_levels
from nano_maker.vae import to_tensor
from t2i_adapter.data import shapes

_SEED = 0  # default seed of make-data; training used others
_BATCH = 32
_SMALL = 64  # pixels: a smaller original is visibly blurred
NEAR_CORNER, FAR_CORNER = (24, 4), (24, 48)  # (top, left) of two crops, in pixels
_TOLERANCE = 8  # pixels: a crop this close to a corner counts as one there


def costs(base: StableDiffusionXLPipeline, num: int) -> dict[str, dict[str, float]]:
    """Returns by how many percent wrong time ids increase the error of the denoised latent, with the 95 % interval.

    Measured on `num` unseen pictures: "crop" with another picture's crop, at high noise, where the layout is decided;
    "size" with the native size for small originals, at low noise, where edges are decided.
    """
    return {
        "crop": _cost(base, num, _is_cropped, _exchange_crops, (700, 1000)),
        "size": _cost(base, num, _is_small, _claim_native_size, (20, 300)),
    }


def _is_cropped(view: pictures.View) -> bool:
    return view.resized > pictures.NATIVE


def _is_small(view: pictures.View) -> bool:
    return view.original < _SMALL


def _exchange_crops(ids: torch.Tensor) -> torch.Tensor:
    wrong = ids.clone()
    wrong[:, 2:4] = ids[:, 2:4].roll(1, 0)
    return wrong


def _claim_native_size(ids: torch.Tensor) -> torch.Tensor:
    wrong = ids.clone()
    wrong[:, :2] = pictures.NATIVE
    return wrong


@torch.no_grad()
def _cost(
    base: StableDiffusionXLPipeline,
    num: int,
    accepts: Callable[[pictures.View], bool],
    corrupt: Callable[[torch.Tensor], torch.Tensor],
    timesteps: tuple[int, int],
) -> dict[str, float]:
    rng = np.random.default_rng(_SEED)
    views = _views(rng, accepts)
    text = TextModels((base.tokenizer, base.tokenizer_2), base.text_encoder, base.text_encoder_2)
    right, wrong = [], []
    for start in range(0, num, _BATCH):
        scenes = [shapes.sample_scene(_SEED, shapes.TEST_START + start + i) for i in range(_BATCH)]
        drawn = [next(views) for _ in scenes]
        images = [pictures.scene_picture(s, v, pictures.NATIVE) for s, v in zip(scenes, drawn, strict=True)]
        latents = base.vae.encode(to_tensor(np.stack(images))).latent_dist.mean * base.vae.config["scaling_factor"]
        states, pooled = text.encode([scene.caption for scene in scenes])
        ids = torch.tensor([view.time_ids(pictures.NATIVE) for view in drawn], dtype=torch.float32)
        t = torch.from_numpy(rng.integers(*timesteps, size=_BATCH))
        noise = torch.from_numpy(rng.standard_normal(latents.shape, np.float32))
        sigma = noise_levels()[t].view(-1, 1, 1, 1)
        noisy = (latents + sigma * noise) / (1 + sigma**2).sqrt()
        for time_ids, errors in ((ids, right), (corrupt(ids), wrong)):
            conditions = {"text_embeds": pooled, "time_ids": time_ids}
            predicted = base.unet(noisy, t, states, added_cond_kwargs=conditions).sample
            # x0 = sqrt(1 + sigma^2) x - sigma e, so this is the error of the denoised latent
            errors += (sigma * (predicted - noise)).square().mean(dim=(1, 2, 3)).tolist()
    percent = 100 * (np.array(wrong) - np.array(right)) / np.mean(right)
    half = 1.96 * percent.std(ddof=1) / len(percent) ** 0.5
    return {"percent": percent.mean(), "low": percent.mean() - half, "high": percent.mean() + half, "num": len(right)}


def _views(rng: np.random.Generator, accepts: Callable[[pictures.View], bool]) -> Iterator[pictures.View]:
    """Yields, without end, views of the training distribution that `accepts` accepts."""
    while True:
        view = pictures.sample_view(rng, pictures.NATIVE)
        if accepts(view):
            yield view


def crop_effect(
    base: StableDiffusionXLPipeline, scenes: list[shapes.Scene], sample: Callable[..., Any]
) -> dict[str, Any]:
    """Returns the mean distance of the object's centre from the left, in pixels, for crops at two corners.

    "base": pictures generated with the corner as `crops_coords_top_left`; "true": crops rendered at that corner.
    """
    prompts = [scene.caption for scene in scenes]
    corners = {"near": NEAR_CORNER, "far": FAR_CORNER}
    return {
        "corner": {n: c[1] for n, c in corners.items()},
        "base": {n: _centre(sample(base, prompts, crops_coords_top_left=c)) for n, c in corners.items()},
        "true": {n: _centre(_true_crops(scenes, c)) for n, c in corners.items()},
    }


def _true_crops(scenes: list[shapes.Scene], corner: tuple[int, int], each: int = 4) -> list[np.ndarray]:
    def is_there(view: pictures.View) -> bool:
        return _is_cropped(view) and max(abs(view.top - corner[0]), abs(view.left - corner[1])) <= _TOLERANCE

    views = _views(np.random.default_rng(_SEED), is_there)
    return [pictures.scene_picture(scene, next(views), pictures.NATIVE) for scene in scenes for _ in range(each)]


def _centre(images: list[np.ndarray]) -> float:
    masks = [mask for mask in (judge(image).mask for image in images) if mask.any()]
    return float(np.mean([np.argwhere(mask)[:, 1].mean() for mask in masks]))
