"""Control guidance follows its equations, equals the diffusers pipeline where it should, and so do the schedule of the
adapter's strength and the steps of several adapters.

Predictions are compared in float64, where two orders of summation differ by about 1e-15 of a value.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers import MultiAdapter, UNet2DConditionModel
from PIL import Image

from t2i_adapter.config.tree import NANO, AdapterOptions, BaseOptions
from t2i_adapter.errors import UserError
from t2i_adapter.generation.generate import encode_prompts, generate
from t2i_adapter.generation.guidance import steer
from t2i_adapter.generation.options import SamplingOptions, Strength
from t2i_adapter.generation.schedulers import make_scheduler
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.open import open_base

SIZE = (64, 64)
PROMPTS = ["red circle with blue background", "cyan circle"]
SEEDS = [3, 7]
STEPS = 4
EXACT = 1e-12


def make_pipeline(name: str, dtype: torch.dtype, channels: tuple[Literal[1, 3], ...] = (3,)) -> Any:
    base = open_base(BaseOptions(name=name))
    torch.manual_seed(0)
    adapters = [build_adapter(AdapterOptions(in_channels=count), base.unet_config).eval() for count in channels]
    adapter: Any = adapters[0] if len(adapters) == 1 else MultiAdapter(adapters)
    return base.pipeline(adapter, "cpu", dtype)


@pytest.fixture(scope="module")
def pipeline(tiny_base: Path) -> Any:
    return make_pipeline(str(tiny_base), torch.float64)


@pytest.fixture(scope="module")
def pair(tiny_base: Path) -> Any:
    """A pipeline with two adapters, which take colour and grey pictures."""
    return make_pipeline(str(tiny_base), torch.float64, (3, 1))


@pytest.fixture(scope="module")
def conditions() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), np.uint8)
    return [Image.fromarray(picture) for picture in noise]


def options(**changes: Any) -> SamplingOptions:
    return SamplingOptions(**{"steps": STEPS, "guidance": 3.0, **changes})


@dataclass
class Seen:
    """What happened in each step of a pipeline's call.

    predictions: (B,4,h,w), as the scheduler gets them after guidance. features: lists of (2B,D,h,w), or None, as the
    UNet gets them. calls: the UNet's other arguments. pictures: what `steps` generated.
    """

    predictions: list[torch.Tensor] = field(default_factory=list)
    features: list[list[torch.Tensor] | None] = field(default_factory=list)
    calls: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    pictures: list[Image.Image] = field(default_factory=list)


@contextmanager
def watch(pipeline: Any) -> Iterator[Seen]:
    seen, step, forward = Seen(), pipeline.scheduler.step, pipeline.unet.forward

    @wraps(step)  # the pipeline passes its generator on only if the signature has one
    def keep_step(prediction: torch.Tensor, *rest: Any, **named: Any) -> Any:
        seen.predictions.append(prediction)
        return step(prediction, *rest, **named)

    def keep_call(*given: Any, **named: Any) -> Any:
        features = named["down_intrablock_additional_residuals"]
        seen.features.append(None if features is None else list(features))
        seen.calls.append((given, named))
        return forward(*given, **named)

    pipeline.scheduler.step, pipeline.unet.forward = keep_step, keep_call
    try:
        yield seen
    finally:
        del pipeline.scheduler.step, pipeline.unet.forward


def steps(pipeline: Any, conditions: Any, sampling: SamplingOptions, **more: Any) -> Seen:
    """Generates with our sampling."""
    with watch(pipeline) as seen:
        seen.pictures = generate(pipeline, PROMPTS, conditions, SEEDS, size=SIZE, sampling=sampling, **more)
    return seen


def diffusers_steps(pipeline: Any, image: Any, sampling: SamplingOptions, scale: Any) -> Seen:
    """Generates with a plain call of the diffusers pipeline."""
    with watch(pipeline) as seen:
        pipeline(
            PROMPTS,
            image=image,
            height=SIZE[0],
            width=SIZE[1],
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
            adapter_conditioning_scale=scale,
            adapter_conditioning_factor=sampling.condition_factor,
            output_type="latent",
        )
    return seen


def are_equal(first: Seen, second: Seen) -> bool:
    """Whether all predictions are equal to the bit."""
    assert len(first.predictions) == len(second.predictions) == STEPS
    return all(torch.equal(a, b) for a, b in zip(first.predictions, second.predictions, strict=True))


@torch.no_grad()
def adapter_features(adapter: Any, conditions: list[Image.Image]) -> list[torch.Tensor]:
    """The adapter's features, (B,D,h,w), of conditions as the diffusers pipeline prepares them."""
    mode = "L" if adapter.config.in_channels == 1 else "RGB"
    arrays = [np.asarray(picture.convert(mode), np.float32).reshape(*SIZE, -1) / 255 for picture in conditions]
    return adapter(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(adapter.dtype))


# Equations ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guidance", "control", "passes"),
    [(1, 1, 2), (1, 0, 3), (1, 4, 3), (3, 1, 2), (3, 0, 2), (3, 1.5, 2), (3, 3, 2), (3, 0, 3), (3, 1.5, 3), (3, 4, 3)],
)
@torch.no_grad()
def test_a_step_follows_its_equation(
    pipeline: Any, conditions: list[Image.Image], guidance: float, control: float, passes: int
) -> None:
    sampling = options(guidance=guidance, control_guidance=control, control_passes=passes, scale=0.8)
    ours = steps(pipeline, conditions, sampling)
    plain = steps(pipeline, conditions, options(guidance=guidance))
    texts = encode_prompts(pipeline, PROMPTS, guidance=guidance)
    features = adapter_features(pipeline.adapter, conditions)
    (latents, timestep, *_), named = plain.calls[0]
    added = named["added_cond_kwargs"]

    def predict(share: float, *, has_prompt: bool) -> torch.Tensor:
        """e(p, share) or e(0, share) at the first step, each pass alone."""
        states, pooled = (texts.states, texts.pooled) if has_prompt else (texts.negative_states, texts.negative_pooled)
        return pipeline.unet(
            latents[: len(SEEDS)],
            timestep,
            encoder_hidden_states=states,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": added["time_ids"][: len(SEEDS)]},
            down_intrablock_additional_residuals=[0.8 * share * feature for feature in features],
        ).sample

    full = predict(1, has_prompt=True)
    if guidance == 1:
        without = predict(0, has_prompt=True)
        expected = without + control * (full - without)
    elif passes == 2:
        negative = predict((guidance - control) / (guidance - 1), has_prompt=False)
        expected = negative + guidance * (full - negative)
    else:
        without, with_adapter = predict(0, has_prompt=False), predict(1, has_prompt=False)
        expected = without + control * (with_adapter - without) + guidance * (full - with_adapter)
    assert (ours.predictions[0] - expected).abs().max() < EXACT * expected.abs().max()
    if control != 1:
        difference = (
            ours.predictions[0] - steps(pipeline, conditions, options(guidance=guidance, scale=0.8)).predictions[0]
        )
        assert difference.abs().max() > 1e-3 * expected.abs().max(), "the option has an effect"


@pytest.mark.parametrize("name", ["tiny", NANO])
def test_both_forms_are_equal_at_full_control_guidance(
    tiny_base: Path, conditions: list[Image.Image], name: str
) -> None:
    """Up to rounding, because three passes are 3 B rows of one batch, which is summed in another order."""
    pipeline = make_pipeline(str(tiny_base) if name == "tiny" else NANO, torch.float64)
    two = steps(pipeline, conditions, options(control_guidance=3.0))
    three = steps(pipeline, conditions, options(control_guidance=3.0, control_passes=3))
    # The scheduler rounds the latents to float32 after each step, so only the first step is in float64.
    assert (two.predictions[0] - three.predictions[0]).abs().max() < EXACT * two.predictions[0].abs().max()
    assert (two.predictions[-1] - three.predictions[-1]).abs().max() < 1e-5 * two.predictions[-1].abs().max()


def test_both_forms_are_equal_to_first_order(pipeline: Any, conditions: list[Image.Image]) -> None:
    """At half the scale their difference is a quarter, and their distance from plain guidance is half."""

    def first(scale: float, **changes: Any) -> torch.Tensor:
        return steps(pipeline, conditions, options(steps=1, scale=scale, **changes)).predictions[0]

    between, effect = [], []
    for scale in (0.01, 0.005):
        two = first(scale, control_guidance=2.0)
        between.append((two - first(scale, control_guidance=2.0, control_passes=3)).norm())
        effect.append((two - first(scale)).norm())
    assert effect[0] / effect[1] == pytest.approx(2, rel=0.05)
    assert between[0] / between[1] == pytest.approx(4, rel=0.05)


@pytest.fixture(scope="module", params=["tiny", NANO])
def single_precision(request: pytest.FixtureRequest, tiny_base: Path) -> Any:
    return make_pipeline(str(tiny_base) if request.param == "tiny" else NANO, torch.float32)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"control_passes": 3},
        {"scale_schedule": "100:1,900:1.0"},
        {"scale": 0.7, "condition_factor": 0.6},
        {"guidance": 1.0},
    ],
    ids=str,
)
def test_plain_options_are_the_diffusers_pipeline_to_the_bit(
    single_precision: Any, conditions: list[Image.Image], changes: dict[str, Any]
) -> None:
    sampling = options(**changes)
    ours = steps(single_precision, conditions, sampling)
    assert are_equal(ours, diffusers_steps(single_precision, conditions, sampling, sampling.scale))


@pytest.mark.parametrize("passes", [2, 3])
def test_a_picture_does_not_depend_on_its_batch(tiny_base: Path, conditions: list[Image.Image], passes: int) -> None:
    pipeline = make_pipeline(str(tiny_base), torch.float32)
    sampling = options(control_guidance=2.0, control_passes=passes, scale_schedule="300:0.5,900:1.5")
    together = generate(pipeline, PROMPTS, conditions, SEEDS, size=SIZE, sampling=sampling)
    alone = generate(pipeline, PROMPTS[1:], conditions[1:], SEEDS[1:], size=SIZE, sampling=sampling)
    # The rounding is that of test_generate.py.
    assert abs(np.asarray(alone[0]).astype(int) - np.asarray(together[1])).max() <= 1


def test_without_a_condition_control_guidance_has_no_effect(pipeline: Any) -> None:
    plain = steps(pipeline, None, options())
    for passes in (2, 3):
        sampling = options(control_guidance=3.0, control_passes=passes, scale_schedule="500:2")
        assert are_equal(steps(pipeline, None, sampling), plain)


def test_no_hook_remains(pipeline: Any, pair: Any, conditions: list[Image.Image]) -> None:
    generate(pipeline, PROMPTS, conditions, SEEDS, size=SIZE, sampling=options(control_guidance=2.0))
    with (
        pytest.raises(ValueError, match="callback_steps"),
        steer(pipeline, options(control_guidance=2.0), [Strength()]),
    ):
        pipeline(PROMPTS, image=conditions, callback_steps=-1)
    generate(pair, PROMPTS, [(conditions[0],) * 2] * 2, SEEDS, size=SIZE, sampling=options(control_guidance=2.0))
    for module in (pipeline.unet, pipeline.adapter, pair.unet, *pair.adapter.adapters):
        assert not module._forward_pre_hooks and not module._forward_hooks


def test_a_base_without_a_negative_branch_needs_three_passes(tiny_base: Path, conditions: list[Image.Image]) -> None:
    """A base that was distilled for few steps takes guidance as a number."""
    pipeline = make_pipeline(str(tiny_base), torch.float32)
    unet: Any = UNet2DConditionModel.from_config({**pipeline.unet.config, "time_cond_proj_dim": 8})
    pipeline.unet = unet.eval()
    with pytest.raises(UserError, match="--control_guidance 2: this base .* set --control_passes 3"):
        steps(pipeline, conditions, options(control_guidance=2.0))
    seen = steps(pipeline, conditions, options(control_guidance=2.0, control_passes=3))
    assert len(seen.calls[0][0][0]) == 2 * len(SEEDS), "one row without the adapter and one with it a picture"


# Strength over the steps --------------------------------------------------------------------------------------------


def test_a_schedule_multiplies_the_features(pipeline: Any, conditions: list[Image.Image]) -> None:
    features = adapter_features(pipeline.adapter, conditions)
    seen = steps(pipeline, conditions, options(scale=0.5, scale_schedule="600:1.5, 300:0.5"))
    timesteps = [float(args[1]) for args, _ in seen.calls]
    assert timesteps[0] > 600 and timesteps[-1] < 300, "the schedule's ends are tested"
    for timestep, given in zip(timesteps, seen.features, strict=True):
        factor = 0.5 + min(max((timestep - 300) / 300, 0), 1)
        assert given is not None
        for ours, feature in zip(given, features, strict=True):
            assert torch.allclose(ours, 0.5 * factor * torch.cat([feature] * 2), rtol=EXACT)


def test_a_constant_schedule_is_the_scale_to_the_bit(pipeline: Any, conditions: list[Image.Image]) -> None:
    by_schedule = steps(pipeline, conditions, options(scale_schedule="500:0.5"))
    by_scale = steps(pipeline, conditions, options(scale=0.5))
    assert are_equal(by_schedule, by_scale)


def test_the_adapter_acts_between_its_shares_of_the_steps(pipeline: Any, conditions: list[Image.Image]) -> None:
    seen = steps(pipeline, conditions, options(condition_start=0.25, condition_factor=0.8))
    assert [features is not None for features in seen.features] == [False, True, True, False]
    never = steps(pipeline, conditions, options(condition_start=0.5, condition_factor=0.5))
    assert are_equal(never, steps(pipeline, None, options()))


def test_steps_without_the_adapter_take_no_third_pass(pipeline: Any, conditions: list[Image.Image]) -> None:
    sampling = options(control_guidance=2.0, control_passes=3, condition_factor=0.5)
    rows = [len(args[0]) for args, _ in steps(pipeline, conditions, sampling).calls]
    assert rows == [6, 6, 4, 4]


# Several adapters ---------------------------------------------------------------------------------------------------


def test_several_adapters_are_the_multi_adapter_of_diffusers_to_the_bit(
    pair: Any, conditions: list[Image.Image]
) -> None:
    rows = [(conditions[0], conditions[1]), (conditions[1], conditions[0])]
    ours = steps(pair, rows, options(), strengths=[Strength(scale=0.7), Strength(scale=1.2)])
    columns = [[row[0] for row in rows], [row[1].convert("L") for row in rows]]
    assert are_equal(ours, diffusers_steps(pair, columns, options(), [0.7, 1.2]))


def test_each_adapter_acts_in_its_own_steps(pair: Any, conditions: list[Image.Image]) -> None:
    rows = [(conditions[0], conditions[1]), (conditions[1], conditions[0])]
    strengths = [Strength(scale=0.7, end=0.75), Strength(scale=1.2, start=0.25, end=0.5)]
    seen = steps(pair, rows, options(), strengths=strengths)
    first, second = (
        adapter_features(adapter, [row[number] for row in rows]) for number, adapter in enumerate(pair.adapter.adapters)
    )
    weights = [float(np.float32(weight)) for weight in (0.7, 1.2)]  # MultiAdapter's are float32
    alone = [weights[0] * a for a in first]
    expected = [alone, [a + weights[1] * b for a, b in zip(alone, second, strict=True)], alone, None]
    for given, wanted in zip(seen.features, expected, strict=True):
        assert (given is None) is (wanted is None)
        for ours, theirs in zip(given or [], wanted or [], strict=True):
            assert torch.allclose(ours, torch.cat([theirs] * 2), rtol=EXACT)


@pytest.mark.parametrize("passes", [2, 3])
def test_control_guidance_works_with_several_adapters(pair: Any, conditions: list[Image.Image], passes: int) -> None:
    rows = [(conditions[0], conditions[1])] * 2
    sampling = options(control_guidance=2.0, control_passes=passes)
    strengths = [Strength(end=0.5), Strength(scale=0.5)]
    seen = steps(pair, rows, sampling, strengths=strengths)
    without, half, full = [], [], []
    for features in seen.features:
        assert features is not None
        blocks = features[0].split(len(SEEDS))
        without.append(float(blocks[0].abs().max()))
        half.append(torch.allclose(blocks[0], 0.5 * blocks[-1]))
        full.append(torch.equal(blocks[-2], blocks[-1]))
    # Two passes: the negative branch carries (3 - 2) / (3 - 1) = 0.5 of the features. Three: 0, 1 and 1.
    assert all(half) if passes == 2 else without == [0.0] * STEPS and all(full)


def test_each_adapter_has_its_own_control_guidance(pair: Any, conditions: list[Image.Image]) -> None:
    """Two passes: the negative branch carries r_i = (g - c_i) / (g - 1) of adapter i; here 0.75 and 0."""
    rows = [(conditions[0], conditions[1])] * 2
    strengths = [Strength(scale=0.7, control_guidance=1.5), Strength(scale=0.4, control_guidance=3.0)]
    seen = steps(pair, rows, options(), strengths=strengths)
    first, second = (
        adapter_features(adapter, [row[number] for row in rows]) for number, adapter in enumerate(pair.adapter.adapters)
    )
    weights = [float(np.float32(weight)) for weight in (0.7, 0.7 * 0.75, 0.4)]
    for features in seen.features:
        for ours, a, b in zip(features or [], first, second, strict=True):
            negative, positive = ours.chunk(2)
            assert torch.allclose(negative, weights[1] * a, rtol=1e-6)
            assert torch.allclose(positive, weights[0] * a + weights[2] * b, rtol=1e-6)


def test_equal_control_guidances_are_one(pair: Any, conditions: list[Image.Image]) -> None:
    rows = [(conditions[0], conditions[1])] * 2
    for passes in (2, 3):
        common = options(control_guidance=2.0, control_passes=passes, scale_schedule="500:0.5")
        own = [Strength(control_guidance=2.0, scale_schedule="500:0.5")] * 2
        assert are_equal(steps(pair, rows, options(control_passes=passes), strengths=own), steps(pair, rows, common))


def test_three_passes_amplify_some_of_the_adapters(pair: Any, conditions: list[Image.Image]) -> None:
    """The added pass carries the adapters whose control guidance is 1, and the others carry all."""
    rows = [(conditions[0], conditions[1])] * 2
    strengths = [Strength(scale=0.5), Strength(control_guidance=4.0)]
    seen = steps(pair, rows, options(control_passes=3), strengths=strengths)
    alone = adapter_features(pair.adapter.adapters[0], [row[0] for row in rows])
    for features in seen.features:
        for ours, feature in zip(features or [], alone, strict=True):
            added, negative, positive = ours.split(len(SEEDS))
            assert torch.allclose(added, 0.5 * feature, rtol=EXACT)
            assert torch.equal(negative, positive) and not torch.equal(added, negative)
    without = steps(
        pair, rows, options(control_passes=3, condition_factor=1.0), strengths=[Strength(scale=0.5), Strength()]
    )
    assert not are_equal(seen, without)
    with pytest.raises(
        UserError, match="--control_guidance 2 and 3: with --control_passes 3 each adapter has 1 or one"
    ):
        steps(
            pair,
            rows,
            options(control_passes=3),
            strengths=[Strength(control_guidance=3.0), Strength(control_guidance=2.0)],
        )


def test_each_adapter_has_its_own_schedule(pair: Any, conditions: list[Image.Image]) -> None:
    rows = [(conditions[0], conditions[1])] * 2
    strengths = [Strength(scale_schedule="100:0,900:1"), Strength(scale=0.5)]
    seen = steps(pair, rows, options(), strengths=strengths)
    first, second = (
        adapter_features(adapter, [row[number] for row in rows]) for number, adapter in enumerate(pair.adapter.adapters)
    )
    for (args, _), features in zip(seen.calls, seen.features, strict=True):
        factor = min(max((float(args[1]) - 100) / 800, 0), 1)
        for ours, a, b in zip(features or [], first, second, strict=True):
            assert torch.allclose(ours, torch.cat([factor * a + 0.5 * b] * 2), rtol=1e-6, atol=1e-6)


# Schedulers that call the UNet twice a step -------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "calls"), [("heun", 7), ("dpm2", 7), ("pndm", 5), ("dpmpp_2m", 4), ("unipc", 4)])
def test_shares_are_of_the_steps_with_every_scheduler(
    tiny_base: Path, conditions: list[Image.Image], name: str, calls: int
) -> None:
    pipeline = make_pipeline(str(tiny_base), torch.float32)
    pipeline.scheduler = make_scheduler(name, pipeline.scheduler.config)

    def acts(**changes: Any) -> list[bool]:
        return [features is not None for features in steps(pipeline, conditions, options(**changes)).features]

    assert acts() == [True] * calls, "the pipeline of diffusers counts calls, and would stop after the fourth"
    half = acts(condition_factor=0.5)
    assert half == sorted(half, reverse=True) and sum(half) == (calls + 1) // 2
    assert acts(condition_start=0.5) == [not acted for acted in half]
    assert acts(condition_factor=0.0) == [False] * calls
    by_guidance = steps(pipeline, conditions, options(control_guidance=3.0)).features
    assert all(features is not None and not features[0].chunk(2)[0].any() for features in by_guidance)
