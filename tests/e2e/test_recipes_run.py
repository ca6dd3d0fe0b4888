"""Every recipe prints its plan and runs two updates on the embedded base, with small local pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from support.runs import losses

from t2i_adapter.annotators.registry import find_plugin
from t2i_adapter.cli import main
from t2i_adapter.config.recipe import load
from t2i_adapter.config.tree import Config
from t2i_adapter.data.shapes import write_dataset

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
NO_WEIGHTS_HERE = "palette"
"""Stand-in for kinds whose weights are not in the package; it has three channels, as they have."""

SMALLER = {
    "base.name": "nano",
    "base.vae": "None",
    "base.variant": "None",
    "data.location": "None",
    "data.resolution": "64",
    "data.num_workers": "0",
    "optim.name": "adamw",
    "train.batch_size": "2",
    "train.gradient_accumulation_steps": "1",
    "train.max_steps": "2",
    "checkpoint.every": "2",
    "tracking.report_to": "none",
    "tracking.log_every": "1",
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    write_dataset(folder, num=4, split="train", size=64)
    return folder


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_runs_two_updates(file: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = load(file, Config())
    changes = {**SMALLER, "data.location": str(pictures), "output_dir": str(tmp_path / "run")}
    condition = config.data.condition
    if condition and find_plugin(condition.partition(",")[0]).facts.weights:
        changes["data.condition"] = NO_WEIGHTS_HERE
    if config.validation.images:
        Image.new("RGB", (64, 64)).save(tmp_path / "condition.png")
        changes |= {"validation.images": str(tmp_path / "condition.png"), "validation.prompts": "red circle"}
        changes |= {"validation.num_images": "1", "validation.steps": "1"}
    flags = [word for name, value in changes.items() for word in (f"--{name}", value)]
    assert main(["train", "--recipe", str(file), *flags]) == 0
    printed = capsys.readouterr().out
    assert f"learning rate  {config.optim.lr:g}" in printed and "updates        2" in printed
    found = losses(tmp_path / "run")
    assert len(found) == 2 and all(0 < loss < 100 for loss in found)
    recorded = json.loads((tmp_path / "run/t2i_adapter.json").read_text())["condition"]
    used = changes.get("data.condition", condition)
    assert (recorded["name"] == used.partition(",")[0]) if used else (recorded["column"] == "conditioning_image")
