"""A base in one file equals the base in a folder to the bit, and frees each part when its user drops it."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import load_file, save_file
from support.single_file import CLIP, OPEN_CLIP, UNET, VAE, write_single_file
from support.tiny import write_tiny_sdxl
from torch import Tensor

from t2i_adapter.config.tree import AdapterOptions, BaseOptions
from t2i_adapter.diffusion.schedule import NoiseSchedule
from t2i_adapter.errors import UserError
from t2i_adapter.export.adapter import save_adapter
from t2i_adapter.export.card_code import usage_code
from t2i_adapter.generation.options import ModelOptions
from t2i_adapter.generation.pipeline import open_models
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.base import Base
from t2i_adapter.models.open import open_base
from t2i_adapter.models.record import Metadata
from t2i_adapter.models.single_file import CONFIG_FILES, SingleFileBase

# Weights have different alignments in the mapped files, and CPU kernels sum in an order that depends on alignment.
SUMMED_IN_OTHER_ORDER = 1e-5

CAPTIONS = ["red circle", "a blue square on the black background", ""]


@pytest.fixture(scope="module")
def file(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single_file(tiny_base, tmp_path_factory.mktemp("single") / "tiny.safetensors")


@pytest.fixture(scope="module")
def in_file(file: Path, tiny_base: Path) -> Base:
    base = open_base(BaseOptions(name=str(file), config=str(tiny_base)))
    assert isinstance(base, SingleFileBase)
    return base


@pytest.fixture(scope="module")
def in_folder(tiny_base: Path) -> Base:
    base = open_base(BaseOptions(name=str(tiny_base)))
    assert type(base) is Base
    return base


def assert_same_bits(a: torch.nn.Module, b: torch.nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def assert_close(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert float((a - b).abs().max()) < SUMMED_IN_OTHER_ORDER


def test_every_part_is_the_same_to_the_bit(in_file: Base, in_folder: Base) -> None:
    def parts(base: Base) -> list[Any]:
        encoders = base.text_encoder("cpu", torch.float32).encoders
        return [base.unet("cpu", torch.float32), base.vae("cpu", torch.float32), *encoders]

    for ours, theirs in zip(parts(in_file), parts(in_folder), strict=True):
        assert type(ours) is type(theirs)
        assert_same_bits(ours, theirs)
        assert not ours.training
        assert not any(weight.requires_grad for weight in ours.parameters())


def test_configs_are_the_same(in_file: Base, in_folder: Base) -> None:
    assert in_file.unet_config == in_folder.unet_config
    assert in_file.vae_config == in_folder.vae_config
    assert in_file.latent_scale == in_folder.latent_scale
    assert in_file.native_size == in_folder.native_size
    assert in_file.zeros_for_empty_prompt == in_folder.zeros_for_empty_prompt
    assert dict(in_file.scheduler().config) == dict(in_folder.scheduler().config)


def test_text_and_pictures_are_encoded_alike(in_file: Base, in_folder: Base) -> None:
    ours, theirs = (base.text_encoder("cpu", torch.float32) for base in (in_file, in_folder))
    for a, b in zip(ours.encode(CAPTIONS), theirs.encode(CAPTIONS), strict=True):
        assert_close(a, b)
    assert ours.count_tokens(CAPTIONS[1]) == theirs.count_tokens(CAPTIONS[1])
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert_close(in_file.latent_encoder("cpu").encode(images), in_folder.latent_encoder("cpu").encode(images))


def test_the_same_picture_is_drawn(in_file: Base, in_folder: Base) -> None:
    torch.manual_seed(0)
    adapter = build_adapter(AdapterOptions(), in_folder.unet_config)
    condition = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))

    def drawn(base: Base) -> Tensor:
        pipeline: Any = base.pipeline(adapter, "cpu", torch.float32)
        return pipeline(
            "red circle",
            image=condition,
            height=64,
            width=64,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(1),
            output_type="pt",
        ).images

    assert_close(drawn(in_file), drawn(in_folder))


def test_a_file_in_half_precision_is_cast(file: Path, tiny_base: Path, tmp_path: Path) -> None:
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in load_file(file).items()}
    save_file(half, tmp_path / "half.safetensors")
    base = open_base(BaseOptions(name=str(tmp_path / "half.safetensors"), config=str(tiny_base)))
    for dtype in (torch.float32, torch.bfloat16):
        for part in (base.unet("cpu", dtype), base.vae("cpu", dtype), *base.text_encoder("cpu", dtype).encoders):
            assert {weight.dtype for weight in part.parameters()} == {dtype}
    assert torch.equal(
        base.unet("cpu", torch.float32).state_dict()["conv_in.weight"], half[UNET + "input_blocks.0.0.weight"].float()
    )


def test_parts_are_freed_when_they_are_dropped(in_file: Base) -> None:
    """The base holds no reference to them, nor to other parts that were loaded with them."""

    def live() -> list[str]:
        gc.collect()
        kinds = ("UNet2DConditionModel", "AutoencoderKL", "CLIPTextModelWithProjection")
        return sorted(type(thing).__name__ for thing in gc.get_objects() if type(thing).__name__ in kinds)

    before = live()
    text: Any = in_file.text_encoder("cpu", torch.float32)
    assert live() == sorted([*before, "CLIPTextModelWithProjection"])
    unet: Any = in_file.unet("cpu", torch.float32)
    latents: Any = in_file.latent_encoder("cpu")
    kept = [weakref.ref(model) for model in (*text.encoders, unet, latents.vae)]
    weights = [weakref.ref(weight) for weight in unet.parameters()]
    text = latents = None
    gc.collect()
    assert [ref() is None for ref in kept] == [True, True, False, True]
    unet = None
    gc.collect()
    assert kept[2]() is None
    assert all(ref() is None for ref in weights)
    assert live() == before


def test_configs_are_read_without_weights(file: Path, tiny_base: Path, tmp_path: Path) -> None:
    """If the file is deleted after it was opened, everything but the parts themselves can still be read."""
    path = tmp_path / "gone.safetensors"
    shutil.copyfile(file, path)
    base = open_base(BaseOptions(name=str(path), config=str(tiny_base)))
    path.unlink()
    assert base.unet_config["block_out_channels"] == [16, 32, 64]
    assert base.vae_config["scaling_factor"] == 0.13025
    assert base.scheduler().config["prediction_type"] == "epsilon"
    assert base.zeros_for_empty_prompt
    with pytest.raises(UserError):
        base.unet("cpu", torch.float32)


def test_fingerprints_follow_weights_and_configs(file: Path, tiny_base: Path, tmp_path: Path) -> None:
    def prints(path: Path, config: Path) -> tuple[str, str]:
        base = open_base(BaseOptions(name=str(path), config=str(config)))
        return base.text_fingerprint, base.vae_fingerprint

    known = prints(file, tiny_base)
    bare = shutil.copytree(tiny_base, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    assert prints(file, bare) == known, "weights beside the configs are ignored"
    changed(bare / "vae" / "config.json", scaling_factor=1.0)
    text, vae = prints(file, bare)
    assert text == known[0]
    assert vae != known[1]
    other = write_single_file(tiny_base, tmp_path / "other.safetensors", more=torch.zeros(1))
    assert not set(prints(other, tiny_base)) & set(known)


def test_configs_from_the_hubs_cache(file: Path, tiny_base: Path, in_folder: Base, tmp_path: Path) -> None:
    """A hub id whose configs were downloaded once works offline; only configs are downloaded."""
    names = [str(path.relative_to(tiny_base)) for path in tiny_base.rglob("*") if path.is_file()]
    wanted = list(filter_repo_objects(names, allow_patterns=CONFIG_FILES))
    assert wanted
    assert not any(name.endswith(".safetensors") for name in wanted)
    commit = "0" * 40
    repository = tmp_path / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for name in wanted:
        copy = repository / "snapshots" / commit / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tiny_base / name, copy)
    base = open_base(BaseOptions(name=str(file), config="some/model", cache_dir=str(tmp_path)))
    states, _ = base.text_encoder("cpu", torch.float32).encode(CAPTIONS)
    assert_close(states, in_folder.text_encoder("cpu", torch.float32).encode(CAPTIONS)[0])
    assert_same_bits(base.unet("cpu", torch.float32), in_folder.unet("cpu", torch.float32))


def test_an_adapters_record_opens_its_base(file: Path, tiny_base: Path, in_folder: Base, tmp_path: Path) -> None:
    adapter = build_adapter(AdapterOptions(), in_folder.unet_config)
    save_adapter(adapter, tmp_path / "a", metadata={"base": {"name": str(file), "config": str(tiny_base)}}, fp16=False)
    base = open_models(ModelOptions(adapter=str(tmp_path / "a"), device="cpu")).base
    assert base.options == BaseOptions(name=str(file), config=str(tiny_base))
    moved = shutil.copytree(tiny_base, tmp_path / "moved")
    base = open_models(ModelOptions(adapter=str(tmp_path / "a"), base_config=str(moved), device="cpu")).base
    assert base.options == BaseOptions(name=str(file), config=str(moved))


def test_the_cards_code_runs(file: Path, tiny_base: Path, in_folder: Base, tmp_path: Path) -> None:
    """In a folder that holds file, configs and adapter under the names in the card."""
    (tmp_path / "base.safetensors").symlink_to(file)
    (tmp_path / "configs").symlink_to(tiny_base)
    base = {"name": "base.safetensors", "config": "configs", "vae": "configs/vae", "variant": "fp16"}
    adapter = build_adapter(AdapterOptions(), in_folder.unet_config)
    save_adapter(adapter, tmp_path / "adapter", metadata={"base": base})
    Image.new("RGB", (64, 64)).save(tmp_path / "condition.png")
    code = usage_code(Metadata.from_dict({"base": base}), "adapter", prompt="red circle")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "picture.png").size == (64, 64)


def changed(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("key", "schedule"), [("v_pred", {"prediction_type": "v_prediction"}), ("ztsnr", {"zero_snr": True})]
)
def test_the_schedule_marked_in_a_file_is_required(tmp_path: Path, key: str, schedule: dict[str, Any]) -> None:
    right = write_tiny_sdxl(tmp_path / "right", **schedule)
    wrong = shutil.copytree(right, tmp_path / "wrong")
    changed(wrong / "scheduler" / "scheduler_config.json", prediction_type="epsilon", rescale_betas_zero_snr=False)
    path = write_single_file(right, tmp_path / "file.safetensors", **{key: torch.tensor([])})
    with pytest.raises(UserError, match=rf"has the key {key}, .* has (epsilon|False).*--base.config"):
        open_base(BaseOptions(name=str(path), config=str(wrong)))
    config = open_base(BaseOptions(name=str(path), config=str(right))).scheduler().config
    assert (config["prediction_type"], config["rescale_betas_zero_snr"]) == (
        schedule.get("prediction_type", "epsilon"),
        schedule.get("zero_snr", False),
    )


def test_files_of_other_models_are_refused(file: Path, tiny_base: Path, tmp_path: Path) -> None:
    weights = load_file(file)
    whole = file.read_bytes()
    pickled, cut, junk = (tmp_path / name for name in ("a.ckpt", "cut.safetensors", "junk.safetensors"))
    pickled.write_bytes(whole)
    cut.write_bytes(whole[: len(whole) // 2])
    junk.write_text("<html>not found</html>")
    named = {
        "sd15": {UNET + "out.2.weight": weights[UNET + "out.2.weight"], "cond_stage_model.x": torch.zeros(1)},
        "unet": {name.removeprefix(UNET): tensor for name, tensor in weights.items() if name.startswith(UNET)},
        "no_vae": {name: tensor for name, tensor in weights.items() if not name.startswith(VAE)},
    }
    for name, content in named.items():
        save_file(content, tmp_path / f"{name}.safetensors")
    for name, said in [
        (pickled, r"a\.ckpt: .*\.safetensors.*pickled"),
        (cut, r"cut\.safetensors: damaged safetensors file"),
        (junk, r"junk\.safetensors: damaged safetensors file"),
        (
            tmp_path / "sd15.safetensors",
            r"not a base of Stable Diffusion 1 or 2 .*first_stage_model\.\*, cond_stage_model",
        ),
        (tmp_path / "unet.safetensors", r"not a base of SDXL .*model\.diffusion_model\.\*"),
        (tmp_path / "no_vae.safetensors", r"missing weights first_stage_model\.\*\. Set --base\.vae to"),
    ]:
        with pytest.raises(UserError, match=said):
            open_base(BaseOptions(name=str(name), config=str(tiny_base)))
    vae = str(tiny_base / "vae")
    base = open_base(BaseOptions(name=str(tmp_path / "no_vae.safetensors"), config=str(tiny_base), vae=vae))
    assert base.vae("cpu", torch.float32) is not None


def test_missing_configs_are_refused(file: Path, tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for config, said in [
        (None, r"takes its configs from .*Set --base\.config"),
        ("some/model", r"--base\.config some/model: no such folder.*Set --base\.config"),
        (str(tmp_path / "none"), r"--base\.config .*none: no such folder"),
        (str(tmp_path / "empty"), r"empty is not a base in diffusers layout: the folder unet/ is missing"),
    ]:
        with pytest.raises(UserError, match=said):
            open_base(BaseOptions(name=str(file), config=config))
    for other in ("nano", str(tiny_base)):
        with pytest.raises(UserError, match=r"--base\.config .*single file.*omit it"):
            open_base(BaseOptions(name=other, config=str(tiny_base)))


def shorter(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {**weights, name: weights[name][:2].clone()}


def without(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in weights.items() if key != name}


@pytest.mark.parametrize("spoil", [shorter, without])
@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet", UNET + "input_blocks.1.0.in_layers.2.weight"),
        ("unet", UNET + "label_emb.0.0.weight"),
        ("vae", VAE + "encoder.down.0.block.0.conv1.bias"),
        ("text_encoder", CLIP + "final_layer_norm.weight"),
        ("text_encoder_2", OPEN_CLIP + "ln_final.weight"),
    ],
)
def test_weights_that_do_not_fit_the_configs(
    file: Path, tiny_base: Path, tmp_path: Path, spoil: Callable[..., dict[str, Tensor]], part: str, name: str
) -> None:
    path = tmp_path / "spoilt.safetensors"
    save_file(spoil(load_file(file), name), path)
    base = open_base(BaseOptions(name=str(path), config=str(tiny_base)))
    with pytest.raises(UserError, match=rf"spoilt\.safetensors: its {part} does not match .*--base\.config"):
        getattr(base, "text_encoder" if part.startswith("text") else part)("cpu", torch.float32)
    (base.unet if part == "vae" else base.vae)("cpu", torch.float32)  # does not read the damaged part


def in_hf_layout(weights: dict[str, Tensor], folder: Path, prefix: str) -> dict[str, Tensor]:
    """The second text encoder under the names of transformers instead of OpenCLIP's."""
    (path,) = (folder / "text_encoder_2").glob("*.safetensors")
    encoder = {f"{prefix}{name}": tensor for name, tensor in load_file(path).items()}
    return {**{name: tensor for name, tensor in weights.items() if not name.startswith(OPEN_CLIP)}, **encoder}


PROJECTION = OPEN_CLIP + "text_projection"
LORA = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight"
SCALE = UNET + "input_blocks.4.1.transformer_blocks.0.attn1.to_q.scale_weight"


def odd_files(weights: dict[str, Tensor], folder: Path) -> dict[str, tuple[dict[str, Tensor], str]]:
    """Name of a file that is not quite a base of SDXL -> its weights, and what is said about it."""

    def only(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}

    no_projection = without(weights, PROJECTION)
    first, one = UNET + "input_blocks.0.0.weight", torch.zeros(1)
    return {
        "projection": ({**no_projection, f"{PROJECTION}.weight": weights[PROJECTION].T}, rf"{PROJECTION}\.weight"),
        "hf": (in_hf_layout(weights, folder, OPEN_CLIP), rf"another layout, such as {OPEN_CLIP}text_model\."),
        "hf_1": (
            in_hf_layout(weights, folder, "conditioner.embedders.1.transformer."),
            r"another layout, such as conditioner\.embedders\.1\.transformer\.",
        ),
        "flat": (
            {name.replace(CLIP, CLIP.removesuffix("text_model.")): tensor for name, tensor in weights.items()},
            r"another layout, such as conditioner\.embedders\.0\.transformer\.embeddings",
        ),
        "bare": ({name.removeprefix(UNET): tensor for name, tensor in weights.items()}, "a UNet alone"),
        "no_text": (
            {name: tensor for name, tensor in weights.items() if not name.startswith("conditioner.")},
            r"missing weights conditioner\.embedders\.0\.transformer\.text_model\.\*, conditioner\.embedders\.1",
        ),
        "lora": ({LORA: one}, "It is a LoRA: merge it into a base first"),
        "vae": (only(VAE), r"missing weights .*It is a VAE\. Name a complete checkpoint"),
        "sd15": (
            {first: weights[first], "cond_stage_model.x": one},
            r"Stable Diffusion 1 or 2 .*another layout, such as cond",
        ),
        "scaled": ({**weights, SCALE: one}, rf"unknown key {SCALE}: the weights are quantised with scales"),
        "block": ({**weights, UNET + "extra.weight": one}, rf"unknown key {UNET}extra\.weight"),
        "playground": ({**weights, "edm_mean": torch.zeros(4)}, "has the key edm_mean, .*noise schedule of EDM"),
        "cosxl": (
            {**weights, "edm_vpred.sigma_max": one, "v_pred": torch.zeros(0)},
            r"has the key edm_vpred\.sigma_max, .*noise schedule of EDM",
        ),
        "sigmas": (
            {**weights, "denoiser.sigmas": torch.linspace(0.03, 14.6, 1000)},
            r"the key denoiser\.sigmas, are not",
        ),
        "few": ({**weights, "denoiser.sigmas": torch.linspace(0.03, 14.6, 10)}, r"the key denoiser\.sigmas, are not"),
    }


@pytest.mark.parametrize(
    "name",
    [
        *("projection", "hf", "hf_1", "flat", "bare", "no_text", "lora", "vae", "sd15", "scaled", "block"),
        *("playground", "cosxl", "sigmas", "few"),
    ],
)
def test_an_odd_file_is_refused_by_what_is_odd_in_it(file: Path, tiny_base: Path, tmp_path: Path, name: str) -> None:
    weights, said = odd_files(load_file(file), tiny_base)[name]
    path = tmp_path / "odd.safetensors"
    save_file({key: tensor.contiguous().clone() for key, tensor in weights.items()}, path)
    with pytest.raises(UserError, match=rf"odd\.safetensors.*{said}"):
        open_base(BaseOptions(name=str(path), config=str(tiny_base)))


def test_weights_that_no_model_uses_change_nothing(
    file: Path, tiny_base: Path, in_folder: Base, tmp_path: Path
) -> None:
    """The EMA beside the weights, a training's counters, and noise levels that are those of the configs."""
    weights = load_file(file)
    schedule = NoiseSchedule.of(in_folder.scheduler())
    ema = {f"model_ema.{name.removeprefix(UNET).replace('.', '')}": tensor + 1 for name, tensor in weights.items()}
    sigmas = (schedule.sigmas / schedule.alphas).half()
    save_file(
        {**weights, **ema, "global_step": torch.zeros(1), "denoiser.sigmas": sigmas}, tmp_path / "more.safetensors"
    )
    base = open_base(BaseOptions(name=str(tmp_path / "more.safetensors"), config=str(tiny_base)))
    assert_same_bits(base.unet("cpu", torch.float32), in_folder.unet("cpu", torch.float32))
    assert_same_bits(base.vae("cpu", torch.float32), in_folder.vae("cpu", torch.float32))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_a_file_of_few_bits_has_the_rounded_weights(
    file: Path, tiny_base: Path, in_folder: Base, tmp_path: Path, dtype: torch.dtype
) -> None:
    rounded = {
        name: tensor.to(dtype) if tensor.is_floating_point() and name.startswith(UNET) else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(rounded, tmp_path / "few.safetensors")
    base = open_base(BaseOptions(name=str(tmp_path / "few.safetensors"), config=str(tiny_base)))
    unet, whole = (one.unet("cpu", torch.float32).state_dict() for one in (base, in_folder))
    assert unet.keys() == whole.keys()
    assert all(torch.equal(unet[name], whole[name].to(dtype).float()) for name in whole)
