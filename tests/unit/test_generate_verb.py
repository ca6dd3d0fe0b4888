"""The verb `generate`: conditions equal training's, a record generates its picture again, errors name the option."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from t2i_adapter.config.tree import AdapterOptions, BaseOptions
from t2i_adapter.data.geometry import Framing
from t2i_adapter.data.pair import PairTransform
from t2i_adapter.errors import UserError
from t2i_adapter.export.adapter import save_adapter
from t2i_adapter.flags import parse_flags
from t2i_adapter.generation.condition import fit_condition
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.open import open_base
from t2i_adapter.types import Sample
from t2i_adapter.verbs.generate import GenerateOptions, run


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    network = build_adapter(AdapterOptions(), open_base(BaseOptions(name=str(tiny_base))).unet_config)
    save_adapter(network, folder, metadata={"base": {"name": str(tiny_base)}, "resolution": 64}, fp16=False)
    return folder


@pytest.fixture(scope="module")
def condition(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("condition") / "my condition.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)).save(path)
    return path


def options(folder: Path, picture: Path, **changes: Any) -> GenerateOptions:
    given = {"adapter": str(folder), "prompt": ("red circle",), "image": (str(picture),), "steps": 1}
    return GenerateOptions(**{**given, **changes})


@pytest.mark.parametrize("original", [(90, 120), (120, 90), (64, 64), (33, 500)])
def test_a_square_is_cropped_as_in_training(original: tuple[int, int]) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*original, 3), np.uint8))
    for channels in (1, 3):
        trained = PairTransform(Framing(64), channels).crop(Sample("x", picture, picture, ("",), "0"), 0).condition
        ours = np.asarray(fit_condition(picture, (64, 64), channels)).reshape(64, 64, -1).transpose(2, 0, 1)
        assert np.array_equal(ours, trained)


def test_a_record_generates_its_picture_again(adapter: Path, condition: Path, tmp_path: Path) -> None:
    prompts = ('a "red" circle', "cyan circle")
    run(options(adapter, condition, prompt=prompts, num=2, seed=5, out=str(tmp_path / "a"), negative="blue, grün"))
    records = [json.loads((tmp_path / "a" / f"{i:05d}.json").read_text()) for i in range(4)]
    assert [record["options"]["seed"] for record in records] == [5, 6, 5, 6]
    assert [record["options"]["prompt"][0] for record in records] == [prompts[0]] * 2 + [prompts[1]] * 2
    words = shlex.split(records[1]["command"])
    assert words[:2] == ["t2i-adapter", "generate"]
    again = parse_flags(GenerateOptions, words[2:], "t2i-adapter generate")
    run(again)
    first, second = Image.open(tmp_path / "a" / "00001.png"), Image.open(tmp_path / "a" / "00004.png")
    # One picture instead of four at once: see tests/numerics/test_generate.py for the rounding.
    assert abs(np.asarray(first).astype(int) - np.asarray(second)).max() <= 1
    assert json.loads((tmp_path / "a" / "00004.json").read_text()) == records[1]


def test_sizes(adapter: Path, condition: Path, tmp_path: Path) -> None:
    def size(**changes: Any) -> tuple[int, int]:
        run(options(adapter, condition, out=str(tmp_path), **changes))
        return Image.open(sorted(tmp_path.glob("*.png"))[-1]).size

    assert size() == (64, 64), "the training resolution"
    assert size(width=96, height=48) == (96, 48)
    (adapter / "t2i_adapter.json").rename(tmp_path / "kept")
    try:
        base = json.loads((tmp_path / "kept").read_text())["base"]["name"]
        with pytest.raises(UserError, match=r"--height 90: .*80 or 96"):
            size(base=base)
        assert size(base=base, height=80, width=112) == (112, 80)
    finally:
        (tmp_path / "kept").rename(adapter / "t2i_adapter.json")


def test_errors_name_the_option(adapter: Path, condition: Path, tiny_base: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    network = build_adapter(AdapterOptions(), {"block_out_channels": (16, 32, 128)})
    save_adapter(network, wide, metadata={"base": {"name": str(tiny_base)}, "resolution": 64}, fp16=False)
    broken = tmp_path / "broken.png"
    broken.write_text("not a picture")
    for changes, named in [
        ({"image": ("missing.png",)}, r"--image.*missing\.png"),
        ({"image": (str(broken),)}, r"broken\.png"),
        ({"width": 70}, r"--width 70: .*64 or 80"),
        ({"adapter": str(tmp_path / "none")}, "no adapter found"),
        ({"adapter": str(wide)}, "does not fit"),
        ({"base": str(tmp_path)}, "not an SDXL"),
        ({"device": "cuda:9"}, "--device"),
        ({"device": "abacus"}, "--device abacus"),
        ({"offload": "model", "device": "cpu"}, "--offload model"),
        ({"xformers": True}, "--xformers"),
        ({"out": str(broken)}, "--out"),
    ]:
        with pytest.raises(UserError, match=named):
            run(options(adapter, condition, **{"out": str(tmp_path / "out"), **changes}))
    for changes, named in [
        ({"prompt": ("a", "b"), "image": ("1", "2", "3")}, "--prompt has 2 entries and --image 3"),
        ({"condition_factor": 1.5}, "--condition_factor"),
        ({"steps": 0}, "--steps"),
        ({"num": 0}, "--num"),
        ({"seed": -1}, "--seed"),
    ]:
        with pytest.raises(UserError, match=named):
            options(adapter, condition, **changes)
