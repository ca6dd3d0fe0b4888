"""Control is measured on pairs that the run does not train on, changes no number of the run, and survives a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.runs import read_metrics, tiny_config
from support.tiny import write_circles

from t2i_adapter.config.tree import Config
from t2i_adapter.data.source import open_source
from t2i_adapter.errors import Stopped, UserError
from t2i_adapter.training.advice import Advisor
from t2i_adapter.training.control import Control
from t2i_adapter.training.held_out import choose_held_out
from t2i_adapter.training.looks import LookPlan
from t2i_adapter.training.setup import Setup, make_trainer, set_up
from t2i_adapter.verbs.train import run

STEPS = 12
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 pairs, of which 10 are left out."""
    return write_circles(tmp_path_factory.mktemp("circles"), num=100)


@pytest.fixture
def config(tiny_base: Path, data: Path, tmp_path: Path) -> Config:
    """A run that pays for several looks."""
    return measured(tiny_base, data, tmp_path / "run")


PLAN = LookPlan(steps=(4, 8, 12), pairs=8, picture_steps=frozenset({4, 12}), pictures=2)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks as in PLAN, though so short a run would not pay for them."""
    monkeypatch.setattr("t2i_adapter.training.setup.make_look_plan", lambda *_, **__: PLAN)


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No look is skipped, however short the run."""
    monkeypatch.setattr(Control, "is_paid", lambda self, step, elapsed: True)


def measured(base: Path, data: Path, out: Path, **more: Any) -> Config:
    changes = {"train.max_steps": STEPS, "train.batch_size": 4, "optim.lr": 1e-3, "checkpoint.every": STEPS}
    changes |= {"validation.budget": 0.5, "validation.guidance": 1.0, "data.condition": "canny"}
    return tiny_config(base, data, out, {**changes, **{name.replace("__", "."): value for name, value in more.items()}})


def control_of(setup: Setup) -> Any:
    control = make_trainer(setup, setup.prepare_data()).control
    assert control is not None
    return control


def gains(folder: Path) -> list[dict[str, Any]]:
    return [row["gain"] for row in read_metrics(folder) if "gain" in row]


# Which pairs ------------------------------------------------------------------------------------------------------


def keys(source: Any) -> set[str]:
    return {source.key(index) for index in range(len(source))}


def held_out(config: Config) -> Any:
    return choose_held_out(config, open_source(config.data, 0))


def test_a_tenth_is_left_out_of_training_and_not_trained_on(config: Config):
    found = held_out(config)
    assert (len(found.training), len(found.measured), found.origin) == (90, 10, "held-out")
    assert not keys(found.training) & keys(found.measured)
    assert found.seen is not None and keys(found.seen) <= keys(found.training)
    assert set_up(config).plan.samples == 90


def test_the_choice_depends_on_neither_seed_nor_length(tiny_base: Path, data: Path, tmp_path: Path):
    some = held_out(measured(tiny_base, data, tmp_path / "a", train__seed=1, train__max_steps=3))
    assert keys(some.measured) == keys(held_out(measured(tiny_base, data, tmp_path / "b")).measured)


def test_a_split_for_tests_is_taken_if_there_is_one(tiny_base: Path, tmp_path: Path):
    data = write_circles(tmp_path / "circles", num=100)
    write_circles(data, num=12, split="test", seed=1)
    found = held_out(measured(tiny_base, data, tmp_path / "run"))
    assert (len(found.training), len(found.measured), found.origin) == (100, 12, "held-out")
    named = held_out(measured(tiny_base, data, tmp_path / "run", validation__split="test", validation__held_out=8))
    assert len(named.measured) == 8


def test_few_pairs_are_all_trained_on_and_measured_as_such(tiny_base: Path, tmp_path: Path):
    found = held_out(measured(tiny_base, write_circles(tmp_path / "few", num=20), tmp_path / "run"))
    assert (len(found.training), len(found.measured), found.origin, found.seen) == (20, 20, "training", None)


def test_none_leaves_none_out(tiny_base: Path, data: Path, tmp_path: Path):
    found = held_out(measured(tiny_base, data, tmp_path / "run", validation__split="none"))
    assert (len(found.training), found.origin) == (100, "training")


def test_a_split_that_does_not_exist_is_an_error(tiny_base: Path, data: Path, tmp_path: Path):
    with pytest.raises(UserError, match="nowhere"):
        held_out(measured(tiny_base, data, tmp_path / "run", validation__split="nowhere"))


# What is measured -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("planned")
def test_an_adapter_without_features_neither_reads_nor_helps(tiny_base: Path, data: Path, tmp_path: Path):
    setup = set_up(measured(tiny_base, data, tmp_path / "run", adapter__init="zero"))
    gain = control_of(setup).gain
    right, other, none = gain.right(setup.adapter), gain.other(setup.adapter), gain.none(setup.adapter)
    assert right.shape == (8, 4) and np.array_equal(right, other) and np.array_equal(right, none)
    assert (none > 0).all()


@pytest.mark.usefixtures("planned")
def test_losses_are_the_steps_own_and_do_not_depend_on_the_batch(tiny_base: Path, data: Path, tmp_path: Path):
    setup = set_up(measured(tiny_base, data, tmp_path / "run"))
    few = control_of(setup).gain
    many = control_of(set_up(measured(tiny_base, data, tmp_path / "more", train__batch_size=32))).gain
    assert np.allclose(few.right(setup.adapter), many.right(setup.adapter), rtol=1e-5)
    assert not np.array_equal(few.right(setup.adapter), few.other(setup.adapter))
    assert np.array_equal(few.right(setup.adapter), few.right(setup.adapter)), "noise and pairs are fixed"


@pytest.mark.usefixtures("planned", "unhurried")
def test_looks_are_logged_with_pictures_and_change_no_weight(
    config: Config, tiny_base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
):
    run(config)
    folder = Path(config.output_dir)
    found, scores = gains(folder), [row for row in read_metrics(folder) if "score" in row]
    assert [row["step"] for row in read_metrics(folder) if "gain" in row] == list(PLAN.steps)
    assert found[0]["pairs"] == 8 and found[0]["on"] == "held-out"
    assert found[0]["training_benefit"] and not found[1]["training_benefit"] and found[2]["training_benefit"]
    assert {band["t"] for band in found[0]["bands"]} == {187, 437, 687, 937}
    assert len(found[0]["pairs_benefit"]) == found[0]["pairs"]
    assert found[0]["benefit"]["low"] < found[0]["benefit"]["mean"] < found[0]["benefit"]["high"]
    assert [row["step"] for row in scores] == [4, 12]
    first = scores[0]
    pairs = json.loads((folder / "control" / "pairs.json").read_text())
    assert first["score"]["pictures"] == len(pairs) == 2
    assert first["score"]["target"]["mean"] == 1.0, "canny of the true picture is the condition itself"
    assert len(list((folder / "control" / f"step-{first['step']:06d}").glob("*.png"))) == len(pairs)
    assert (folder / "control" / "0-no_adapter.png").is_file()
    monkeypatch.undo()
    unmeasured = measured(tiny_base, data, folder.parent / "unmeasured", validation__budget=0.0)
    run(unmeasured)
    assert not gains(folder.parent / "unmeasured")
    a, b = (load_file(place / WEIGHTS) for place in (folder, folder.parent / "unmeasured"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.usefixtures("planned")
def test_a_look_beyond_the_budget_is_skipped(config: Config):
    control = make_trainer(setup := set_up(config), setup.prepare_data()).control
    assert control is not None
    control.budget = 0.05
    assert control(setup.adapter, 5, elapsed=1.0) is not None, "what a look costs is not known before the first"
    assert control(setup.adapter, 6, elapsed=1.0) is None
    assert control(setup.adapter, 7, elapsed=1e6) is not None


@pytest.mark.usefixtures("planned", "unhurried")
def test_a_resumed_run_continues_with_the_looks_before(config: Config):
    first = PLAN.steps[0]
    with pytest.raises(Stopped):
        run(config, stop_after=first)
    stored = json.loads((Path(config.output_dir) / "control" / "looks.json").read_text())
    trainer = make_trainer(setup := set_up(config_resumed(config)), setup.prepare_data())
    assert setup.resume is not None
    trainer.resume(setup.resume)
    assert trainer.control is not None
    assert [look.step for look in trainer.control.advisor.looks] == [first]
    assert trainer.control.advisor.to_json() == stored["looks"]


def config_resumed(config: Config) -> Config:
    from t2i_adapter.config.read import with_values

    return with_values(config, {"checkpoint.resume": "auto"})


def test_a_checkpoint_of_a_version_that_left_no_pairs_out_resumes_on_all_pairs(
    tiny_base: Path, data: Path, tmp_path: Path
):
    old = measured(tiny_base, data, tmp_path / "run", validation__split="none", validation__budget=0.0)
    with pytest.raises(Stopped):
        run(old, stop_after=2)
    folder = next((tmp_path / "run").glob("checkpoint-*"))
    state = json.loads((folder / "state.json").read_text())
    for name in ("split", "held_out", "budget"):
        del state["options"]["validation"][name]
    del state["sha256"]
    (folder / "state.json").write_text(json.dumps(state))
    new = measured(tiny_base, data, tmp_path / "run", checkpoint__resume="auto")
    assert set_up(new).plan.samples == 100


# What the run does with it ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("planned", "unhurried")
def test_a_plateau_ends_the_run_as_its_last_step_does(
    tiny_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    # When there is a plateau is tested in test_advice.py; this is what follows from it.
    monkeypatch.setattr(Advisor, "is_plateau", property(lambda self: len(self.looks) >= 2))
    config = measured(tiny_base, data, tmp_path / "run", train__stop_when="plateau", checkpoint__resume="auto")
    second = PLAN.steps[1]
    run(config)
    record = json.loads((tmp_path / "run" / "t2i_adapter.json").read_text())
    assert record["steps"] == second < STEPS
    assert (tmp_path / "run" / f"checkpoint-{second}").is_dir()
    run(config)
    assert "Finished already" in capsys.readouterr().out


@pytest.mark.usefixtures("planned", "unhurried")
def test_the_best_checkpoint_is_kept_without_validation_flags(tiny_base: Path, data: Path, tmp_path: Path):
    config = measured(tiny_base, data, tmp_path / "run", checkpoint__keep_best=True, checkpoint__keep=1)
    run(config)
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    assert best["step"] in [row["step"] for row in read_metrics(tmp_path / "run") if "gain" in row]
    assert (tmp_path / "run" / f"checkpoint-{best['step']}").is_dir()


def test_keeping_the_best_needs_a_measure(tiny_base: Path, data: Path, tmp_path: Path):
    with pytest.raises(UserError, match="budget"):
        set_up(measured(tiny_base, data, tmp_path / "run", checkpoint__keep_best=True, validation__budget=0.0))
