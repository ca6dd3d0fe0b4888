"""Bases of Stable Diffusion 1 and 2: real sizes, which adapters fit, text states, files as their releases have them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionAdapterPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from support.hub_server import serve
from support.single_file import SD1_CLIP, write_single_file
from support.tiny import write_tiny_sd

from t2i_adapter.batches.example import example_batch
from t2i_adapter.config.tree import AdapterOptions, AdapterType, BaseOptions
from t2i_adapter.errors import UserError
from t2i_adapter.models.adapter import KINDS, build_adapter, check_fits, check_resolution
from t2i_adapter.models.base import Base, enable_gradient_checkpointing
from t2i_adapter.models.encoders import LatentScale
from t2i_adapter.models.family import SD, SDXL, added_conditions, find_family
from t2i_adapter.models.open import native_size, open_base
from t2i_adapter.models.single_file import SingleFileBase
from t2i_adapter.training.memory import Shapes
from t2i_adapter.training.resume import changes
from t2i_adapter.types import text_widths

SD15: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD21 = {
    **SD15,
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
"""Sizes of the real UNets, from their config files."""
CAPTIONS = ["red circle", "a blue square on the black background", ""]


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sd(tmp_path_factory.mktemp("sd") / "sd15")


@pytest.fixture(scope="module")
def sd21(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sd(tmp_path_factory.mktemp("sd") / "sd21", is_v2=True)


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# Real sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "size"), [(SD15, (512, 512)), (SD15, (512, 520)), (SD21, (768, 576))])
@pytest.mark.parametrize("kind", ["full_adapter", "light_adapter"])
@pytest.mark.parametrize("channels", [1, 3])
def test_features_of_full_size_fit_into_the_unet(
    config: dict[str, Any], size: tuple[int, int], kind: AdapterType, channels: Literal[1, 3]
) -> None:
    """On the meta device: a feature of another size could not be added, and one too many would be left over."""
    height, width = size
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**config)
        adapter = build_adapter(AdapterOptions(type=kind, in_channels=channels), config)
    check_fits(adapter.config, config)
    check_resolution(height, width, adapter.config)
    batch = example_batch(config, 1, height=height, width=width, channels=channels, device="meta")
    features = adapter(batch.condition)
    halves = [tuple(-(-side // 2**level) for side in (height // 8, width // 8)) for level in range(4)]
    widths = (320, 640, 1280, 1280)
    assert [tuple(feature.shape) for feature in features] == [
        (1, w, *half) for w, half in zip(widths, halves, strict=True)
    ]
    noisy, left = batch.noise, list(features)
    assert added_conditions(batch.pooled, batch.time_ids) is None
    output = unet(noisy, batch.timesteps, batch.text, down_intrablock_additional_residuals=left).sample
    assert output.shape == noisy.shape and left == []


def test_official_adapters_have_these_sizes() -> None:
    """The configs of TencentARC's adapters for Stable Diffusion 1.4 and 1.5, and their numbers of weights."""
    with torch.device("meta"):
        full = build_adapter(AdapterOptions(), SD15)
        light = build_adapter(AdapterOptions(type="light_adapter"), SD15)
    expected = {"in_channels": 3, "channels": [320, 640, 1280, 1280], "num_res_blocks": 2, "downscale_factor": 8}
    assert {key: full.config[key] for key in expected} == expected
    expected = {"in_channels": 3, "channels": [320, 640, 1280], "num_res_blocks": 4, "downscale_factor": 8}
    assert {key: light.config[key] for key in expected} == expected
    counts = [sum(weight.numel() for weight in adapter.parameters()) for adapter in (full, light)]
    assert counts[0] // 10**6 == 77 and counts[1] // 10**5 == 186
    assert text_widths(SD15) == (768, 0) and text_widths(SD21) == (1024, 0)


def test_sides_that_the_adapter_does_not_take_are_refused(sd15: Path) -> None:
    config = build_adapter(AdapterOptions(), open_base(BaseOptions(name=str(sd15))).unet_config).config
    check_resolution(72, 64, config)
    with pytest.raises(UserError, match="multiples of 8 pixels; nearest: 64 or 72"):
        check_resolution(68, 64, config)


# Which adapters fit -------------------------------------------------------------------------------------------------


def test_wrong_pairs_are_refused(tiny_base: Path, sd15: Path) -> None:
    xl, sd = (open_base(BaseOptions(name=str(base))).unet_config for base in (tiny_base, sd15))
    assert find_family(xl) is SDXL and find_family(sd) is SD
    assert build_adapter(AdapterOptions(), xl).config["adapter_type"] == "full_adapter_xl"
    assert build_adapter(AdapterOptions(), sd).config["adapter_type"] == "full_adapter"
    for wrong, other in [(build_adapter(AdapterOptions(), xl), sd), (build_adapter(AdapterOptions(), sd), xl)]:
        with pytest.raises(UserError, match=r"x is a full_adapter.* does not fit the base, S.* needs a full_adapter"):
            check_fits(wrong.config, other, "x")
    wrong_types: list[tuple[AdapterType, dict[str, Any], str]] = [
        ("full_adapter_xl", sd, "Stable Diffusion 1 or 2; allowed for it: full_adapter, light_adapter"),
        ("full_adapter", xl, "SDXL; allowed for it: full_adapter_xl"),
        ("light_adapter", xl, "SDXL; allowed for it: full_adapter_xl"),
    ]
    for kind, config, allowed in wrong_types:
        with pytest.raises(UserError, match=f"{kind}: does not fit the base, {allowed}") as caught:
            build_adapter(AdapterOptions(type=kind), config)
        assert caught.value.option == "adapter.type"


def test_sizes_that_differ_are_refused(sd15: Path) -> None:
    unet = open_base(BaseOptions(name=str(sd15))).unet_config
    fitting = dict(build_adapter(AdapterOptions(type="light_adapter"), unet).config)
    check_fits(fitting, unet)
    for change in ({"downscale_factor": 16}, {"channels": [16, 32, 64, 64]}, {"adapter_type": "full_adapter"}):
        with pytest.raises(UserError, match="does not fit the base"):
            check_fits({**fitting, **change}, unet)
    wider = {**unet, "block_out_channels": [16, 32, 64, 128]}
    with pytest.raises(UserError, match=r"one width, and the base's UNet has 64 and 128.*use a full_adapter"):
        check_fits(fitting, wider)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"in_channels": 9}, "takes 9 channels, as bases for inpainting"),
        ({"class_embed_type": "projection"}, "class_embed_type 'projection', as bases for variations"),
        ({"block_out_channels": [16, 32]}, "neither an SDXL base nor a base of Stable Diffusion 1 or 2"),
        ({"addition_embed_type": "image"}, "addition_embed_type 'image'"),
    ],
)
def test_bases_of_other_kinds_are_refused(sd15: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    other = Path(shutil.copytree(sd15, tmp_path / "other"))
    edit(other / "unet" / "config.json", **change)
    with pytest.raises(UserError, match=said):
        open_base(BaseOptions(name=str(other)))


@pytest.mark.parametrize("kind", ["full_adapter", "light_adapter"])
def test_a_quiet_start_scales_every_feature(sd15: Path, kind: AdapterType) -> None:
    unet = open_base(BaseOptions(name=str(sd15))).unet_config
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def features(init: Literal["quiet", "zero"]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        adapter = build_adapter(AdapterOptions(type=kind, init=init), unet)
        found = adapter(picture)
        torch.stack([feature.sum() for feature in found]).sum().backward()
        gradients = {name: weight.grad for name, weight in adapter.named_parameters()}
        assert any(gradient is not None and gradient.any() for gradient in gradients.values()), "it can learn"
        return [feature.detach() for feature in found]

    torch.manual_seed(0)
    plain = build_adapter(AdapterOptions(type=kind), unet)
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
    for quiet, full in zip(features("quiet"), plain(picture), strict=True):
        torch.testing.assert_close(quiet, 0.01 * full.detach(), rtol=1e-4, atol=1e-7)
    assert not any(feature.any() for feature in features("zero"))


# Files as the releases have them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_text_states_are_those_of_the_pipeline(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    ours, pooled = open_base(BaseOptions(name=str(folder))).text_encoder("cpu", torch.float32).encode(CAPTIONS)
    for caption, states in zip(CAPTIONS, ours, strict=True):
        theirs, _ = pipeline.encode_prompt(caption, "cpu", 1, False)
        torch.testing.assert_close(states[None], theirs, rtol=0, atol=1e-6)  # another batch, another order of sums
    assert pooled.shape == (3, 0)


def test_chunks_of_a_long_caption_follow_one_another(sd15: Path) -> None:
    encoder = open_base(BaseOptions(name=str(sd15))).text_encoder("cpu", torch.float32)
    words = ["red"] * 90
    assert encoder.count_tokens(" ".join(words)) == 90
    states, pooled = encoder.encode([" ".join(words)], max_tokens=150)
    parts, _ = encoder.encode([" ".join(words[:75]), " ".join(words[75:])])
    torch.testing.assert_close(states, parts.flatten(0, 1)[None], rtol=0, atol=1e-6)
    assert states.shape == (1, 154, 16) and pooled.shape == (1, 0)


def test_what_old_files_leave_out_is_what_it_meant_then(sd15: Path, sd21: Path) -> None:
    """No scaling factor in the VAE's config, no prediction type, weights under their first names."""
    assert "scaling_factor" not in json.loads((sd15 / "vae" / "config.json").read_text())
    assert any("query" in name for name in load_file(next((sd15 / "vae").glob("*.safetensors"))))
    old, new = (open_base(BaseOptions(name=str(folder))) for folder in (sd15, sd21))
    assert old.latent_scale == LatentScale.of(dict(AutoencoderKL.from_pretrained(sd15, subfolder="vae").config))
    assert old.latent_scale.scale == (0.18215,) * 4
    assert [base.scheduler().config["prediction_type"] for base in (old, new)] == ["epsilon", "v_prediction"]
    assert [base.native_size for base in (old, new)] == [64, 96] == [native_size(str(b)) for b in (sd15, sd21)]
    assert not old.zeros_for_empty_prompt and not new.zeros_for_empty_prompt


def test_a_base_needs_the_parts_of_its_family(sd15: Path, tmp_path: Path) -> None:
    part = Path(shutil.copytree(sd15, tmp_path / "part"))
    shutil.rmtree(part / "text_encoder")
    with pytest.raises(UserError, match=r"not a base in diffusers layout: the folder text_encoder/ is missing"):
        open_base(BaseOptions(name=str(part)))
    assert native_size(str(part)) is None


def test_the_two_largest_of_four_resolutions_are_recomputed(sd15: Path) -> None:
    unet: Any = open_base(BaseOptions(name=str(sd15))).unet("cpu", torch.float32)
    enable_gradient_checkpointing(unet, "large")
    on = {name for name, module in unet.named_modules() if getattr(module, "gradient_checkpointing", False)}
    assert {name.rpartition(".")[0] or name for name in on} and all(
        name.startswith(("down_blocks.0", "down_blocks.1", "up_blocks.2", "up_blocks.3")) for name in on
    )
    assert {"down_blocks.0", "up_blocks.3"} <= on


def test_the_memory_of_a_step_is_computed_for_the_adapters_own_type(sd15: Path) -> None:
    from t2i_adapter.config.tree import Config

    base = open_base(BaseOptions(name=str(sd15)))
    light, full = (
        build_adapter(AdapterOptions(type=kind), base.unet_config) for kind in ("light_adapter", "full_adapter")
    )
    found = [Shapes(Config(), base, adapter, torch.float32).memory(1, height=64, width=64) for adapter in (light, full)]
    for memory, adapter in zip(found, (light, full), strict=True):
        assert memory.adapter == 4 * sum(weight.numel() for weight in adapter.parameters())
    assert 0 < found[0].step < found[1].step


def test_residual_blocks_that_were_written_are_the_same_run_as_by_default() -> None:
    from dataclasses import replace

    from t2i_adapter.config.tree import Config, to_dict

    plan = {"seed": 0, "global_batch": 1, "samples": 1, "precision": "fp32"}

    def found(before: AdapterOptions, after: AdapterOptions) -> list[str]:
        state = {"options": to_dict(replace(Config(), adapter=before)), "plan": plan}
        return [str(change) for change in changes(state, replace(Config(), adapter=after), plan)]

    light: AdapterType = "light_adapter"
    assert found(AdapterOptions(num_res_blocks=2), AdapterOptions()) == []
    assert found(AdapterOptions(type=light), AdapterOptions(type=light, num_res_blocks=4)) == []
    assert found(AdapterOptions(), AdapterOptions(num_res_blocks=4)) == ["adapter.num_res_blocks 2 -> 4"]
    assert set(KINDS) == {*SDXL.adapter_types, *SD.adapter_types}


@pytest.mark.parametrize("name", ["sd15", "tiny_base"])
def test_the_hub_gives_the_parts_that_are_used(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """No safety checker, which is larger than the UNet's half, no pickles; and for a size the UNet's config alone."""
    repository = Path(shutil.copytree(request.getfixturevalue(name), tmp_path / "repository"))
    (repository / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    if name == "sd15":
        checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
        edit(repository / "model_index.json", safety_checker=checker, requires_safety_checker=True)
        save_file({"x": torch.zeros(1)}, repository / "safety_checker" / "model.safetensors")
    program = """
from pathlib import Path
from t2i_adapter.config.tree import BaseOptions
from t2i_adapter.models.open import native_size, open_base

print(native_size("me/base"))
print(sorted(path.name for path in Path("home/hub").rglob("*") if path.suffix == ".safetensors"))
base = open_base(BaseOptions(name="me/base", cache_dir="cache"))
print(base.family.key, sorted(str(path.relative_to(base.folder)) for path in base.folder.rglob("*.*")))
"""
    with serve({("me/base", "main"): repository}) as address:
        env = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200
        )
    assert done.returncode == 0, done.stderr
    size, before, found = done.stdout.splitlines()
    assert (size, before) == ("64", "[]")
    family = SD if name == "sd15" else SDXL
    assert found.startswith(family.key) and ".bin" not in found and "safety_checker" not in found
    assert all(f"{part}/" in found for part in family.parts)


# One file -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_a_base_in_one_file_is_the_folders_to_the_bit(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(name)
    file = write_single_file(folder, tmp_path / "base.safetensors")
    one, many = open_base(BaseOptions(name=str(file), config=str(folder))), open_base(BaseOptions(name=str(folder)))
    assert isinstance(one, SingleFileBase) and one.family is SD

    def parts(base: Base) -> list[Any]:
        encoders = base.text_encoder("cpu", torch.float32).encoders
        return [base.unet("cpu", torch.float32), base.vae("cpu", torch.float32), *encoders]

    for ours, theirs in zip(parts(one), parts(many), strict=True):
        first, second = ours.state_dict(), theirs.state_dict()
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_file_of_another_family_than_its_configs_is_refused(tiny_base: Path, sd15: Path, tmp_path: Path) -> None:
    file = write_single_file(sd15, tmp_path / "sd15.safetensors")
    with pytest.raises(UserError, match=r"holds Stable Diffusion 1 or 2, and .* of SDXL\. Set --base\.config"):
        open_base(BaseOptions(name=str(file), config=str(tiny_base)))
    weights = load_file(file)
    name = SD1_CLIP + "encoder.layers.0.mlp.fc1.scale_weight"
    save_file({**weights, name: torch.zeros(1)}, tmp_path / "scaled.safetensors")
    with pytest.raises(UserError, match="unknown key cond_stage_model.*quantised with scales"):
        open_base(BaseOptions(name=str(tmp_path / "scaled.safetensors"), config=str(sd15)))
    part = {key: tensor for key, tensor in weights.items() if not key.startswith(SD1_CLIP)}
    save_file({**part, "cond_stage_model.x": torch.zeros(1)}, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match="not a base of Stable Diffusion 1 or 2 .*another layout, such as cond_stage"):
        open_base(BaseOptions(name=str(tmp_path / "part.safetensors"), config=str(sd15)))


def test_the_pipeline_is_the_familys_own(sd15: Path) -> None:
    base = open_base(BaseOptions(name=str(sd15)))
    pipeline = base.pipeline(build_adapter(AdapterOptions(), base.unet_config), "cpu", torch.bfloat16)
    assert isinstance(pipeline, StableDiffusionAdapterPipeline)
    assert (pipeline.unet.dtype, pipeline.vae.dtype, pipeline.adapter.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
    )
