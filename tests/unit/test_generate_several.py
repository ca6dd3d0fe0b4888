"""`generate` with several adapters, from pictures, with LoRAs, schedulers, a ControlNet, a quantised base; grids."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from safetensors.torch import save_file
from support.tiny import write_adapter

from t2i_adapter.config.tree import AdapterOptions, BaseOptions
from t2i_adapter.errors import UserError
from t2i_adapter.export.adapter import save_adapter
from t2i_adapter.flags import parse_flags
from t2i_adapter.generation.prompts import Picture
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.distilled import base_advice, may_be_distilled
from t2i_adapter.models.lora import add_loras
from t2i_adapter.models.lora_file import Lora
from t2i_adapter.models.open import open_base
from t2i_adapter.verbs.generate import GenerateOptions, make_jobs, run

PROMPT = "red circle with blue background"


@pytest.fixture(scope="module")
def files(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters, `color` and `grey` (one channel), two condition pictures a.png and b.png, and a photo."""
    folder = tmp_path_factory.mktemp("files")
    write_adapter(folder / "color", tiny_base)
    torch.manual_seed(1)
    grey = build_adapter(AdapterOptions(in_channels=1), open_base(BaseOptions(name=str(tiny_base))).unet_config)
    record = {
        "base": {"name": str(tiny_base)},
        "resolution": 96,
        "condition": {"name": "canny", "channels": 1, "options": {"low": 50, "high": 100}},
    }
    save_adapter(grey, folder / "grey", metadata=record, fp16=False)
    for number, name in enumerate(("a", "b", "photo")):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{name}.png")
    return folder


class Drawer:
    """Runs the verb in a folder of files; `last` is what the last run printed."""

    def __init__(self, files: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.files, self.out, self.capsys = files, out, capsys
        self.runs = 0
        self.last = ""

    def __call__(self, words: str, **changes: Any) -> tuple[np.ndarray, dict[str, Any], str]:
        """Returns the first picture, its record and its text."""
        self.runs += 1
        self.folder = self.out / str(self.runs)
        words = words.replace("@", f"{self.files}/")
        argv = [*shlex.split(words), "--steps", "2", "--out", str(self.folder)] if "--steps" not in words else None
        argv = argv or [*shlex.split(words), "--out", str(self.folder)]
        if "--prompt" not in words:
            argv += ["--prompt", PROMPT]
        run(parse_flags(GenerateOptions, argv, "t2i-adapter generate"))
        self.last = self.capsys.readouterr().out
        return self.read(self.folder / "00000.png")

    @staticmethod
    def read(path: Path) -> tuple[np.ndarray, dict[str, Any], str]:
        picture: Any = Image.open(path)
        return (
            np.asarray(picture.convert("RGB")),
            json.loads(path.with_suffix(".json").read_text()),
            picture.text["parameters"],
        )

    def again(self, record: dict[str, Any]) -> np.ndarray:
        """The picture that a record's command generates."""
        again = parse_flags(GenerateOptions, shlex.split(record["command"])[2:], "t2i-adapter generate")
        run(again)
        newest = max(path for path in Path(again.out).glob("*.png") if path.stem.isdigit())
        found, other, _ = self.read(newest)
        assert other == record
        return found


@pytest.fixture
def draw(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Drawer:
    return Drawer(files, tmp_path, capsys)


BOTH = "--adapter @color @grey --image @a.png @b.png"

# Several adapters ---------------------------------------------------------------------------------------------------


def test_the_nth_value_belongs_to_the_nth_adapter(draw: Drawer) -> None:
    both, record, text = draw(f"{BOTH} --scale 1 0.5 --condition_factor 1 0.5 --control_guidance 1 2")
    assert record["options"]["scale"] == [1.0, 0.5]
    assert record["options"]["image"] == [str(draw.files / "a.png"), str(draw.files / "b.png")]
    assert len(set(record["adapter_sha256"])) == len(set(record["image_sha256"])) == 2
    assert "T2I-Adapter: color, " in text and "T2I-Adapter 2: grey, " in text
    assert "T2I-Adapter scale: 1.0" in text and "T2I-Adapter 2 scale: 0.5" in text
    assert "T2I-Adapter 2 end: 0.5" in text and "T2I-Adapter 2 guidance: 2.0" in text
    assert "T2I-Adapter 2 picture: b.png" in text
    assert "trained at different sizes" in draw.last and "grey 96 px" in draw.last
    assert np.array_equal(draw.again(record), both)


def test_each_adapter_acts_with_its_own_picture(draw: Drawer) -> None:
    both = draw(BOTH)[0]
    assert not np.array_equal(both, draw("--adapter @color @grey --image @b.png @a.png")[0])
    alone = draw("--adapter @color --image @a.png")[0]
    assert not np.array_equal(both, alone)
    assert np.array_equal(draw(f"{BOTH} --scale 1 0")[0], alone), "adding zeros changes no bit"
    assert np.array_equal(draw(f"{BOTH} --scale 0.5")[0], draw(f"{BOTH} --scale 0.5 0.5")[0]), "one value serves all"
    assert not np.array_equal(draw(f"{BOTH} --scale 0.5")[0], both)


def test_photos_and_pictures_are_mixed(draw: Drawer) -> None:
    picture, record, _ = draw("--adapter @color @grey --image @a.png none --photo none @photo.png")
    assert record["options"]["condition"][0] == "none" and record["options"]["condition"][1].startswith("canny,low=50")
    assert (draw.folder / "00000_condition2.png").is_file() and not (draw.folder / "00000_condition.png").exists()
    made = draw.folder / "00000_condition2.png"
    assert np.array_equal(draw(f"--adapter @color @grey --image @a.png {shlex.quote(str(made))}")[0], picture)
    assert np.array_equal(draw.again(record), picture)


def test_a_table_has_columns_for_each_adapter(files: Path, tmp_path: Path) -> None:
    table = tmp_path / "p.csv"
    table.write_text("prompt,image,photo_2,init_image,seed\nred,1.png,2.png,3.png,5\nblue,4.png,,6.png,\n")
    given = {"adapter": ("a", "b"), "prompt_file": str(table)}
    jobs = make_jobs(GenerateOptions(**given, photo=("none", "rest.png")))
    first, second = (str(tmp_path / f"{number}.png") for number in (1, 4))
    assert [job.pictures for job in jobs] == [
        (Picture(first), Picture(str(tmp_path / "2.png"), is_photo=True)),
        (Picture(second), Picture("rest.png", is_photo=True)),
    ]
    assert [job.init_image for job in jobs] == [str(tmp_path / "3.png"), str(tmp_path / "6.png")]
    with pytest.raises(UserError, match=r"line 3: names no picture for adapter 2; add a column image_2 or photo_2"):
        make_jobs(GenerateOptions(**given))
    with pytest.raises(UserError, match=r"unknown column 'photo_2'; allowed are prompt, image, photo, init_image"):
        make_jobs(GenerateOptions(**{**given, "adapter": ("a",)}, image=("x",)))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--adapter a b --image x y --scale 1 2 3", "--scale 3 values for 2 of --adapter"),
        ("--adapter a b --image x y z", "--image 3 pictures for 2 adapters"),
        ("--adapter a b --image x y --photo none z", "--photo z: --image has a picture for adapter 2, too"),
        ("--adapter a b --image x none", "no picture for adapter 2; set --image or --photo"),
        ("--adapter a b --image x y --scale 1 -1", "--scale -1.0"),
        ("--adapter a --image x --strength 0.5", "--strength 0.5: needs --init_image"),
        ("--adapter a --image x --mask m", "--mask m: needs --init_image"),
        ("--adapter a --image x --init_image i --strength 1.5", "--strength 1.5"),
        ("--adapter a --image x --scheduler eulr", "--scheduler eulr: no such scheduler; allowed are euler_a, euler"),
        ("--adapter a --image x --scheduler ddim_karras", "ddim has no other noise levels; write ddim"),
        ("--adapter a --image x --lora x.safetensors:inf", "--lora x.safetensors:inf"),
        ("--adapter a --image x --controlnet c", "--controlnet_image is needed"),
        ("--adapter a --image x --controlnet_image c", "--controlnet is needed"),
        ("--adapter a --image x --quantize int8 --offload sequential", "--quantize int8: cannot be moved"),
        ("--adapter a --image x --grid scale", "--grid scale: allowed is seeds"),
        ("--adapter a --image x --grid size=1", "--grid size=1: allowed is seeds"),
        ("--adapter a --image x --grid scale=1,two", "--grid scale=1,two: 'two' is no value of scale; allowed is"),
        ("--adapter a --image x --grid scale=-1", "--scale -1.0"),
    ],
)
def test_errors_name_the_option(words: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        parse_flags(GenerateOptions, [*shlex.split(words), "--prompt", "red"], "t2i-adapter generate")


def test_adapters_of_another_kind_or_base_are_named(files: Path, tiny_base: Path, draw: Drawer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--control_guidance 1.5 and 2: with --control_passes 3 each adapter has 1 or"):
        draw(f"{BOTH} --control_guidance 1.5 2 --control_passes 3")
    other = tmp_path / "other"
    shutil.copytree(files / "grey", other)
    record = json.loads((other / "t2i_adapter.json").read_text())
    (other / "t2i_adapter.json").write_text(json.dumps({**record, "base": {"name": "my-base"}}))
    draw(f"--adapter @color {other} --image @a.png")
    assert f"other was trained on my-base; the base is {tiny_base}" in draw.last


# From a picture -----------------------------------------------------------------------------------------------------


def test_a_picture_to_begin_from_and_a_mask(draw: Drawer, files: Path, tmp_path: Path) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    mask.save(tmp_path / "mask.png")
    one = "--adapter @color --image @a.png --init_image @photo.png"
    redrawn, record, text = draw(one)
    assert record["options"]["strength"] == 0.6 and "Denoising strength: 0.6, Init picture: photo.png" in text
    assert np.array_equal(draw.again(record), redrawn)
    masked, record, text = draw(f"{one} --mask {tmp_path}/mask.png")
    original = np.asarray(Image.open(files / "photo.png"))
    assert np.array_equal(masked[:, :32], original[:, :32]) and (masked[:, 48:] != original[:, 48:]).mean() > 0.9
    assert record["options"]["strength"] == 1.0 and "Mask blur: 4, Mask: mask.png" in text
    assert {"init_image_sha256", "mask_sha256"} <= set(record)
    assert np.array_equal(draw.again(record), masked)


def test_a_picture_to_begin_from_is_read_or_refused(draw: Drawer) -> None:
    with pytest.raises(UserError, match=r"--init_image.*none.png"):
        draw("--adapter @color --image @a.png --init_image @none.png")
    with pytest.raises(UserError, match="--prompt has 2 entries and --init_image 3"):
        draw("--adapter @color --image @a.png --prompt a b --init_image 1 2 3")


# Schedulers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "title"),
    [("dpmpp_2m_karras", "DPM++ 2M Karras"), ("DDIMScheduler", "DDIM"), ("heun", "Heun"), ("unipc", "UniPC")],
)
def test_a_scheduler_by_name(draw: Drawer, name: str, title: str) -> None:
    one = "--adapter @color --image @a.png --steps 4"
    picture, record, text = draw(f"{one} --scheduler {name}")
    assert f"Sampler: {title}, " in text
    plain, plain_record, _ = draw(one)
    assert not np.array_equal(picture, plain)
    assert plain_record["options"]["scheduler"] == "euler_a"
    assert np.array_equal(draw.again(record), picture)


def test_euler_a_by_name_is_the_default(draw: Drawer) -> None:
    one = "--adapter @color --image @a.png"
    assert np.array_equal(draw(f"{one} --scheduler euler_a")[0], draw(one)[0])


def test_what_a_scheduler_cannot_do_is_one_line(draw: Drawer) -> None:
    with pytest.raises(UserError, match="--scheduler lcm: cannot make 60 steps .*set other --steps"):
        draw("--adapter @color --image @a.png --scheduler lcm --steps 60")


# Bases for few steps ------------------------------------------------------------------------------------------------

SDXL = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "prediction_type": "epsilon"}


def test_what_a_base_says_about_its_steps() -> None:
    trailing = {**SDXL, "timestep_spacing": "trailing"}
    assert base_advice({"sample_size": 128}, SDXL) is None and may_be_distilled({"sample_size": 128}, SDXL) is None
    turbo = base_advice({"sample_size": 64}, trailing)
    assert turbo and (turbo.steps, turbo.guidance, turbo.scheduler) == (4, 0.0, None)
    lcm = base_advice({"sample_size": 128, "time_cond_proj_dim": 256}, SDXL)
    assert lcm and (lcm.steps, lcm.guidance, lcm.scheduler) == (4, 8.0, "lcm")
    merged = base_advice({"sample_size": 128}, {**SDXL, "_class_name": "TCDScheduler"})
    assert merged and merged.scheduler == "tcd"
    assert base_advice({"sample_size": 128}, trailing) is None
    assert "--steps to its number" in (may_be_distilled({"sample_size": 128}, trailing) or "")
    zero_snr = {**trailing, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    assert (
        may_be_distilled({"sample_size": 64}, zero_snr) is None and base_advice({"sample_size": 64}, zero_snr) is None
    )


def test_a_base_for_few_steps_sets_the_defaults(draw: Drawer, tiny_base: Path, tmp_path: Path) -> None:
    turbo = tmp_path / "turbo"
    shutil.copytree(tiny_base, turbo)
    for part, changes in (
        ("unet/config", {"sample_size": 64}),
        ("scheduler/scheduler_config", {"timestep_spacing": "trailing"}),
    ):
        file = turbo / f"{part}.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    words = ["--adapter", str(draw.files / "color"), "--image", str(draw.files / "a.png"), "--base", str(turbo)]

    def taken(*more: str) -> tuple[int, float]:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        argv = [*words, "--prompt", PROMPT, "--out", str(out), *more]
        run(parse_flags(GenerateOptions, argv, "t2i-adapter generate"))
        options = json.loads((out / "00000.json").read_text())["options"]
        return options["steps"], options["guidance"]

    assert taken() == (4, 0.0)
    assert "base: made for few steps (its timesteps are trailing" in draw.capsys.readouterr().out
    assert taken("--steps", "2", "--guidance", "1.5") == (2, 1.5), "what is given wins"
    assert "few steps" not in draw.capsys.readouterr().out


# LoRA ---------------------------------------------------------------------------------------------------------------

LAYERS = {
    "unet": (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0",
        "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "down_blocks.1.attentions.0.proj_in",
        "down_blocks.0.resnets.0.conv1",
    ),
    "text_encoder": ("encoder.layers.0.self_attn.q_proj", "encoder.layers.1.self_attn.out_proj"),
    "text_encoder_2": (
        "encoder.layers.1.mlp.fc1",
        "encoder.layers.0.self_attn.v_proj",
        "encoder.layers.0.self_attn.out_proj",
    ),
}
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_text_model_"}


def open_parts(base: Path) -> dict[str, Any]:
    opened = open_base(BaseOptions(name=str(base)))
    first, second = opened.text_encoder("cpu", torch.float32).encoders
    return {"unet": opened.unet("cpu", torch.float32), "text_encoder": first, "text_encoder_2": second}


def layer_of(part: Any, name: str) -> Any:
    modules = dict(part.named_modules())
    return modules[name] if name in modules else modules[f"text_model.{name}"]


def write_lora(path: Path, base: Path, form: str, alpha: float | None = None) -> dict[str, list[torch.Tensor]]:
    """Writes a LoRA of rank 2 of LAYERS; returns part -> the products B A of its layers."""
    torch.manual_seed(5)
    state: dict[str, torch.Tensor] = {}
    deltas: dict[str, list[torch.Tensor]] = {}
    for part, model in open_parts(base).items():
        deltas[part] = []
        for name in LAYERS[part]:
            weight = layer_of(model, name).weight
            down, up = torch.randn(2, *weight.shape[1:]), torch.randn(len(weight), 2, *[1] * (weight.ndim - 2))
            deltas[part].append((up.flatten(1) @ down.flatten(1)).view_as(weight))
            if form == "kohya":
                stem = KOHYA[part] + name.replace(".", "_")
                state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
                state |= {} if alpha is None else {f"{stem}.alpha": torch.tensor(alpha)}
            elif part == "unet":
                state |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
            else:
                stem = f"{part}.text_model.{name}.lora_linear_layer"
                state |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    described = {"unet.lora_alpha": alpha, "text_encoder.lora_alpha": alpha, "text_encoder_2.lora_alpha": alpha}
    has_description = form == "diffusers" and alpha is not None
    save_file(state, path, {"lora_adapter_metadata": json.dumps(described)} if has_description else None)
    return deltas


@pytest.mark.parametrize(
    ("form", "alpha", "factor"),
    [("kohya", 1.0, 0.5), ("kohya", None, 1.0), ("diffusers", None, 1.0), ("diffusers", 4.0, 2.0)],
)
def test_a_lora_adds_its_product(
    tiny_base: Path, tmp_path: Path, form: str, alpha: float | None, factor: float
) -> None:
    file = tmp_path / "x.safetensors"
    deltas = write_lora(file, tiny_base, form, alpha)
    plain, changed = open_parts(tiny_base), open_parts(tiny_base)
    add_loras([Lora(str(file), 0.8)], changed)
    for part in LAYERS:
        before, after = plain[part].state_dict(), changed[part].state_dict()
        assert sum(not torch.equal(before[name], after[name]) for name in before) == len(LAYERS[part])
        for name, delta in zip(LAYERS[part], deltas[part], strict=True):
            expected = layer_of(plain[part], name).weight + 0.8 * factor * delta
            assert torch.allclose(layer_of(changed[part], name).weight, expected, atol=1e-5), name


def test_loras_of_a_command(draw: Drawer, tiny_base: Path, tmp_path: Path) -> None:
    write_lora(tmp_path / "style.safetensors", tiny_base, "kohya", 1.0)
    one, file = "--adapter @color --image @a.png", tmp_path / "style.safetensors"
    picture, record, text = draw(f"{one} --lora {file}:0.1")
    plain = draw(one)[0]
    assert not np.array_equal(picture, plain)
    assert text.splitlines()[0] == f"{PROMPT} <lora:style:0.1>"
    assert len(record["lora_sha256"][0]) == 64
    assert np.array_equal(draw(f"{one} --lora {file}:0")[0], plain)
    assert abs(draw(f"{one} --lora {file}:0.1 {file}:-0.1")[0].astype(int) - plain).max() <= 1, "they cancel"
    assert np.array_equal(draw.again(record), picture)


def test_loras_that_do_not_fit_are_one_line(tiny_base: Path, files: Path, draw: Drawer, tmp_path: Path) -> None:
    one = "--adapter @color --image @a.png --lora"
    (tmp_path / "x.pt").write_bytes(b"")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    save_file(
        {"unet.mid_block.none.lora_A.weight": torch.ones(1, 4), "unet.mid_block.none.lora_B.weight": torch.ones(4, 1)},
        tmp_path / "other.safetensors",
    )
    save_file({"lora_unet_x.hada_w1_a": torch.ones(1, 4)}, tmp_path / "loha.safetensors")
    layer = LAYERS["unet"][0]
    save_file(
        {f"unet.{layer}.lora_A.weight": torch.ones(1, 7), f"unet.{layer}.lora_B.weight": torch.ones(9, 1)},
        tmp_path / "wide.safetensors",
    )
    for name, named in [
        ("x.pt", "pickled weights are not read"),
        ("broken.safetensors", "no LoRA found"),
        ("other.safetensors", "does not fit this base .*mid_block.none is missing"),
        ("wide.safetensors", "does not fit this base .a matrix is"),
        ("loha.safetensors", "no LoRA found|no matrix of a plain LoRA"),
        ("missing.safetensors", "no LoRA found"),
    ]:
        with pytest.raises(UserError, match=named) as fault:
            draw(f"{one} {tmp_path}/{name}")
        assert "\n" not in str(fault.value) and str(fault.value).startswith("--lora ")


# ControlNet, quantised base -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def controlnet(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    unet = open_base(BaseOptions(name=str(tiny_base))).unet("cpu", torch.float32)
    torch.manual_seed(3)
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 4, 8))
    for zeros in (network.controlnet_down_blocks, network.controlnet_cond_embedding.conv_out):
        for parameter in zeros.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("controlnet") / "edges"
    network.save_pretrained(folder)
    return folder


def test_a_controlnet_acts_beside_the_adapter(draw: Drawer, controlnet: Path) -> None:
    one, beside = "--adapter @color --image @a.png", f"--controlnet {controlnet} --controlnet_image @b.png"
    picture, record, text = draw(f"{one} {beside}")
    plain = draw(one)[0]
    assert not np.array_equal(picture, plain)
    assert np.array_equal(draw(f"{one} {beside} --controlnet_scale 0")[0], plain), "its residuals are zeros"
    assert not np.array_equal(draw(f"{one} {beside.replace('@b', '@a')}")[0], picture), "its picture acts"
    assert not np.array_equal(draw(f"{one} {beside} --scale 0")[0], picture), "the adapter acts"
    assert 'ControlNet 0: "Module: none, Model: edges, Weight: 1.0, Picture: b.png"' in text
    assert "controlnet_image_sha256" in record and np.array_equal(draw.again(record), picture)
    three = draw(f"{one} {beside} --control_guidance 2 --control_passes 3 --init_image @photo.png")[0]
    assert not np.array_equal(three, picture)


def test_a_controlnet_that_does_not_fit_is_one_line(draw: Drawer, controlnet: Path, tmp_path: Path) -> None:
    one = "--adapter @color --image @a.png --controlnet_image @b.png --controlnet"
    with pytest.raises(UserError, match="--controlnet .*no ControlNet found"):
        draw(f"{one} {tmp_path}")
    other = tmp_path / "other"
    shutil.copytree(controlnet, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "cross_attention_dim": 999}))
    with pytest.raises(UserError, match="--controlnet .*cross_attention_dim is 999, and 48 in the base"):
        draw(f"{one} {other}")
    (other / "config.json").write_text(json.dumps({**config, "_class_name": "ControlNetUnionModel"}))
    with pytest.raises(UserError, match="--controlnet .*is ControlNetUnionModel; allowed is ControlNetModel"):
        draw(f"{one} {other}")


def test_a_quantised_base_draws_almost_the_same(draw: Drawer) -> None:
    one = "--adapter @color --image @a.png"
    plain = draw(one)[0].astype(int)
    far = draw(f"{one} --seed 1")[0].astype(int)
    for kind in ("int8", "nf4"):
        picture, record, text = draw(f"{one} --quantize {kind}")
        assert 0 < abs(picture.astype(int) - plain).mean() < 0.3 * abs(far - plain).mean()
        assert f"Quantized: {kind}" in text and record["options"]["quantize"] == kind


@pytest.mark.parametrize(
    "words",
    [
        "--precision bf16 --scheduler heun --control_guidance 1.5 2",
        "--precision bf16 --scheduler sa_solver --control_guidance 1 2 --control_passes 3",
        "--quantize float8 --scheduler dpmpp_2m_sde_karras --max_tokens 150 --num 3 --batch_size 2 --guidance 1",
    ],
)
def test_all_of_it_together(draw: Drawer, controlnet: Path, tiny_base: Path, tmp_path: Path, words: str) -> None:
    write_lora(tmp_path / "style.safetensors", tiny_base, "kohya", 1.0)
    beside = f"--controlnet {controlnet} --controlnet_image @b.png --lora {tmp_path}/style.safetensors:0.01"
    begin = "--init_image @photo.png --mask @a.png --strength 0.7 --steps 4"
    picture, record, _ = draw(f"{BOTH} {beside} {begin} {words}")
    again = draw.again(record)
    # A batch of another length is summed in another order; bf16 has 8 bits.
    assert abs(again.astype(int) - picture).mean() < 1


# Grids --------------------------------------------------------------------------------------------------------------


def test_a_grid_of_seeds(draw: Drawer) -> None:
    draw("--adapter @color --image @a.png @b.png --num 3 --grid seeds")
    assert len(list(draw.folder.glob("0000?.png"))) == 6
    assert draw.last.splitlines()[-1].endswith("00000_grid.png")
    assert Image.open(draw.folder / "00000_grid.png").width == 1600


def test_a_grid_of_values(draw: Drawer) -> None:
    draw(f"{BOTH} --grid scale=0,0.5,1")
    records = [json.loads((draw.folder / f"{n:05d}.json").read_text()) for n in range(3)]
    assert [record["options"]["scale"] for record in records] == [[0.0, 0.0], [0.5, 0.5], [1.0, 1.0]]
    assert (draw.folder / "00000_grid.png").is_file()
    assert np.array_equal(Drawer.read(draw.folder / "00001.png")[0], draw(f"{BOTH} --scale 0.5")[0])
    draw("--adapter @color --image @a.png --grid scheduler=ddim,unipc")
    texts = [Drawer.read(draw.folder / f"{n:05d}.png")[2] for n in range(2)]
    assert ["Sampler: DDIM" in texts[0], "Sampler: UniPC" in texts[1]] == [True, True]
