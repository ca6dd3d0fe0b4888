"""The adapter's folder and its card."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import T2IAdapter
from PIL import Image
from safetensors.torch import save_file

from t2i_adapter.config.tree import AdapterOptions, BaseOptions
from t2i_adapter.errors import UserError
from t2i_adapter.export.adapter import save_adapter
from t2i_adapter.export.card import refresh_card, write_card
from t2i_adapter.export.card_code import steering_code, usage_code
from t2i_adapter.export.card_pictures import CardSample
from t2i_adapter.export.card_text import markdown
from t2i_adapter.generation.generate import generate
from t2i_adapter.generation.options import SamplingOptions
from t2i_adapter.models.adapter import build_adapter, load_adapter
from t2i_adapter.models.open import open_base
from t2i_adapter.models.record import Metadata, read_metadata

FILES = {
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "t2i_adapter.json",
}


@pytest.fixture(scope="module")
def adapter(tiny_base: Path) -> T2IAdapter:
    torch.manual_seed(0)
    return build_adapter(AdapterOptions(), open_base(BaseOptions(name=str(tiny_base))).unet_config)


def record(base: object, **changes: Any) -> dict[str, Any]:
    return {"base": {"name": str(base)}, "resolution": 64, "steps": 3, "seed": 1, **changes}


def test_weights_come_back_bit_for_bit_and_halved(adapter: T2IAdapter, tmp_path: Path) -> None:
    save_adapter(adapter, tmp_path, metadata=record("nano"))
    assert {path.name for path in tmp_path.iterdir()} == FILES, "and no temporary folder"
    full = T2IAdapter.from_pretrained(tmp_path)
    half = T2IAdapter.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert full.config.adapter_type == "full_adapter_xl"
    for name, tensor in adapter.state_dict().items():
        assert torch.equal(full.state_dict()[name], tensor)
        assert torch.equal(half.state_dict()[name], tensor.half()), "fp16 is the nearest half of each value"
        assert tensor.dtype == torch.float32, "the adapter itself is not changed"
    weights = {name: tensor.detach() for name, tensor in adapter.state_dict().items()}
    save_file(weights, tmp_path / "library.safetensors", metadata={"format": "pt"})
    written = (tmp_path / "diffusion_pytorch_model.safetensors").read_bytes()
    assert written == (tmp_path / "library.safetensors").read_bytes(), "the same file as the library's own writer makes"


def test_the_config_of_a_continued_adapter_has_no_local_path(adapter: T2IAdapter, tmp_path: Path) -> None:
    save_adapter(adapter, tmp_path / "first", metadata=record("nano"))
    save_adapter(load_adapter(str(tmp_path / "first")), tmp_path / "second", metadata=record("nano"), fp16=False)
    assert str(tmp_path) not in (tmp_path / "second" / "config.json").read_text()
    assert not (tmp_path / "second" / "diffusion_pytorch_model.fp16.safetensors").exists()


def test_a_save_that_fails_leaves_what_was_there(adapter: T2IAdapter, tmp_path: Path) -> None:
    save_adapter(adapter, tmp_path, metadata=record("nano"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="base"):
        save_adapter(adapter, tmp_path, metadata={"steps": 4})
    tmp_path.chmod(0o500)
    try:
        if not _is_root():
            with pytest.raises(UserError, match="cannot be written"):
                save_adapter(adapter, tmp_path, metadata=record("nano", steps=5))
    finally:
        tmp_path.chmod(0o700)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "a-file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_adapter(adapter, tmp_path / "a-file", metadata=record("nano"))


def _is_root() -> bool:
    import os

    return os.geteuid() == 0


def test_a_record_is_read_back_or_refused(tmp_path: Path) -> None:
    metadata = Metadata.from_dict(record("a/b", condition={"name": "outline", "channels": 3}, versions={"torch": "2"}))
    assert Metadata.from_dict(json.loads(json.dumps(metadata.to_dict()))) == metadata
    assert read_metadata(tmp_path) is None
    path = tmp_path / "t2i_adapter.json"
    for content, named in [
        ("{", "JSON"),
        ("[]", "an object"),
        ('{"schema": 2, "base": {"name": "x"}}', "schema 2"),
        ('{"base": {}}', "base.name"),
        ('{"base": {"name": "x"}, "resolution": "128"}', "resolution"),
        ('{"base": {"name": "x"}, "stepz": 1}', "stepz"),
        ('{"base": {"name": "x", "vae": 1}}', "base.vae"),
        ('{"base": {"name": "x"}, "training": {"max_tokens": 76}}', "max_tokens is 76; allowed are 75, 150, 225"),
        ('{"base": {"name": "x"}, "training": {"max_tokens": 75.0}}', "max_tokens is 75.0"),
        ('{"base": {"name": "x"}, "training": {"max_tokens": [75]}}', "max_tokens"),
    ]:
        path.write_text(content)
        with pytest.raises(UserError, match=named) as error:
            read_metadata(tmp_path)
        assert str(path) in str(error.value)


def test_the_published_record_has_no_local_paths(tmp_path: Path) -> None:
    metadata = Metadata.from_dict(
        {
            "base": {"name": str(tmp_path / "my-base"), "vae": "madebyollin/sdxl-vae-fp16-fix"},
            "data": {"train_data_dir": "/home/someone/secret-project/data", "folders": ["./x/y"], "rows": 5},
        }
    )
    public = metadata.without_local_paths().to_dict()
    assert public["base"]["name"] == "my-base"
    assert public["base"]["vae"] == "madebyollin/sdxl-vae-fp16-fix", "a hub id stays"
    assert public["data"] == {"train_data_dir": "data", "folders": ["y"], "rows": 5}


HOSTILE = '<script>alert(1)</script> | ` ``` [x](javascript:alert(1)) \n# "heading" <img src=x onerror=y>'


def make_card(folder: Path, **changes: Any) -> str:
    picture = Image.new("RGB", (64, 64), "red")
    sample = CardSample(HOSTILE, picture.convert("L"), [picture, picture])
    metadata = Metadata.from_dict(record(changes.pop("base", "owner/base"), optim={"lr": 1e-4, "note": HOSTILE}))
    return write_card(folder, metadata=metadata, repo_id="me/my-adapter", samples=[sample], **changes).read_text()


def test_the_card_escapes_and_shows(tmp_path: Path) -> None:
    card = make_card(tmp_path)
    _, head, body = card.split("---\n", 2)
    front = yaml.safe_load(head)
    assert front["base_model"] == "owner/base"
    assert "t2i-adapter" in front["tags"]
    assert "license" not in front, "there is no default"
    prose = re.sub("```.*?\n```\n", "", body, flags=re.DOTALL)
    assert "<script" not in prose and "<img" not in prose and "](javascript" not in prose
    assert "\n# \\" not in prose and prose.count("\n# ") == 1, "a caption makes no heading"
    assert "| lr | 0\\.0001 |" in body
    strip = Image.open(tmp_path / "images" / "sample_00.png")
    assert strip.size == (3 * 64, 64)
    assert "images/sample_00.png" in body


def test_the_card_names_only_a_hub_base_as_base_model(tmp_path: Path) -> None:
    for base in (str(tmp_path / "base"), "nano"):
        card = make_card(tmp_path / "card", base=base)
        assert "base_model" not in card
        assert str(tmp_path) not in card


def test_the_card_says_how_long_prompts_are_read(tmp_path: Path) -> None:
    assert "tokens" not in make_card(tmp_path)
    metadata = Metadata.from_dict(record("owner/base", training={"max_tokens": 150}))
    assert metadata.max_tokens == 150
    card = write_card(tmp_path, metadata=metadata, repo_id="me/my-adapter").read_text()
    assert "captions of up to 150 tokens, in chunks of 75" in card


def test_the_card_has_what_the_record_recommends(tmp_path: Path) -> None:
    """Also if it recommends it after the card was written; the rest of the card does not change."""
    before = make_card(tmp_path)
    [program] = re.findall("guidance, control_guidance = .*", before)
    assert program.startswith("guidance, control_guidance = 5.0, 1.5 ")
    assert "Recommended" not in before
    point = {"guidance": 3.0, "control_guidance": 2.0, "scale_schedule": "187:0.8,937:1.1", "from": {"metric": "x"}}
    metadata = Metadata.from_dict(record("owner/base", sampling=point)).without_local_paths()

    def refresh(metadata: Metadata) -> None:
        (tmp_path / "t2i_adapter.json").write_text(json.dumps(metadata.to_dict()))
        refresh_card(tmp_path)

    refresh(metadata)
    card = (tmp_path / "README.md").read_text()
    values = markdown("guidance 3.0, control_guidance 2.0, scale_schedule 187:0.8,937:1.1")
    assert f"Recommended for this adapter: {values}. `t2i-adapter generate` takes" in card
    assert "guidance, control_guidance = 3.0, 2.0 " in card
    assert "numpy.interp(float(args[1]), [187, 937], [0.8, 1.1])" in card
    refresh(Metadata.from_dict(record("owner/base")))
    assert (tmp_path / "README.md").read_text() == before
    for changes, has_program in [({"control_passes": 3, "control_guidance": 4}, True), ({"guidance": 1}, False)]:
        refresh(Metadata.from_dict(record("owner/base", sampling={"control_passes": 3, **changes})))
        card = (tmp_path / "README.md").read_text()
        assert "They were measured with a third pass of the UNet" in card
        assert ("def steer(" in card) is has_program


def test_markdown_shows_text_literally() -> None:
    assert markdown("a <b>\n`c`") == "a &lt;b&gt; \\`c\\`"


def test_the_cards_code_runs(adapter: T2IAdapter, tiny_base: Path, tmp_path: Path) -> None:
    """In a folder that holds the base and the adapter under the names in the card."""
    (tmp_path / "base").symlink_to(tiny_base)
    save_adapter(adapter, tmp_path / "me" / "my-adapter", metadata=record("base"))
    noise = np.random.default_rng(0).integers(0, 256, (80, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "condition.png")
    code = usage_code(Metadata.from_dict(record("base")), "me/my-adapter", prompt='a "red" circle')
    assert code in make_card(tmp_path / "card", base="base").replace(repr(HOSTILE), repr('a "red" circle'))
    sampling = SamplingOptions(
        steps=4, guidance=3.0, control_guidance=2.5, scale=0.8, condition_factor=0.7, scale_schedule="400:1,800:1.5"
    )
    code += f"\ntorch.manual_seed(7)\n{steering_code(sampling)}"
    code = code.replace("num_inference_steps=30", f"num_inference_steps={sampling.steps}")  # for speed
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "picture.png").size == (64, 64)
    # The second picture is the one of our own sampling. The rounding is that of tests/numerics/test_generate.py.
    pipeline = open_base(BaseOptions(name=str(tiny_base))).pipeline(adapter, "cpu", torch.float32)
    given = [Image.open(tmp_path / "condition.png").resize((64, 64))]

    def own(options: SamplingOptions) -> np.ndarray:
        [picture] = generate(pipeline, ['a "red" circle'], given, [7], size=(64, 64), sampling=options)
        return np.asarray(picture).astype(int)

    steered = np.asarray(Image.open(tmp_path / "steered.png"))
    assert abs(own(sampling) - steered).max() <= 1
    for name in ("control_guidance", "scale_schedule"):
        plain = replace(sampling, **{name: getattr(SamplingOptions(), name)})
        assert abs(own(plain) - steered).max() > 5, f"{name} has an effect"
    with_vae = usage_code(
        Metadata.from_dict({"base": {"name": "base", "vae": "v", "variant": "fp16"}}), "a", prompt="x", channels=1
    )
    compile(with_vae, "card", "exec")
    assert "vae=vae, " in with_vae and "variant='fp16'" in with_vae and '.convert("L")' in with_vae
