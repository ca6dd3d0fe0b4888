"""The Python API: a run with callbacks, options by path, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file
from support.runs import read_metrics
from support.tiny import write_adapter, write_circles

import t2i_adapter
from t2i_adapter import (
    Config,
    Event,
    Photo,
    StopTraining,
    UserError,
    generate,
    load,
    make_condition,
    make_config,
    train,
)
from t2i_adapter.cli import main

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_circles(tmp_path_factory.mktemp("api") / "data", num=24)


def config_for(data: Path, base: Path, out: Path, **changes: Any) -> Config:
    values = {
        "output_dir": out,
        "base.name": base,
        "data.location": data,
        "data.resolution": 64,
        "train.max_steps": 6,
        "train.batch_size": 2,
        "train.seed": 3,
        "tracking.log_every": 1,
        "tracking.report_to": "none",
        "checkpoint.every": 2,
        "validation.split": "none",
        "validation.budget": 0.5,
    }
    return make_config(values | changes)


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_callbacks_see_what_the_log_holds(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    config = config_for(data, tiny_base, tmp_path / "run", **{"train.max_steps": 60, "tracking.log_every": 20})
    run = train(config, callbacks=[events.append])
    assert run.is_finished and run.folder == tmp_path / "run"
    logged = [(line.pop("step"), line) for line in read_metrics(run.folder)]
    assert [(event.step, dict(event.values)) for event in events] == logged
    trained = [event for event in events if event.kind == "train"]
    assert [event.step for event in trained] == [20, 40, 60]
    assert all(event.steps == 60 and event.values["loss"] > 0 for event in trained)
    assert {event.kind for event in events} >= {"train", "gain"}


def test_a_callback_ends_a_run_that_then_goes_on(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    def stop_at_three(event: Event) -> None:
        if event.step == 3:
            raise StopTraining

    straight = train(config_for(data, tiny_base, tmp_path / "straight"))
    config = config_for(data, tiny_base, tmp_path / "run", **{"checkpoint.resume": "auto"})
    first = train(config, callbacks=[stop_at_three])
    assert not first.is_finished and "a callback asked for it" in first.reason
    assert not (first.folder / "config.json").exists() and (first.folder / "checkpoint-3").is_dir()
    second = train(config)
    assert second.is_finished
    ours, theirs = weights(second.folder), weights(straight.folder)
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_it_trains_in_a_thread(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    found: list[Any] = []
    worker = threading.Thread(target=lambda: found.append(train(config_for(data, tiny_base, tmp_path / "run"))))
    worker.start()
    worker.join(timeout=120)
    assert [run.is_finished for run in found] == [True]


def test_a_callback_that_fails_fails_the_run(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    def fail(event: Event) -> None:
        raise ZeroDivisionError("of the callback")

    with pytest.raises(ZeroDivisionError, match="of the callback"):
        train(config_for(data, tiny_base, tmp_path / "run"), callbacks=[fail])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim.rl": 1e-4}, "optim.rl: no such option; did you mean 'optim.lr'"),
        ({"optim.lr": "fast"}, "--optim.lr 'fast': allowed is a number"),
        ({"train.max_steps": 2.5}, "--train.max_steps 2.5: allowed is a whole number or None"),
        ({"optim.name": "adam"}, "--optim.name 'adam': allowed is one of adamw"),
        ({"optim.betas": 0.9}, "--optim.betas 0.9: allowed is 2 items, each a number"),
        ({"validation.prompts": "a cat"}, "--validation.prompts 'a cat': allowed is a list, each text"),
        ({"train.batch_size": 0}, "--train.batch_size 0: 1 or more"),
    ],
)
def test_options_are_checked_as_flags_are(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_config(values)
    assert message in str(caught.value)


def test_options_take_python_values() -> None:
    config = make_config({"optim.betas": (0.8, 0.9), "data.location": Path("pairs"), "train.max_steps": None})
    assert (config.optim.betas, config.data.location, config.train.max_steps) == ((0.8, 0.9), "pairs", None)
    assert make_config({"adapter.in_channels": 1}, recipe=RECIPES / "nano-shapes.yaml").adapter.in_channels == 1


def test_importing_the_package_loads_no_torch() -> None:
    program = "import sys, t2i_adapter; from t2i_adapter import train, Config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0


def test_a_wrong_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = t2i_adapter.trian


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "one", tiny_base, seed=1)


@pytest.fixture(scope="module")
def other(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "other", tiny_base, seed=2)


def pixels(pictures: list[Image.Image]) -> list[bytes]:
    return [picture.tobytes() for picture in pictures]


def test_it_generates_the_pictures_of_the_command(
    adapter: Path, tiny_base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    condition = data / "train" / "00000_outline.png"
    words = ["generate", "--adapter", adapter, "--base", tiny_base, "--prompt", "red circle", "--image", condition]
    words += ["--num", 2, "--seed", 5, "--steps", 2, "--width", 64, "--height", 64, "--scale", 0.5]
    assert main([*map(str, words), "--out", str(tmp_path)]) == 0, capsys.readouterr().err
    loaded = load(adapter, base=tiny_base)
    drawn = generate(loaded, "red circle", condition, num=2, seed=5, steps=2, size=(64, 64), scale=0.5)
    assert pixels(drawn) == pixels([Image.open(path).convert("RGB") for path in sorted(tmp_path.glob("*.png"))])
    with Image.open(condition) as picture:
        assert pixels(generate(loaded, "red circle", picture, num=2, seed=5, steps=2, scale=0.5)) == pixels(drawn)
    assert pixels(generate(loaded, "red circle", None, num=2, seed=5, steps=2, size=(64, 64))) != pixels(drawn)


def test_several_adapters_prompts_and_a_picture_to_begin_from(
    adapter: Path, other: Path, tiny_base: Path, data: Path
) -> None:
    first, second = (data / "train" / f"0000{number}_outline.png" for number in (0, 1))
    loaded = load([adapter, other], base=tiny_base)
    both = generate(loaded, ["a", "b"], [(first, second), (second, first)], steps=2, scale=(1.0, 0.0))
    alone = load(adapter, base=tiny_base)
    assert pixels(both) == pixels(generate(alone, ["a", "b"], [first, second], steps=2))
    begin = data / "train" / "00000.png"
    black = Image.new("L", (64, 64))
    (kept,) = generate(alone, "a", first, steps=2, init_image=begin, mask=black)
    with Image.open(begin) as picture:
        assert kept.tobytes() == picture.convert("RGB").tobytes()


def test_a_photo_gives_the_condition(adapter: Path, tiny_base: Path, data: Path) -> None:
    photo = data / "train" / "00000.png"
    found = make_condition(photo, "canny")
    assert found.size == (64, 64) and set(found.convert("L").tobytes()) == {0, 255}
    loaded = load(adapter, base=tiny_base)
    with pytest.raises(UserError, match="does not record how the conditions"):
        generate(loaded, "a", Photo(photo), steps=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepz": 2}, "stepz: no such option"),
        ({"scale": (1.0, 1.0)}, "2 values for 1 of"),
        ({"steps": 0}, "--steps 0: 1 or more"),
        ({"size": (60, 64)}, "multiples of"),
        ({"strength": 0.5}, "need init_image"),
        ({"condition": ["x.png", "y.png"], "prompt": ["a", "b", "c"]}, "2 conditions for 3 prompts"),
        ({"condition": "nowhere.png"}, "nowhere.png"),
    ],
)
def test_what_generate_refuses(
    adapter: Path, tiny_base: Path, data: Path, changes: dict[str, Any], message: str
) -> None:
    arguments = {"prompt": "a", "condition": data / "train" / "00000_outline.png", "steps": 2} | changes
    with pytest.raises(UserError) as caught:
        generate(load(adapter, base=tiny_base), **arguments)
    assert message in str(caught.value)


def test_load_refuses_what_it_does_not_know(adapter: Path, tiny_base: Path) -> None:
    with pytest.raises(UserError, match="fp8: no such option|precison: no such option"):
        load(adapter, base=tiny_base, precison="fp32")
    with pytest.raises(UserError, match="no adapter found"):
        load(tiny_base)
