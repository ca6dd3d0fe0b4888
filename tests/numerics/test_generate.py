"""Generating: an adapter of weight 0 equals the plain pipeline, and a picture depends on its own seed only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image

from t2i_adapter.config.tree import AdapterOptions, BaseOptions
from t2i_adapter.generation.generate import encode_prompts, generate
from t2i_adapter.generation.options import SamplingOptions
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.open import open_base

SIZE = (64, 64)
PROMPTS = ["red circle with blue background", "cyan circle", "a white square on green"]
SEEDS = [3, 2**63 + 1, 7]
SAMPLING = SamplingOptions(steps=3, guidance=5.0)

# Larger matrices are summed in another order: about 1e-6 of a latent's size a step, which can move a pixel's value
# across a rounding border of 8 bits, so by one, in a few pixels.
ROUNDING = 1


@pytest.fixture(scope="module")
def pipeline(tiny_base: Path) -> Any:
    base = open_base(BaseOptions(name=str(tiny_base)))
    torch.manual_seed(0)
    return base.pipeline(build_adapter(AdapterOptions(), base.unet_config), "cpu", torch.float32)


@pytest.fixture(scope="module")
def conditions() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (3, *SIZE, 3), np.uint8)
    return [Image.fromarray(picture) for picture in noise]


def pixels(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in pictures]).astype(int)


def plain(tiny_base: Path, sampling: SamplingOptions, negative: str | None = None) -> np.ndarray:
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_base)
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        PROMPTS,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance,
        negative_prompt=None if negative is None else [negative] * len(PROMPTS),
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
    ).images
    return pixels(pictures)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_without_a_condition_it_equals_the_plain_pipeline(pipeline: Any, tiny_base: Path, guidance: float) -> None:
    sampling = SamplingOptions(steps=3, guidance=guidance)
    ours = pixels(generate(pipeline, PROMPTS, None, SEEDS, size=SIZE, sampling=sampling))
    assert abs(ours - plain(tiny_base, sampling)).max() <= ROUNDING  # we decode one by one, it decodes a batch
    assert (ours == plain(tiny_base, sampling)).mean() > 0.99


def test_scale_0_equals_no_adapter_and_scale_1_does_not(pipeline: Any, conditions: list[Image.Image]) -> None:
    def draw(given: list[Image.Image] | None, **changes: float) -> np.ndarray:
        return pixels(
            generate(pipeline, PROMPTS, given, SEEDS, size=SIZE, sampling=SamplingOptions(steps=3, **changes))  # type: ignore[arg-type]
        )

    without = draw(None)
    assert np.array_equal(draw(conditions, scale=0.0), without), "adding zeros changes no bit"
    assert np.array_equal(draw(conditions, condition_factor=0.0), without)
    assert (draw(conditions, scale=1.0) != without).mean() > 0.05
    # int(3 * 0.5) = 1 of 3 steps
    half = draw(conditions, condition_factor=0.5)
    assert (half != without).any()
    assert (half != draw(conditions)).any()


def test_a_picture_does_not_depend_on_its_batch(pipeline: Any, conditions: list[Image.Image]) -> None:
    together = pixels(generate(pipeline, PROMPTS, conditions, SEEDS, size=SIZE, sampling=SAMPLING))
    for i in (2, 0):  # another order, too
        alone = pixels(
            generate(
                pipeline, PROMPTS[i : i + 1], conditions[i : i + 1], SEEDS[i : i + 1], size=SIZE, sampling=SAMPLING
            )
        )
        assert abs(alone[0] - together[i]).max() <= ROUNDING
    in_twos = SamplingOptions(steps=3, guidance=5.0, batch_size=2)
    assert (
        abs(pixels(generate(pipeline, PROMPTS, conditions, SEEDS, size=SIZE, sampling=in_twos)) - together).max() <= 1
    )
    other_seed = pixels(generate(pipeline, PROMPTS, conditions, [3, 4, 7], size=SIZE, sampling=SAMPLING))
    assert abs(other_seed[1] - together[1]).max() > 10
    assert abs(other_seed[[0, 2]] - together[[0, 2]]).max() <= ROUNDING


def test_the_global_generator_is_not_used(pipeline: Any, conditions: list[Image.Image]) -> None:
    before = torch.get_rng_state()
    generate(pipeline, PROMPTS[:1], conditions[:1], SEEDS[:1], size=SIZE, sampling=SAMPLING)
    assert torch.equal(torch.get_rng_state(), before)


def test_prompts_may_be_given_as_states(pipeline: Any, tiny_base: Path, conditions: list[Image.Image]) -> None:
    from_words = generate(pipeline, PROMPTS, conditions, SEEDS, size=SIZE, sampling=SAMPLING, negative="red")
    states = encode_prompts(pipeline, PROMPTS, guidance=SAMPLING.guidance, negative="red")
    base = open_base(BaseOptions(name=str(tiny_base)))
    mute = base.pipeline(pipeline.adapter, "cpu", torch.float32, unet=pipeline.unet, with_text=False)
    from_states = generate(mute, states, conditions, SEEDS, size=SIZE, sampling=SAMPLING)
    assert np.array_equal(pixels(from_states), pixels(from_words))
    assert not np.array_equal(
        pixels(generate(pipeline, PROMPTS, conditions, SEEDS, size=SIZE, sampling=SAMPLING)), pixels(from_words)
    ), "the negative prompt counts"


def test_a_one_channel_adapter_gets_grey(tiny_base: Path, conditions: list[Image.Image]) -> None:
    base = open_base(BaseOptions(name=str(tiny_base)))
    adapter = build_adapter(AdapterOptions(in_channels=1), base.unet_config)
    pipeline = base.pipeline(adapter, "cpu", torch.float32)
    colored = generate(pipeline, PROMPTS, conditions, SEEDS, size=SIZE, sampling=SAMPLING)
    grey = [condition.convert("L") for condition in conditions]
    assert np.array_equal(
        pixels(generate(pipeline, PROMPTS, grey, SEEDS, size=SIZE, sampling=SAMPLING)), pixels(colored)
    )


def test_the_vae_stays_in_float32(tiny_base: Path, conditions: list[Image.Image]) -> None:
    """SDXL's own VAE overflows in half precision: the UNet may be halved, the decoder is not."""
    base = open_base(BaseOptions(name=str(tiny_base)))
    torch.manual_seed(0)
    adapter = build_adapter(AdapterOptions(), base.unet_config)
    exact = pixels(
        generate(base.pipeline(adapter, "cpu", torch.float32), PROMPTS, conditions, SEEDS, size=SIZE, sampling=SAMPLING)
    )
    halved = base.pipeline(adapter, "cpu", torch.bfloat16)
    assert (halved.unet.dtype, halved.vae.dtype) == (torch.bfloat16, torch.float32)
    # bf16 has 8 bits: three steps of a random UNet stay within a tenth of the range on average.
    drawn = pixels(generate(halved, PROMPTS, conditions, SEEDS, size=SIZE, sampling=SAMPLING))
    assert 0 < abs(drawn - exact).mean() < 25
