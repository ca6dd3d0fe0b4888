"""Generates pictures: the verb `generate`, evaluation and validation during training all call `generate`.

Letters: N pictures, L = 77 tokens, D text width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionXLAdapterPipeline
from PIL import Image
from torch import Tensor

from t2i_adapter.generation.options import SamplingOptions
from t2i_adapter.models.encoders import LatentScale

_BATCH_PIXELS = 512 * 512  # 16 pictures of `nano`: on a CPU larger batches are no faster


@dataclass(frozen=True)
class TextStates:
    """Prompts and negative prompts as the UNet takes them.

    The negative ones may be None: they are not needed without guidance, and diffusers then uses zeros as SDXL does.

    states, negative_states: (N,L,D); pooled, negative_pooled: (N,P).
    """

    states: Tensor
    pooled: Tensor
    negative_states: Tensor | None
    negative_pooled: Tensor | None

    def __len__(self) -> int:
        return len(self.states)

    def arguments(self, part: slice) -> dict[str, Tensor | None]:
        """Returns the pipeline's arguments for some of the pictures."""
        negative, negative_pooled = self.negative_states, self.negative_pooled
        return {
            "prompt_embeds": self.states[part],
            "pooled_prompt_embeds": self.pooled[part],
            "negative_prompt_embeds": None if negative is None else negative[part],
            "negative_pooled_prompt_embeds": None if negative_pooled is None else negative_pooled[part],
        }


@torch.no_grad()
def encode_prompts(
    pipeline: StableDiffusionXLAdapterPipeline, prompts: Sequence[str], *, guidance: float, negative: str | None = None
) -> TextStates:
    """N prompts -> their states. `negative` None stands for what the base was trained with: zeros, or ""."""
    encoded: Any = pipeline.encode_prompt(  # takes a list too, although its signature has str only
        list(prompts),  # pyright: ignore[reportArgumentType]
        do_classifier_free_guidance=guidance > 1,
        negative_prompt=negative,
    )
    states, negative_states, pooled, negative_pooled = encoded
    return TextStates(states, pooled, negative_states, negative_pooled)


def generate(
    pipeline: StableDiffusionXLAdapterPipeline,
    prompts: Sequence[str] | TextStates,
    conditions: Sequence[Image.Image] | None,
    seeds: Sequence[int],
    *,
    size: tuple[int, int],
    sampling: SamplingOptions,
    negative: str | None = None,
) -> list[Image.Image]:
    """Generates N pictures, one for each prompt, condition and seed.

    Each picture's noise depends on its own seed only and is made on the CPU. A picture is therefore the same in any
    batch, up to rounding: larger matrices are summed in another order.

    Args:
        prompts: N prompts, or their states (for a pipeline without text encoders).
        conditions: N pictures of `size`, of any mode; None generates with the base alone, exactly as
            StableDiffusionXLPipeline does.
        size: (height, width) in pixels, multiples of what the adapter takes.
        negative: the negative prompt, for prompts only; states include it.
    """
    assert len(prompts) == len(seeds) and (conditions is None or len(conditions) == len(seeds))
    if not isinstance(prompts, TextStates):
        prompts = encode_prompts(pipeline, prompts, guidance=sampling.guidance, negative=negative)
    batch = sampling.batch_size or max(1, _BATCH_PIXELS // (size[0] * size[1]))
    pictures: list[Image.Image] = []
    for start in range(0, len(seeds), batch):
        part = slice(start, start + batch)
        chosen = None if conditions is None else conditions[part]
        latents = _sample_latents(pipeline, prompts.arguments(part), chosen, seeds[part], size, sampling)
        pictures.extend(_decode(pipeline, latents))
    pipeline.maybe_free_model_hooks()
    return pictures


def _sample_latents(
    pipeline: StableDiffusionXLAdapterPipeline,
    text: dict[str, Any],
    conditions: Sequence[Image.Image] | None,
    seeds: Sequence[int],
    size: tuple[int, int],
    sampling: SamplingOptions,
) -> Tensor:
    """Returns one batch of the UNet's latents, (B,4,h,w)."""
    mode = "L" if pipeline.adapter.config.in_channels == 1 else "RGB"
    height, width = size
    if conditions is None:
        # The pipeline needs a picture even if the adapter acts in no step.
        conditions, factor = [Image.new(mode, (width, height))] * len(seeds), 0.0
    else:
        factor = sampling.condition_factor
    assert all(condition.size == (width, height) for condition in conditions)
    output: Any = pipeline(
        image=[condition.convert(mode) for condition in conditions],
        height=height,
        width=width,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        adapter_conditioning_scale=sampling.scale,
        adapter_conditioning_factor=factor,
        output_type="latent",
        **text,
    )
    return output.images


@torch.no_grad()
def _decode(pipeline: StableDiffusionXLAdapterPipeline, latents: Tensor) -> list[Image.Image]:
    """Decodes the latents one by one, so memory does not grow with the batch.

    It runs in the VAE's own precision, which `Base.pipeline` keeps at float32; diffusers' decoding would cast it.
    """
    vae = pipeline.vae
    scale = LatentScale.of(dict(vae.config))
    factors, shift = (latents.new_tensor(v, dtype=vae.dtype).view(1, -1, 1, 1) for v in (scale.scale, scale.shift))
    pictures = []
    for latent in (latents.to(vae.dtype) / factors + shift).split(1):
        pixels = vae.decode(latent, return_dict=False)[0]
        images: Any = pipeline.image_processor.postprocess(pixels, output_type="pil")
        pictures.extend(images)
    return pictures
