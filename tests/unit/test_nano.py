"""The embedded base nano: its files, its pictures and the numbers of its card; the mathematics of nano_maker."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLAdapterPipeline, StableDiffusionXLPipeline, T2IAdapter
from nano_maker import card, checkpoint, pictures, unet, vae, words
from nano_maker.judge import judge
from nano_maker.measure import SHEET_PROMPTS
from safetensors import safe_open

from t2i_adapter.data import emoji, shapes
from t2i_adapter.models import nano
from t2i_adapter.types import CHUNK

SIDE = 128


@pytest.fixture(scope="module")
def base():
    pipeline = StableDiffusionXLPipeline.from_pretrained(nano.path())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_path_needs_no_torch():
    check = (
        "import sys; from t2i_adapter.models import nano; assert nano.path().is_dir(); print('torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", check], text=True).strip() == "False"


def test_weights_are_half_precision_and_small():
    files = list(nano.path().rglob("*.safetensors"))
    assert len(files) == 4 and sum(f.stat().st_size for f in files) <= 40 * 2**20
    for file in files:
        with safe_open(file, "pt") as tensors:
            kinds = {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
        assert "F16" in kinds and "F32" not in kinds


def test_no_pickles():
    assert not [p for p in nano.path().rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]


def test_card_equals_the_measurements():
    numbers = json.loads((nano.path() / "measurements.json").read_text())
    recipe = json.loads((nano.path() / "recipe.json").read_text())
    text = (nano.path() / "README.md").read_text()
    assert text == card.text(numbers, recipe, SHEET_PROMPTS)
    assert numbers["num"] == 256
    assert 0 < numbers["follows"]["object_ciede2000"] < 20 and 0 < numbers["follows"]["background_ciede2000"] < 20
    assert 0 < numbers["follows"]["right_shape"] <= 1 and numbers["vae"]["psnr_mean"] > 25
    assert (nano.path() / "samples.png").is_file()


def test_is_sdxl_in_small(base):
    config = base.unet.config
    assert config["down_block_types"] == ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
    assert config["addition_embed_type"] == "text_time" and config["use_linear_projection"]
    assert base.scheduler.config["prediction_type"] == "epsilon" and base.scheduler.config["steps_offset"] == 1
    assert base.vae_scale_factor == 8 and base.default_sample_size * 8 == SIDE
    assert {
        p.dtype for part in (base.unet, base.vae, base.text_encoder, base.text_encoder_2) for p in part.parameters()
    } == {torch.float32}


def test_tokenizers(base):
    first, second = base.tokenizer, base.tokenizer_2
    assert len(first) == len(second) == base.text_encoder.config.vocab_size
    for words_, count in (("pale golden rod circle", 4), ("palegoldenrod", 1), ("", 0), ("qxz", 3)):
        ids = first(words_).input_ids
        assert len(ids) == count + 2
        assert ids[0] == first.convert_tokens_to_ids(words.START) and ids[-1] == first.convert_tokens_to_ids(words.END)
    assert second("red", padding="max_length").input_ids[-1] == 0 == second.pad_token_id
    assert first("Red CIRCLE").input_ids == first("red circle").input_ids
    assert len(first("red", padding="max_length").input_ids) == CHUNK


def test_pictures_follow_the_prompt(base):
    prompts = ["red circle with blue background"] * 4
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    images = base(prompts, num_inference_steps=12, guidance_scale=3.0, generator=generators, output_type="np").images
    assert images.shape == (4, SIDE, SIDE, 3)
    red, _, blue = np.median(images[:, :8], axis=(1, 2)).T
    assert (blue > red + 0.3).sum() >= 3


def test_an_adapters_features_change_the_picture(base):
    channels = list(base.unet.config["block_out_channels"])
    adapter = T2IAdapter(3, channels=[*channels, channels[-1]], downscale_factor=16, adapter_type="full_adapter_xl")
    pipeline = StableDiffusionXLAdapterPipeline.from_pretrained(nano.path(), adapter=adapter)
    pipeline.set_progress_bar_config(disable=True)
    condition = shapes.condition(shapes.sample_scene(0, 0), SIDE, "outline")

    def draw(scale):
        result = pipeline(
            "red circle",
            image=condition,
            num_inference_steps=2,
            adapter_conditioning_scale=scale,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        )
        return result.images[0]

    assert [tuple(f.shape[1:]) for f in adapter(torch.zeros(1, 3, SIDE, SIDE))] == [
        (channels[0], 8, 8),
        (channels[1], 8, 8),
        (channels[2], 4, 4),
        (channels[2], 4, 4),
    ]
    assert np.abs(draw(0.0) - draw(1.0)).max() > 0.01


def test_vae_keeps_colours(base):
    images = np.stack([np.asarray(shapes.render(shapes.sample_scene(9, i), SIDE)) for i in range(4)])
    assert vae.psnr(base.vae, images).mean() > 22


# ---- the maker


def test_unet_starts_as_the_identity():
    torch.manual_seed(0)
    network = unet.build()
    x = torch.randn(2, 4, 16, 16)
    conditions = {"text_embeds": torch.zeros(2, 128), "time_ids": torch.zeros(2, 6)}
    with torch.no_grad():
        y = network(x, 999, torch.zeros(2, 77, 256), added_cond_kwargs=conditions).sample
    # Not exactly: the group's norm sees other channels too, and the rest of conv_out starts small. Unrelated: 2.
    assert (y - x).square().mean() < 0.15


def test_normalising_the_latents_keeps_the_picture():
    torch.manual_seed(0)
    model = vae.build().eval()
    images = np.stack([np.asarray(shapes.render(shapes.sample_scene(9, i), 64)) for i in range(6)])
    x = vae.to_tensor(images)
    with torch.no_grad():
        before = model.decode(model.encode(x).latent_dist.mean).sample
        vae._normalise(model, images)
        posterior = model.encode(x).latent_dist
        after = model.decode(posterior.mean).sample
    torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-4)  # float32 through two 1x1 convolutions
    torch.testing.assert_close(posterior.mean.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(posterior.mean.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)
    assert posterior.std.std() < 1e-6


def test_a_view_scales_crops_and_has_time_ids():
    sizes = []

    def render(n):
        sizes.append(n)
        return np.full((n, n, 3), n % 256, np.uint8)

    assert pictures.apply_view(render, pictures.View(32, 160, 5, 7), SIDE).shape == (SIDE, SIDE, 3)
    assert pictures.apply_view(render, pictures.View(700, 160, 5, 7), SIDE).shape == (SIDE, SIDE, 3)
    assert sizes == [32, 160]
    assert pictures.View(32, 160, 5, 7).time_ids(SIDE) == (32, 32, 5, 7, 128, 128)
    for i in range(200):
        view = pictures.sample_view(np.random.default_rng(i), SIDE)
        assert 0 <= view.top <= view.resized - SIDE and 0 <= view.left <= view.resized - SIDE


def test_checkpoint_round_trip(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoint.save(tmp_path / "run.safetensors", {"model": model}, optimizer, {"step": 1})
    other = torch.nn.Linear(3, 2)
    fresh = torch.optim.AdamW(other.parameters())
    assert checkpoint.load(tmp_path / "run.safetensors", {"model": other}, fresh) == {"step": 1}
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(fresh.state_dict()["state"], optimizer.state_dict()["state"], rtol=0, atol=0)
    assert checkpoint.progress(tmp_path / "run.safetensors") == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


def test_every_caption_is_whole_words():
    icons = [emoji.Icon("red-apple", "")]
    tokenizer, _ = words.tokenizers(words.domain_words(icons))
    for index in range(200):
        caption = shapes.sample_scene(12, index).caption
        assert len(tokenizer(caption).input_ids) == 2 + len(caption.replace(",", " ,").split())


def test_vocabulary_does_not_depend_on_the_order_of_words():
    some = ["apple", "sea", "an", "banana", "seal", "green", "greenish", "aaa"]
    vocabulary, merges = words._byte_pairs(some)
    assert words._byte_pairs(some[::-1]) == (vocabulary, merges)
    assert all(word + "</w>" in vocabulary for word in some) and len(vocabulary) == 514 + len(merges)


def test_judge_recognises_rendered_scenes():
    right, wrong_color = 0, 0
    for i in range(60):
        scene = shapes.sample_scene(3, i, max_shapes=1)
        seen = judge(np.asarray(shapes.render(scene, SIDE)))
        right += seen.kind == scene.shapes[0].kind
        wrong_color += not np.allclose(seen.color, shapes.COLORS[scene.shapes[0].color], atol=3)
    assert right >= 57 and wrong_color <= 2


def test_judge_finds_no_object_in_an_empty_picture():
    seen = judge(np.full((SIDE, SIDE, 3), 200, np.uint8))
    assert seen.kind is None and not seen.mask.any()
