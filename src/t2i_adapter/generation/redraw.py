"""Pictures that begin from a picture (img2img), or of which a mask's part is generated anew (inpainting).

The sampling begins late: the picture's latents x0 get the noise of a later step, and only the steps after it are made.
With a mask m (1 is generated anew) each step ends with x <- m x + (1 - m) x', where x' is x0 with the noise of the next
step. So the base sees, at every noise level, what stays. At the end the pixels outside the mask become the
picture's own.

`Tail` does this as a scheduler around the pipeline's own, so every pipeline of diffusers can be called as it is.

Letters: B pictures; H, W in pixels; h, w = H/8, W/8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from t2i_adapter.errors import UserError
from t2i_adapter.models.encoders import LatentScale

DEFAULT_STRENGTH = 0.6
"""Strength without a mask."""
DEFAULT_BLUR = 4
"""Radius in pixels of the soft border inside a mask."""


@dataclass(frozen=True)
class InitImage:
    """Where a picture begins.

    Attributes:
        picture: RGB, of the size of the pictures to generate.
        mask: grey, of the same size: white is generated anew, black stays. None is white everywhere.
    """

    picture: Image.Image
    mask: Image.Image | None = None


@dataclass(frozen=True)
class Redraw:
    """How pictures begin from other pictures.

    Attributes:
        inits: one for each picture.
        strength: share of the steps that are made, 0 to 1. 0 is the picture itself, decoded from its latents; 1 begins
            from noise alone, as without a picture.
        mask_blur: radius in pixels of the soft border inside the masks; 0 is a hard one.
    """

    inits: Sequence[InitImage]
    strength: float = DEFAULT_STRENGTH
    mask_blur: int = DEFAULT_BLUR

    def part(self, part: slice) -> Redraw:
        """Returns that of some of the pictures."""
        return replace(self, inits=self.inits[part])

    def steps(self, steps: int) -> int:
        """Returns how many of `steps` steps are made: at least one unless the strength is 0."""
        return min(steps, max(1, round(self.strength * steps))) if self.strength > 0 else 0

    @property
    def has_masks(self) -> bool:
        return any(init.mask is not None for init in self.inits)

    def latent_mask(self, like: Tensor) -> Tensor:
        """Returns (B,1,h,w) in [0,1] for latents (B,4,h,w): a cell counts as its whitest pixel."""
        masks = [
            np.ones((1, 1), np.float32) if init.mask is None else np.asarray(init.mask, np.float32) / 255
            for init in self.inits
        ]
        pooled = [
            torch.nn.functional.adaptive_max_pool2d(torch.from_numpy(m)[None, None], like.shape[2:]) for m in masks
        ]
        return torch.cat(pooled).to(like)

    def finish(self, pictures: Sequence[Image.Image]) -> list[Image.Image]:
        """Puts the pixels that a mask keeps back into the generated pictures.

        Where the mask is black, the result is the picture to the byte. The border is soft on its white side only.
        """
        return [
            picture if init.mask is None else Image.composite(picture, init.picture, soften(init.mask, self.mask_blur))
            for picture, init in zip(pictures, self.inits, strict=True)
        ]


def soften(mask: Image.Image, radius: int) -> Image.Image:
    """Returns the mask with a border that rises over about `radius` pixels inside its white part; black stays black."""
    if not radius:
        return mask
    support = Image.fromarray(np.where(np.asarray(mask) > 0, 255, 0).astype(np.uint8))
    blurred = np.asarray(support.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255
    # A straight border has half of the blurred weight.
    weight = np.clip(2 * blurred - 1, 0, 1) * np.asarray(mask, np.float32)
    return Image.fromarray(weight.round().astype(np.uint8))


@torch.no_grad()
def encode_pictures(pipeline: Any, pictures: Sequence[Image.Image]) -> Tensor:
    """Returns the UNet's latents of RGB pictures (B,4,h,w) in the VAE's precision: their moments' means, scaled.

    They are encoded one by one, so memory does not grow with the batch.
    """
    vae, moments = pipeline.vae, []
    for picture in pictures:
        pixels = torch.from_numpy(np.array(picture, np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
        mean = vae.encode(pixels.to(pipeline._execution_device, vae.dtype)).latent_dist.mean
        moments.append(torch.cat([mean, torch.zeros_like(mean)], dim=1))
    stacked = torch.cat(moments)
    return LatentScale.of(dict(vae.config)).sample(stacked, torch.zeros_like(stacked.chunk(2, dim=1)[0]))


class Tail:
    """The last steps of a scheduler, as a scheduler; with a mask it keeps the latents outside of it.

    The pipeline is called with `made` steps and with `start()` as its latents.
    """

    init_noise_sigma = 1.0
    """The pipeline multiplies the latents that it is given by this number."""

    def __init__(
        self, scheduler: Any, steps: int, made: int, known: Tensor, noise: Tensor, mask: Tensor | None
    ) -> None:
        """known, noise: (B,4,h,w), the pictures' latents and standard normal noise. mask: (B,1,h,w), 1 is generated."""
        if type(scheduler).__name__ == "PNDMScheduler":
            raise UserError(
                "pndm: makes its second step twice, so it cannot begin later; use another, for example euler or ddim.",
                option="scheduler",
            )
        self.scheduler, self.steps, self.made = scheduler, steps, made
        self.known, self.noise, self.mask = known, noise, mask
        self.set_timesteps(made)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scheduler, name)

    @property
    def step(self) -> Any:
        """The scheduler's step, with its signature, which the pipeline reads."""

        @wraps(self.scheduler.step)
        def step(*arguments: Any, **named: Any) -> Any:
            latents, *others = self.scheduler.step(*arguments, **named)
            self.calls += 1
            is_last = self.calls == len(self.timesteps)
            if self.mask is not None and (is_last or self.calls % self.scheduler.order == 0):
                known = self.known if is_last else self._noisy()
                latents = torch.lerp(known.to(latents), latents, self.mask.to(latents))
            return (latents, *others)

        return step

    def set_timesteps(self, made: int, device: Any = None) -> None:
        """Prepares the last `made` of the steps."""
        assert made == self.made
        self.scheduler.set_timesteps(self.steps, device=device)
        begin = (self.steps - made) * self.scheduler.order
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(begin)
        self.timesteps = self.scheduler.timesteps[begin:]
        self.calls = 0

    def start(self) -> Tensor:
        """Returns the latents before the first step, (B,4,h,w)."""
        if self.made == self.steps:
            return self.noise * self.scheduler.init_noise_sigma
        return self._noisy()

    def _noisy(self) -> Tensor:
        """Returns the pictures' latents with the noise of the next call."""
        return self.scheduler.add_noise(
            self.known, self.noise, self.timesteps[self.calls : self.calls + 1].repeat(len(self.known))
        )
