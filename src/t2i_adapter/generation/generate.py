"""Generates pictures: the verb `generate`, evaluation and validation during training all use `generate_batches`.

Letters: N pictures, L text positions, D text width, P pooled width.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from t2i_adapter.devices import FittingParts
from t2i_adapter.generation.controlnet import Controlled
from t2i_adapter.generation.guidance import adapters_of, steer
from t2i_adapter.generation.options import SamplingOptions, Strength
from t2i_adapter.generation.redraw import Redraw, Tail, encode_pictures
from t2i_adapter.models.encoders import LatentScale, TextEncoder, count_tokens, text_beyond
from t2i_adapter.models.family import AdapterPipeline
from t2i_adapter.progress import Bar, progress_bar
from t2i_adapter.types import CHUNK_TOKENS, MaxTokens

Condition = Image.Image | Sequence[Image.Image]
"""A picture's condition: one picture or, with several adapters, one for each."""

_BATCH_PIXELS = 512 * 512  # 16 pictures of `nano`: on a CPU larger batches are no faster
_BATCH_PROMPTS = 64  # prompts that are encoded at a time, for memory
_REMEDY = "use smaller pictures, `--offload` of generate and evaluate, or a device with more memory"


@dataclass(frozen=True)
class TextStates:
    """Prompts and negative prompts as the UNet takes them.

    The negative ones are None without guidance.

    states, negative_states: (N,L,D); pooled, negative_pooled: (N,P), P = 0 for a pipeline that takes no pooled vector.
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
        states = {
            "prompt_embeds": self.states[part],
            "negative_prompt_embeds": None if negative is None else negative[part],
        }
        if not self.pooled.shape[-1]:
            return states
        return {
            **states,
            "pooled_prompt_embeds": self.pooled[part],
            "negative_pooled_prompt_embeds": None if negative_pooled is None else negative_pooled[part],
        }


@torch.no_grad()
def encode_prompts(
    pipeline: AdapterPipeline,
    prompts: Sequence[str],
    *,
    guidance: float,
    negative: str | None = None,
    max_tokens: MaxTokens = CHUNK_TOKENS,
    is_quiet: bool = False,
) -> TextStates:
    """N prompts -> their states, as training encodes captions. Prints a line if prompts are cut off at `max_tokens`,
    unless it `is_quiet`.

    `negative` None stands for what the base was trained with: zeros, or "".
    """
    parts: Any = pipeline
    encoder = TextEncoder.of(parts)
    if not is_quiet:
        warn_of_long_prompts(pipeline, prompts, max_tokens, negative)
    states, pooled = _encode(encoder, prompts, max_tokens)
    if guidance <= 1:
        return TextStates(states, pooled, None, None)
    if negative is None and parts.config.get("force_zeros_for_empty_prompt"):
        return TextStates(states, pooled, torch.zeros_like(states), torch.zeros_like(pooled))
    return TextStates(states, pooled, *_encode(encoder, [negative or ""] * len(prompts), max_tokens))


def warn_of_long_prompts(
    pipeline: AdapterPipeline, prompts: Sequence[str], max_tokens: int, negative: str | None = None
) -> None:
    """Prints a line on stderr if prompts are cut off at `max_tokens`."""
    parts: Any = pipeline
    for name, texts in (("prompt", prompts), ("negative prompt", [negative or ""])):
        if line := _long_prompts(parts.tokenizer, name, texts, max_tokens):
            print(line, file=sys.stderr, flush=True)


def _encode(encoder: TextEncoder, prompts: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """As `TextEncoder.encode`, in batches."""
    starts = range(0, len(prompts), _BATCH_PROMPTS)
    batches = [encoder.encode(prompts[start : start + _BATCH_PROMPTS], max_tokens) for start in starts]
    states, pooled = zip(*batches, strict=True)
    return torch.cat(states), torch.cat(pooled)


def _long_prompts(tokenizer: Any, name: str, prompts: Sequence[str], max_tokens: int) -> str | None:
    """Returns the line about prompts that are cut off, None if there are none."""
    tokens = {prompt: count_tokens(tokenizer, prompt) for prompt in prompts}
    long = [prompt for prompt, count in tokens.items() if count > max_tokens]
    if not long:
        return None
    longest = max(long, key=tokens.__getitem__)
    more = next((limit for limit in get_args(MaxTokens) if limit >= tokens[longest]), max(get_args(MaxTokens)))
    advice = (
        f" --max_tokens {more} reads {'all' if more >= tokens[longest] else 'more'} of it." if more > max_tokens else ""
    )
    rest = json.dumps(text_beyond(tokenizer, longest, max_tokens)[:60], ensure_ascii=False)
    which = f"The {name}" if len(tokens) == 1 else f"{len(long):,} of {len(tokens):,} {name}s are cut off; the longest"
    return (
        f"{which} has {tokens[longest]} tokens, of which {max_tokens} are read. What is cut off begins with {rest}."
        f"{advice}"
    )


def generate(
    pipeline: AdapterPipeline,
    prompts: Sequence[str] | TextStates,
    conditions: Sequence[Condition] | None,
    seeds: Sequence[int],
    *,
    size: tuple[int, int],
    sampling: SamplingOptions,
    strengths: Sequence[Strength] | None = None,
    redraw: Redraw | None = None,
    controlled: Controlled | None = None,
    negative: str | None = None,
    max_tokens: MaxTokens = CHUNK_TOKENS,
    progress: str | None = None,
) -> list[Image.Image]:
    """Generates N pictures, one for each prompt, condition and seed. Arguments as of `generate_batches`.

    negative, max_tokens: as in `encode_prompts`, for prompts only; states include them.
    """
    if not isinstance(prompts, TextStates):
        guidance = sampling.guidance
        prompts = encode_prompts(pipeline, prompts, guidance=guidance, negative=negative, max_tokens=max_tokens)
    batches = generate_batches(
        pipeline,
        prompts,
        conditions,
        seeds,
        size=size,
        sampling=sampling,
        strengths=strengths,
        redraw=redraw,
        controlled=controlled,
        progress=progress,
    )
    return [picture for batch in batches for picture in batch]


def batch_length(size: tuple[int, int], sampling: SamplingOptions) -> int:
    """Pictures of `size` (height, width) that are generated at a time."""
    return sampling.batch_size or max(1, _BATCH_PIXELS // (size[0] * size[1]))


def generate_batches(
    pipeline: AdapterPipeline,
    texts: TextStates,
    conditions: Sequence[Condition] | None,
    seeds: Sequence[int],
    *,
    size: tuple[int, int],
    sampling: SamplingOptions,
    strengths: Sequence[Strength] | None = None,
    redraw: Redraw | None = None,
    controlled: Controlled | None = None,
    progress: str | None = None,
) -> Iterator[list[Image.Image]]:
    """Generates N pictures, one for each text, condition and seed, and yields each batch when it is finished.

    Each picture's noise depends on its own seed only and is made on the CPU. A picture is therefore the same in any
    batch, up to rounding: larger matrices are summed in another order.

    Args:
        texts: the states of N prompts.
        conditions: N pictures of `size`, of any mode; None generates with the base alone, exactly as
            its family's plain pipeline does. With several adapters (a pipeline with a MultiAdapter) each is a sequence
            of one picture an adapter.
        size: (height, width) in pixels, multiples of what the adapter takes.
        strengths: how strongly each adapter acts, and when; None takes the values of `sampling` for each.
        redraw: N pictures to begin from, of `size`, and their masks; None begins from noise.
        controlled: a ControlNet that acts beside the adapters, with N pictures of `size`.
        progress: title of a progress bar over all denoising steps; None shows none.

    If memory runs out, a batch is generated again in smaller ones. Raises UserError if there is too little for a single
    picture, and if the base cannot do what `sampling` asks for.
    """
    assert len(texts) == len(seeds) and (conditions is None or len(conditions) == len(seeds))
    assert redraw is None or len(redraw.inits) == len(seeds)
    strengths = strengths or [sampling.strength] * len(adapters_of(pipeline))
    parts: FittingParts[list[Image.Image]] = FittingParts("pictures", _REMEDY)
    made = sampling.steps if redraw is None else redraw.steps(sampling.steps)
    total, is_shown = len(seeds) * made, progress is not None
    with progress_bar(progress or "", total, "step", is_reported=is_shown) as bar:

        def one_batch(start: int, stop: int) -> list[Image.Image]:
            part = slice(start, stop)
            bar.update(start * made - bar.n)  # goes back after an attempt for which memory ran out
            chosen = None if conditions is None else conditions[part]
            text = texts.arguments(part)
            begin = None if redraw is None else redraw.part(part)
            beside = nullcontext() if controlled is None else controlled.part(part).on(pipeline.unet)
            with beside:
                latents = _sample_latents(pipeline, text, chosen, seeds[part], size, sampling, strengths, begin, bar)
            pictures = _decode(pipeline, latents)
            return pictures if begin is None else begin.finish(pictures)

        yield from parts(one_batch, len(seeds), batch_length(size, sampling), pipeline._execution_device)
    pipeline.maybe_free_model_hooks()


def _sample_latents(
    pipeline: AdapterPipeline,
    text: dict[str, Any],
    conditions: Sequence[Condition] | None,
    seeds: Sequence[int],
    size: tuple[int, int],
    sampling: SamplingOptions,
    strengths: Sequence[Strength],
    redraw: Redraw | None,
    bar: Bar,
) -> Tensor:
    """Returns one batch of the UNet's latents, (B,4,h,w). `bar` advances by B at each step."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    made = sampling.steps if redraw is None else redraw.steps(sampling.steps)
    if redraw is None or (made == sampling.steps and not redraw.has_masks):
        return _call(pipeline, text, conditions, generators, size, sampling, strengths, None, bar)
    known = encode_pictures(pipeline, [init.picture for init in redraw.inits])
    if made == 0:
        return known
    known = known.to(text["prompt_embeds"].dtype)
    noise = randn_tensor(known.shape, generator=generators, device=known.device, dtype=known.dtype)
    mask = redraw.latent_mask(known) if redraw.has_masks else None
    tail = Tail(pipeline.scheduler, sampling.steps, made, known, noise, mask)
    with _using(pipeline, tail):
        sampling = replace(sampling, steps=made)
        return _call(pipeline, text, conditions, generators, size, sampling, strengths, tail.start(), bar)


@contextmanager
def _using(pipeline: AdapterPipeline, scheduler: Any) -> Iterator[None]:
    """Puts another scheduler into the pipeline while it is open."""
    own = pipeline.scheduler
    pipeline.scheduler = scheduler
    try:
        yield
    finally:
        pipeline.scheduler = own


def _call(
    pipeline: AdapterPipeline,
    text: dict[str, Any],
    conditions: Sequence[Condition] | None,
    generators: list[torch.Generator],
    size: tuple[int, int],
    sampling: SamplingOptions,
    strengths: Sequence[Strength],
    latents: Tensor | None,
    bar: Bar,
) -> Tensor:
    """Calls the pipeline, the only call of it. latents: (B,4,h,w) before the first step; None is noise."""
    adapters = adapters_of(pipeline)
    assert len(strengths) == len(adapters)
    height, width = size
    if conditions is None:
        # The pipeline needs a picture even if the adapter acts in no step.
        conditions = [[Image.new("RGB", (width, height))] * len(adapters)] * len(generators)
        strengths = [Strength(end=0.0)] * len(adapters)
    columns = list(zip(*map(_condition_row, conditions), strict=True))
    assert len(columns) == len(adapters)
    assert all(picture.size == (width, height) for column in columns for picture in column)
    images: list[Any] = [
        [picture.convert("L" if adapter.config.in_channels == 1 else "RGB") for picture in column]
        for adapter, column in zip(adapters, columns, strict=True)
    ]
    scales = [strength.scale for strength in strengths]
    is_single = len(adapters) == 1
    with steer(pipeline, sampling, strengths) as end:
        output: Any = pipeline(
            image=images[0] if is_single else images,
            height=height,
            width=width,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            generator=generators,
            latents=latents,
            adapter_conditioning_scale=scales[0] if is_single else scales,
            output_type="latent",
            callback=lambda *_: bar.update(len(generators)),  # pyright: ignore[reportArgumentType]
            **end,
            **text,
        )
    return output.images


def _condition_row(condition: Condition) -> Sequence[Image.Image]:
    """Returns the pictures of a picture's condition, one an adapter."""
    return [condition] if isinstance(condition, Image.Image) else condition


@torch.no_grad()
def _decode(pipeline: AdapterPipeline, latents: Tensor) -> list[Image.Image]:
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
