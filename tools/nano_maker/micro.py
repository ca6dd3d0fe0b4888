"""Whether the base has learned SDXL's size and crop numbers (SDXL report, 2.2).

Twice: in denoising, where a picture is denoised with its own numbers and with wrong ones, all else equal; and in
pictures, beside what the generator's own pictures would show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline

from nano_maker import judge, pictures
from nano_maker.text import TextModels
from nano_maker.unet import noise_levels
from nano_maker.vae import to_tensor
from t2i_adapter.data import shapes

_SEED = 0  # scenes of make-data, which were not trained on
_BATCH = 32
_SMALL = 64  # pixels: below this, a picture is visibly blurred
NEAR_CORNER, FAR_CORNER = (24, 4), (24, 48)  # (top, left) of two cuts, in pixels
_REACH = 8  # pixels around them that count as the same corner


def costs(base: StableDiffusionXLPipeline, num: int) -> dict[str, dict[str, float]]:
    """How much larger the error of the denoised latent gets, in percent with its 95 % interval, when `num` unseen
    pictures are denoised with another picture's crop (at high noise, where the layout is decided), or as if they had
    been of native size though they were small (at low noise, where edges are)."""
    return {
        "crop": _cost(base, num, _is_cut, _exchange_crops, (700, 1000)),
        "size": _cost(base, num, _is_small, _claim_native_size, (20, 300)),
    }


def _is_cut(view: pictures.View) -> bool:
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
    wanted: Callable[[pictures.View], bool],
    spoil: Callable[[torch.Tensor], torch.Tensor],
    timesteps: tuple[int, int],
) -> dict[str, float]:
    rng = np.random.default_rng(_SEED)
    views = _views(rng, wanted)
    text = TextModels((base.tokenizer, base.tokenizer_2), base.text_encoder, base.text_encoder_2)
    right, wrong = [], []
    for start in range(0, num, _BATCH):
        scenes = [shapes.sample_scene(_SEED, shapes.TEST_START + start + i) for i in range(_BATCH)]
        seen = [next(views) for _ in scenes]
        images = [pictures.scene_picture(s, v, pictures.NATIVE) for s, v in zip(scenes, seen, strict=True)]
        latents = base.vae.encode(to_tensor(np.stack(images))).latent_dist.mean * base.vae.config["scaling_factor"]
        states, pooled = text.encode([scene.caption for scene in scenes])
        ids = torch.tensor([view.time_ids(pictures.NATIVE) for view in seen], dtype=torch.float32)
        t = torch.from_numpy(rng.integers(*timesteps, size=_BATCH))
        noise = torch.from_numpy(rng.standard_normal(latents.shape, np.float32))
        sigma = noise_levels()[t].view(-1, 1, 1, 1)
        noisy = (latents + sigma * noise) / (1 + sigma**2).sqrt()
        for given, errors in ((ids, right), (spoil(ids), wrong)):
            conditions = {"text_embeds": pooled, "time_ids": given}
            predicted = base.unet(noisy, t, states, added_cond_kwargs=conditions).sample
            # x0 = sqrt(1 + sigma^2) x - sigma e, so this is the error of the denoised latent
            errors += (sigma * (predicted - noise)).square().mean(dim=(1, 2, 3)).tolist()
    percent = 100 * (np.array(wrong) - np.array(right)) / np.mean(right)
    half = 1.96 * percent.std(ddof=1) / len(percent) ** 0.5
    return {"percent": percent.mean(), "low": percent.mean() - half, "high": percent.mean() + half, "num": len(right)}


def _views(rng: np.random.Generator, wanted: Callable[[pictures.View], bool]) -> Iterator[pictures.View]:
    """Views of the training distribution that are wanted, without end."""
    while True:
        view = pictures.sample_view(rng, pictures.NATIVE)
        if wanted(view):
            yield view


def crop_effect(
    base: StableDiffusionXLPipeline, asked: list[shapes.Scene], sample: Callable[..., Any]
) -> dict[str, Any]:
    """Where the object's centre lies, in pixels from the left, when the cut's corner is claimed to be at NEAR_CORNER
    and at FAR_CORNER: in the base's pictures and in the generator's."""
    prompts = [scene.caption for scene in asked]
    corners = {"near": NEAR_CORNER, "far": FAR_CORNER}
    return {
        "corner": {n: c[1] for n, c in corners.items()},
        "base": {n: _centre(sample(base, prompts, crops_coords_top_left=c)) for n, c in corners.items()},
        "true": {n: _centre(_true_cuts(asked, c)) for n, c in corners.items()},
    }


def _true_cuts(scenes: list[shapes.Scene], corner: tuple[int, int], each: int = 4) -> list[np.ndarray]:
    def is_there(view: pictures.View) -> bool:
        return _is_cut(view) and max(abs(view.top - corner[0]), abs(view.left - corner[1])) <= _REACH

    views = _views(np.random.default_rng(_SEED), is_there)
    return [pictures.scene_picture(scene, next(views), pictures.NATIVE) for scene in scenes for _ in range(each)]


def _centre(images: list[np.ndarray]) -> float:
    masks = [mask for mask in (judge.look_at(image).mask for image in images) if mask.any()]
    return float(np.mean([np.argwhere(mask)[:, 1].mean() for mask in masks]))
