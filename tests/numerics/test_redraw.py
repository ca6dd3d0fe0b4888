"""img2img and inpainting: their limits are exact, with every scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from PIL import Image

from t2i_adapter.config.tree import NANO, AdapterOptions, BaseOptions
from t2i_adapter.errors import UserError
from t2i_adapter.generation.generate import generate
from t2i_adapter.generation.options import SamplingOptions
from t2i_adapter.generation.redraw import InitImage, Redraw, soften
from t2i_adapter.generation.schedulers import SAMPLERS, make_scheduler
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.open import open_base

SIZE = (64, 64)
PROMPTS = ["red circle with blue background", "cyan circle"]
SEEDS = [3, 7]
STEPS = 5
WITHOUT_SCIPY = sorted(set(SAMPLERS) - {"lms"})


@pytest.fixture(scope="module")
def pipeline(tiny_base: Path) -> Any:
    base = open_base(BaseOptions(name=str(tiny_base)))
    torch.manual_seed(0)
    return base.pipeline(build_adapter(AdapterOptions(), base.unet_config), "cpu", torch.float32)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [Image.fromarray(picture) for picture in np.random.default_rng(1).integers(0, 256, (4, *SIZE, 3), np.uint8)]


def sample(pipeline: Any, pictures: list[Image.Image], redraw: Redraw | None, **changes: Any) -> np.ndarray:
    sampling = SamplingOptions(**{"steps": STEPS, "guidance": 3.0, **changes})
    drawn = generate(pipeline, PROMPTS, pictures[:2], SEEDS, size=SIZE, sampling=sampling, redraw=redraw)
    return np.stack([np.asarray(picture) for picture in drawn])


def redrawn(pictures: list[Image.Image], strength: float, *masks: Image.Image | None, blur: int = 4) -> Redraw:
    inits = [InitImage(pictures[2 + number], masks[number] if masks else None) for number in range(2)]
    return Redraw(inits, strength, blur)


def flat(level: int) -> Image.Image:
    return Image.new("L", SIZE, level)


def test_strength_0_is_what_the_vae_keeps(pipeline: Any, pictures: list[Image.Image]) -> None:
    vae, expected = pipeline.vae, []
    for picture in pictures[2:]:
        pixels = torch.from_numpy(np.array(picture, np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        expected.append(np.asarray(pipeline.image_processor.postprocess(decoded, output_type="pil")[0]))
    ours = sample(pipeline, pictures, redrawn(pictures, 0.0))
    assert abs(ours.astype(int) - np.stack(expected)).max() <= 1, "the scaling by 0.13025 and back rounds"


def test_strength_1_is_text_to_image_to_the_byte(pipeline: Any, pictures: list[Image.Image]) -> None:
    plain = sample(pipeline, pictures, None)
    assert np.array_equal(sample(pipeline, pictures, redrawn(pictures, 1.0)), plain)
    white = sample(pipeline, pictures, redrawn(pictures, 1.0, flat(255), flat(255)))
    assert np.array_equal(white, plain), "by the other path: noise that is made here, and a mask"


def test_between_them_it_is_diffusers_img2img(pipeline: Any, pictures: list[Image.Image]) -> None:
    """Without the adapter. Both encode the picture to its moments' mean and use the same noise."""
    parts: Any = {name: getattr(pipeline, name) for name in ("vae", "unet", "text_encoder", "text_encoder_2")}
    theirs: Any = StableDiffusionXLImg2ImgPipeline(
        **parts,
        tokenizer=pipeline.tokenizer,
        tokenizer_2=pipeline.tokenizer_2,
        scheduler=type(pipeline.scheduler).from_config(pipeline.scheduler.config),
        add_watermarker=False,
    )
    theirs.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(SEEDS[0])
    picture = pictures[2]
    pixels = torch.from_numpy(np.array(picture, np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
    expected = theirs(
        PROMPTS[0], image=latents, strength=0.6, num_inference_steps=STEPS, guidance_scale=3.0, generator=noise
    ).images[0]
    sampling = SamplingOptions(steps=STEPS, guidance=3.0)
    redraw = Redraw([InitImage(picture)], 0.6)
    ours = generate(pipeline, PROMPTS[:1], None, SEEDS[:1], size=SIZE, sampling=sampling, redraw=redraw)[0]
    assert abs(np.asarray(ours).astype(int) - np.asarray(expected)).max() <= 1
    text = generate(pipeline, PROMPTS[:1], None, SEEDS[:1], size=SIZE, sampling=sampling)[0]
    assert abs(np.asarray(ours).astype(int) - np.asarray(text)).max() > 20


def test_a_white_mask_is_img2img_and_a_black_one_the_picture(pipeline: Any, pictures: list[Image.Image]) -> None:
    plain = sample(pipeline, pictures, redrawn(pictures, 0.6))
    assert np.array_equal(sample(pipeline, pictures, redrawn(pictures, 0.6, flat(255), flat(255))), plain)
    mixed = sample(pipeline, pictures, redrawn(pictures, 0.6, flat(0), None))
    assert np.array_equal(mixed[0], np.asarray(pictures[2]))
    assert abs(mixed[1].astype(int) - plain[1]).max() <= 1


@pytest.mark.parametrize("blur", [0, 4])
def test_what_is_black_stays_to_the_byte(pipeline: Any, pictures: list[Image.Image], blur: int) -> None:
    half = Image.fromarray(np.where(np.arange(64) < 32, 0, 255).astype(np.uint8)[None].repeat(64, 0))
    drawn = sample(pipeline, pictures, redrawn(pictures, 1.0, half, half, blur=blur))
    originals = np.stack([np.asarray(picture) for picture in pictures[2:]])
    assert np.array_equal(drawn[:, :, :32], originals[:, :, :32])
    assert (drawn[:, :, 48:] != originals[:, :, 48:]).mean() > 0.9
    other = sample(pipeline, pictures[1::-1] + pictures[2:], redrawn(pictures, 1.0, half, half, blur=blur))
    assert (other[:, :, 48:] != drawn[:, :, 48:]).mean() > 0.05, "the adapter's condition acts inside the mask"


def test_the_base_sees_what_stays(pipeline: Any, pictures: list[Image.Image]) -> None:
    """Inside the mask a picture depends on what lies outside, although that is pasted only at the end."""
    half = Image.fromarray(np.where(np.arange(64) < 32, 0, 255).astype(np.uint8)[None].repeat(64, 0))
    first = sample(pipeline, pictures, redrawn(pictures, 1.0, half, half, blur=0))
    swapped = [*pictures[:2], *pictures[:1:-1]]
    second = sample(pipeline, swapped, redrawn(swapped, 1.0, half, half, blur=0))
    assert (first[:, :, 32:] != second[:, :, 32:]).mean() > 0.05


def test_a_soft_border_lies_inside_the_mask() -> None:
    half = Image.fromarray(np.where(np.arange(64) < 32, 0, 200).astype(np.uint8)[None].repeat(64, 0))
    row = np.asarray(soften(half, 4))[32].astype(int)
    assert not row[:32].any() and (np.diff(row[31:]) >= 0).all() and row[32] < 60 and (row[48:] == 200).all()
    assert np.array_equal(np.asarray(soften(half, 0)), np.asarray(half))
    for level in (0, 100, 255):
        assert np.array_equal(np.asarray(soften(flat(level), 4)), np.asarray(flat(level)))


# Schedulers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nano() -> Any:
    """A base that denoises, so a wrong noise level shows."""
    base = open_base(BaseOptions(name=NANO))
    torch.manual_seed(0)
    return base.pipeline(build_adapter(AdapterOptions(), base.unet_config), "cpu", torch.float32)


@pytest.fixture(scope="module")
def circle(nano: Any) -> Image.Image:
    """A picture that nano generated."""
    sampling = SamplingOptions(steps=15, guidance=3.0)
    return generate(nano, PROMPTS[:1], None, SEEDS[:1], size=SIZE, sampling=sampling)[0]


@pytest.mark.parametrize("name", [*WITHOUT_SCIPY, "dpmpp_2m_karras", "heun_karras"])
def test_every_scheduler_begins_later_and_keeps_what_is_black(nano: Any, circle: Image.Image, name: str) -> None:
    def draw(strength: float | None, mask: Image.Image | None = None) -> np.ndarray:
        sampling = SamplingOptions(steps=10, guidance=3.0)
        redraw = None if strength is None else Redraw([InitImage(circle, mask)], strength)
        drawn = generate(
            nano, ["white square with green background"], None, [11], size=SIZE, sampling=sampling, redraw=redraw
        )
        return np.asarray(drawn[0]).astype(int)

    half = Image.fromarray(np.where(np.arange(64) < 32, 0, 255).astype(np.uint8)[None].repeat(64, 0))
    own = nano.scheduler
    nano.scheduler = make_scheduler(name, own.config)
    try:
        if name == "pndm":
            with pytest.raises(UserError, match="--scheduler pndm: makes its second step twice"):
                draw(0.6)
            return
        nothing, plain, some = draw(0.0), draw(None), draw(0.6)
        near = draw(0.3)
        # The prompt is another one, so what is generated anew moves away from the picture by its noise.
        distances = [abs(drawn - nothing).mean() for drawn in (near, some, plain)]
        assert distances == sorted(distances) and distances[0] < 0.35 * distances[2]
        assert np.array_equal(draw(1.0, flat(255)), plain)
        assert np.array_equal(draw(0.6, flat(255)), some)
        assert np.array_equal(draw(0.6, half)[:, :32], np.asarray(circle)[:, :32])
    finally:
        nano.scheduler = own
