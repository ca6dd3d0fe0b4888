"""Every recipe parses and says what its comments say."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from t2i_adapter.annotators.registry import open_annotator, open_recorded
from t2i_adapter.config.recipe import dump, load
from t2i_adapter.config.tree import Config
from t2i_adapter.flags import parse_train
from t2i_adapter.script import parse
from t2i_adapter.verbs.demo import DemoOptions, demo_config

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*"))


OFFICIAL = {"canny": 20_000, "sketch": 20_000, "depth-zoe": 25_000, "depth-midas": 35_000, "lineart": 0, "openpose": 0}
"""Updates that the model cards of the official adapters tell; 0 where one tells none."""


def recipe(name: str) -> Config:
    (file,) = (file for file in RECIPES if file.stem == name)
    return load(file, Config())


def test_there_are_recipes() -> None:
    assert {file.name for file in RECIPES} >= {
        "nano-shapes.yaml",
        "sdxl-canny-24gb.yaml",
        "sdxl-fill50k.yaml",
        "sdxl-8gb.yaml",
        "sdxl-palette.yaml",
        *(f"official-{name}.yaml" for name in OFFICIAL),
    }


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_parses_as_a_run_and_back(file: Path, tmp_path: Path) -> None:
    config = parse_train(["--recipe", str(file)], "t2i-adapter train").config
    assert config != Config()
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(tmp_path / "again.yaml", Config()) == config


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_resolution_suits_the_adapter(file: Path) -> None:
    config = load(file, Config())
    assert config.data.resolution % 16 == 0


def test_fill50k_is_the_guides_line() -> None:
    ours = recipe("sdxl-fill50k")
    line = """--pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0 --output_dir=runs/sdxl-fill50k
        --dataset_name=fusing/fill50k --mixed_precision=fp16 --resolution=1024 --learning_rate=1e-5
        --max_train_steps=15000 --validation_image ./conditioning_image_1.png ./conditioning_image_2.png
        --validation_prompt "red circle with blue background" "cyan circle with brown floral background"
        --validation_steps=100 --train_batch_size=1 --gradient_accumulation_steps=4 --seed=42"""
    guide = parse(shlex.split(line)).config
    for part in ("output_dir", "base", "data", "train", "checkpoint", "validation"):
        assert getattr(ours, part) == getattr(guide, part), part
    assert (ours.optim.lr, ours.optim.schedule) == (guide.optim.lr, guide.optim.schedule)


@pytest.mark.parametrize(("name", "steps"), OFFICIAL.items())
def test_an_official_adapter_is_its_cards(name: str, steps: int) -> None:
    config = recipe(f"official-{name}")
    assert 16 * config.train.batch_size * config.train.gradient_accumulation_steps == 256
    assert (config.optim.lr, config.optim.schedule) == (1e-5, "constant")
    assert config.train.max_steps == steps or (not steps and 20_000 <= (config.train.max_steps or 0) <= 35_000)
    assert (config.train.mixed_precision, config.data.resolution) == ("fp16", 1024)
    assert config.output_dir == f"runs/official-{name}"


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_its_condition_is_a_kind_that_there_is(file: Path) -> None:
    condition = load(file, Config()).data.condition
    if condition is not None:
        annotator = open_annotator(condition)
        assert open_recorded(annotator.record()).fingerprint == annotator.fingerprint


def test_nano_shapes_is_the_demos_training() -> None:
    ours, demo = recipe("nano-shapes"), DemoOptions()
    theirs = demo_config("data", "out", steps=demo.steps, seed=demo.seed)
    for part in ("base", "adapter", "objective", "optim", "train"):
        assert getattr(ours, part) == getattr(theirs, part), part
    assert ours.data.resolution == theirs.data.resolution
