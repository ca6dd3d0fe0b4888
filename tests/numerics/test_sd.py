"""Training and generating on Stable Diffusion 1.5 and 2.1 against independent statements: the loss, pictures, guidance.

Losses and predictions are compared in float64 or with the tolerance of float32's rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionPipeline,
    T2IAdapter,
)
from PIL import Image
from support.tiny import write_adapter, write_tiny_sd

from t2i_adapter.config.tree import AdapterOptions, AdapterType, BaseOptions
from t2i_adapter.diffusion.schedule import NoiseSchedule
from t2i_adapter.evaluation.bands import measure_losses
from t2i_adapter.evaluation.metrics import Truth
from t2i_adapter.evaluation.pairs import Pair
from t2i_adapter.generation.generate import encode_prompts, generate
from t2i_adapter.generation.options import ModelOptions, SamplingOptions, Strength
from t2i_adapter.generation.pipeline import open_models
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.open import open_base
from t2i_adapter.training.step import FrozenModel, batch_losses
from t2i_adapter.types import Batch

SIZE = (64, 72)
PROMPTS = ["red circle with blue background", "cyan circle"]
SEEDS = [3, 7]
KINDS: list[tuple[AdapterType, Literal[1, 3]]] = [("full_adapter", 3), ("light_adapter", 1)]


@pytest.fixture(scope="module", params=[False, True], ids=["sd15", "sd21"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sd(tmp_path_factory.mktemp("sd") / "base", is_v2=request.param)


@pytest.fixture(scope="module")
def conditions() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), np.uint8)
    return [Image.fromarray(picture) for picture in noise]


def pixels(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in pictures]).astype(int)


@pytest.mark.parametrize(("kind", "channels"), KINDS)
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_of_a_step_is_the_formula(
    folder: Path, kind: AdapterType, channels: Literal[1, 3], gamma: float | None
) -> None:
    """Noise, v and signal-to-noise ratio by diffusers' DDPM scheduler, the features added by its UNet."""
    base = open_base(BaseOptions(name=str(folder)))
    torch.manual_seed(0)
    adapter = build_adapter(AdapterOptions(type=kind, in_channels=channels), base.unet_config).double()
    unet: Any = base.unet("cpu", torch.float64)
    states, pooled = base.text_encoder("cpu", torch.float64).encode(PROMPTS)
    size, (h, w) = len(PROMPTS), (SIZE[0] // 8, SIZE[1] // 8)
    batch = Batch(
        moments=torch.rand(size, 8, h, w, dtype=torch.float64),
        condition=torch.rand(size, channels, *SIZE, dtype=torch.float64),
        text=states,
        pooled=pooled,
        time_ids=torch.full((size, 6), 64),
        timesteps=torch.tensor([40, 930]),
        noise=torch.randn(size, 4, h, w, dtype=torch.float64),
        latent_noise=torch.randn(size, 4, h, w, dtype=torch.float64),
        keys=("0", "1"),
    )
    frozen = FrozenModel(unet, NoiseSchedule.of(base.scheduler()), base.latent_scale, torch.float64)
    ours = batch_losses(adapter, frozen, batch, min_snr_gamma=gamma)

    scheduler: Any = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    latents = 0.18215 * (batch.moments[:, :4] + batch.moments[:, 4:] * batch.latent_noise)
    is_v = scheduler.config["prediction_type"] == "v_prediction"
    assert is_v == (base.native_size == 96)
    noisy: Any = scheduler.add_noise(latents, batch.noise, batch.timesteps)  # pyright: ignore[reportArgumentType]
    goal = scheduler.get_velocity(latents, batch.noise, batch.timesteps) if is_v else batch.noise  # pyright: ignore[reportArgumentType]
    predicted = unet(
        noisy, batch.timesteps, states, down_intrablock_additional_residuals=list(adapter(batch.condition))
    ).sample
    errors = (predicted - goal).square().flatten(1).mean(1)
    ratio = scheduler.alphas_cumprod[batch.timesteps] / (1 - scheduler.alphas_cumprod[batch.timesteps])
    if gamma is not None:
        errors = errors * ratio.clamp(max=gamma) / (ratio + 1 if is_v else ratio)
    # The step's tables and its last mean are float32.
    torch.testing.assert_close(ours.double(), errors, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:The decode_latents method is deprecated")  # what that pipeline itself calls
@pytest.mark.parametrize(("kind", "channels"), KINDS)
def test_a_picture_is_the_one_of_diffusers(
    folder: Path, conditions: list[Image.Image], tmp_path: Path, kind: AdapterType, channels: Literal[1, 3]
) -> None:
    write_adapter(tmp_path / "a", folder, type=kind, in_channels=channels)
    models = open_models(ModelOptions(adapter=str(tmp_path / "a"), device="cpu"))
    sampling = SamplingOptions(steps=3, guidance=4.0, scale=0.8)
    ours = pixels(generate(models.pipeline(), PROMPTS, conditions, SEEDS, size=SIZE, sampling=sampling))

    adapter: Any = T2IAdapter.from_pretrained(tmp_path / "a")
    theirs = StableDiffusionAdapterPipeline.from_pretrained(folder, adapter=adapter)
    theirs.scheduler = EulerAncestralDiscreteScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    output: Any = theirs(
        PROMPTS,
        image=[condition.convert("L" if channels == 1 else "RGB") for condition in conditions],
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=3,
        guidance_scale=4.0,
        adapter_conditioning_scale=0.8,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
    )
    expected = pixels(output.images)
    assert abs(ours - expected).max() <= 1 and (ours == expected).mean() > 0.99  # we decode one by one


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_without_a_condition_it_equals_the_plain_pipeline(
    folder: Path, conditions: list[Image.Image], guidance: float
) -> None:
    base = open_base(BaseOptions(name=str(folder)))
    pipeline = base.pipeline(build_adapter(AdapterOptions(), base.unet_config), "cpu", torch.float32)
    sampling = SamplingOptions(steps=3, guidance=guidance)
    ours = pixels(generate(pipeline, PROMPTS, None, SEEDS, size=SIZE, sampling=sampling))
    plain = StableDiffusionPipeline.from_pretrained(folder)
    plain.scheduler = EulerAncestralDiscreteScheduler.from_config(plain.scheduler.config)
    plain.set_progress_bar_config(disable=True)
    output: Any = plain(
        PROMPTS,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=3,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
    )
    expected = pixels(output.images)
    assert abs(ours - expected).max() <= 1 and (ours == expected).mean() > 0.99
    with_condition = pixels(generate(pipeline, PROMPTS, conditions, SEEDS, size=SIZE, sampling=sampling))
    assert (with_condition != ours).mean() > 0.05


@torch.no_grad()
def test_the_adapter_acts_in_its_steps_only(folder: Path, conditions: list[Image.Image]) -> None:
    """The pipeline of Stable Diffusion has no adapter_conditioning_factor: a hook does what SDXL's does itself."""
    base = open_base(BaseOptions(name=str(folder)))
    pipeline: Any = base.pipeline(build_adapter(AdapterOptions(), base.unet_config), "cpu", torch.float32)
    given: list[bool] = []

    def look(_unet: Any, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        given.append(kwargs["down_intrablock_additional_residuals"] is not None)

    for start, end, expected in [(0.0, 0.5, "yyn"), (0.5, 1.0, "nyy"), (0.0, 1.0, "yyy"), (0.0, 0.0, "nnn")]:
        given.clear()
        hook = pipeline.unet.register_forward_hook(look, with_kwargs=True)
        strengths = [Strength(start=start, end=end)]
        steps = 4 if expected in ("yyn", "nyy") else 3
        generate(
            pipeline,
            PROMPTS,
            conditions,
            SEEDS,
            size=SIZE,
            sampling=SamplingOptions(steps=steps),
            strengths=strengths,
        )
        hook.remove()
        first, last = int(start * steps), int(end * steps)
        assert given == [first <= step < last for step in range(steps)]


@pytest.mark.parametrize("passes", [2, 3])
@torch.no_grad()
def test_control_guidance_follows_its_equation(folder: Path, conditions: list[Image.Image], passes: int) -> None:
    """The first step's prediction after guidance, from passes made alone, in float64."""
    base = open_base(BaseOptions(name=str(folder)))
    torch.manual_seed(0)
    pipeline: Any = base.pipeline(
        build_adapter(AdapterOptions(type="light_adapter"), base.unet_config), "cpu", torch.float64
    )
    guidance, control = 3.0, 1.5
    seen: list[Any] = []
    step, unet = pipeline.scheduler.step, pipeline.unet

    def keep(prediction: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(prediction)
        return step(prediction, *args, **kwargs)

    calls: list[Any] = []
    hook = unet.register_forward_pre_hook(lambda _, args: calls.append(args))
    pipeline.scheduler.step = keep
    sampling = SamplingOptions(steps=2, guidance=guidance, control_guidance=control, control_passes=passes)  # pyright: ignore[reportArgumentType]
    generate(pipeline, PROMPTS, conditions, SEEDS, size=SIZE, sampling=sampling)
    pipeline.scheduler.step = step
    hook.remove()
    texts = encode_prompts(pipeline, PROMPTS, guidance=guidance)
    pictures = torch.from_numpy(np.stack([np.asarray(one, np.float32) for one in conditions])) / 255
    features = pipeline.adapter(pictures.permute(0, 3, 1, 2).double())
    latents, timestep = calls[0][0][-len(SEEDS) :], calls[0][1]

    def predict(states: Any, share: float) -> torch.Tensor:
        given = [share * feature for feature in features]
        return unet(latents, timestep, states, down_intrablock_additional_residuals=given).sample

    full = predict(texts.states, 1)
    if passes == 2:
        negative = predict(texts.negative_states, (guidance - control) / (guidance - 1))
        expected = negative + guidance * (full - negative)
    else:
        without, with_adapter = predict(texts.negative_states, 0), predict(texts.negative_states, 1)
        expected = without + control * (with_adapter - without) + guidance * (full - with_adapter)
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-10)


def test_losses_over_strengths_are_measured(folder: Path, conditions: list[Image.Image]) -> None:
    """`bands` of a sweep: strength 0 is the base alone, strength 1 the adapter as it is."""
    base = open_base(BaseOptions(name=str(folder)))
    torch.manual_seed(0)
    pipeline: Any = base.pipeline(build_adapter(AdapterOptions(), base.unet_config), "cpu", torch.float32)
    truth = Truth(np.ones(SIZE, bool))
    pairs = [
        Pair(str(number), prompt, one, one, truth, "picture")
        for number, (prompt, one) in enumerate(zip(PROMPTS, conditions, strict=True))
    ]
    states, pooled = base.text_encoder("cpu", torch.float32).encode(PROMPTS)
    found = measure_losses(pipeline, pairs, states, pooled, SEEDS, [500], strengths=[0.0, 1.0])
    assert found.shape == (2, 1, 2) and np.isfinite(found).all() and (found[..., 0] != found[..., 1]).all()
