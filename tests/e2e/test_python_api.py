"""The Python API: a run with callbacks, options by path, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.runs import read_metrics
from support.tiny import write_circles

import t2i_adapter
from t2i_adapter import Event, StopTraining, UserError, make_config, train
from t2i_adapter.config.tree import Config


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
    assert make_config({"adapter.in_channels": 1}, recipe="recipes/nano-shapes.yaml").adapter.in_channels == 1


def test_importing_the_package_loads_no_torch() -> None:
    program = "import sys, t2i_adapter; from t2i_adapter import train, Config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0


def test_a_wrong_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        t2i_adapter.trian  # noqa: B018
