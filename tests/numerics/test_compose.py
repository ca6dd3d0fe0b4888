"""Adapters that are trained together: their sum, their weights in a batch, a run, its resume, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import MultiAdapter, T2IAdapter
from safetensors.torch import load_file, save_file
from support.runs import losses, tiny_config, train_words
from support.tiny import write_adapter, write_circles, write_tiny_sdxl

from t2i_adapter.batches.choices import WEIGHT_RANGE, choose, choose_weights
from t2i_adapter.batches.example import example_batch
from t2i_adapter.batches.loader import make_partial_batches
from t2i_adapter.cli import main
from t2i_adapter.config.tree import Config
from t2i_adapter.errors import Stopped
from t2i_adapter.models.joint import JointAdapter, adapters_in
from t2i_adapter.models.record import read_metadata
from t2i_adapter.training.accumulate import part
from t2i_adapter.training.looks import LookPlan
from t2i_adapter.training.memory import Shapes
from t2i_adapter.training.setup import set_up
from t2i_adapter.training.step import FrozenModel, batch_losses
from t2i_adapter.types import Batch
from t2i_adapter.verbs.train import run
from t2i_adapter.verbs.verify_resume import differences

CONDITIONS = ("column:conditioning_image", "canny")
WEIGHTS = "diffusion_pytorch_model.safetensors"
Adapters = tuple[Path, Path]


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    """Two adapters of random weights for the tiny base. Read only."""
    root = tmp_path_factory.mktemp("adapters")
    return write_adapter(root / "outline", tiny_base, seed=1), write_adapter(root / "lines", tiny_base, seed=2)


@pytest.fixture
def config(tiny_base: Path, tiny_data: Path, adapters: Adapters, tmp_path: Path) -> Config:
    return joint_config(tiny_base, tiny_data, adapters, tmp_path / "run")


def joint_config(base: Path, data: Path, adapters: Adapters, out: Path, **more: Any) -> Config:
    changes = {"adapter.compose": tuple(map(str, adapters)), "data.conditions": CONDITIONS, "train.max_steps": 6}
    changes |= {"optim.lr": 1e-3, "optim.warmup_steps": 0, "checkpoint.every": 1, "checkpoint.keep": None}
    return tiny_config(base, data, out, {**changes, **{name.replace("__", "."): value for name, value in more.items()}})


@pytest.fixture
def joint(adapters: Adapters) -> JointAdapter:
    return JointAdapter([T2IAdapter.from_pretrained(folder) for folder in adapters])


# The network ---------------------------------------------------------------------------------------------------------


def test_the_sum_is_that_of_diffusers_for_any_weights(joint: JointAdapter) -> None:
    condition = torch.rand(2, 6, 64, 64)
    for scales in ([1.0, 1.0], [0.5, 1.5], [0.0, 1.25]):
        ours = joint(condition, torch.tensor([scales, scales]))
        theirs = MultiAdapter(adapters_in(joint))([condition[:, :3], condition[:, 3:]], scales)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_without_weights_each_adapter_counts_once(joint: JointAdapter) -> None:
    condition = torch.rand(1, 6, 64, 64)
    for a, b in zip(joint(condition), joint(condition, torch.ones(1, 2)), strict=True):
        assert torch.equal(a, b)


def test_each_sample_has_its_own_weights(joint: JointAdapter) -> None:
    condition = torch.rand(2, 6, 64, 64)
    both = joint(condition, torch.tensor([[1.0, 0.0], [0.0, 0.7]]))
    first, second = joint.adapters[0](condition[:, :3]), joint.adapters[1](condition[:, 3:])
    for stage, a, b in zip(both, first, second, strict=True):
        torch.testing.assert_close(stage[0], a[0])
        torch.testing.assert_close(stage[1], 0.7 * b[1])


def joint_batch(frozen: FrozenModel, weights: list[list[float]]) -> Batch:
    torch.manual_seed(3)
    batch = example_batch(frozen.unet.config, len(weights), height=64, width=64, channels=6)
    return replace(batch, weights=torch.tensor(weights))


def test_an_adapter_that_is_left_out_gets_a_gradient_of_zero(frozen: FrozenModel, joint: JointAdapter) -> None:
    batch_losses(joint, frozen, joint_batch(frozen, [[0.8, 0.0], [1.2, 0.0]])).sum().backward()
    there, left_out = (
        [p.grad for p in adapter.parameters() if p.grad is not None]
        for adapter in (joint.adapters[0], joint.adapters[1])
    )
    assert left_out and all(not gradient.any() for gradient in left_out)
    assert any(gradient.any() for gradient in there)


def test_a_sample_without_conditions_has_the_loss_of_the_base(frozen: FrozenModel, joint: JointAdapter) -> None:
    batch = joint_batch(frozen, [[0.0, 0.0], [1.0, 1.0]])

    def nothing(condition: torch.Tensor, _: torch.Tensor) -> list[torch.Tensor]:
        return [torch.zeros_like(feature) for feature in joint(condition)]

    with torch.no_grad():
        ours, base = batch_losses(joint, frozen, batch), batch_losses(nothing, frozen, batch)
    assert ours[0] == base[0] and ours[1] != base[1]


def test_a_part_of_a_batch_has_its_weights(frozen: FrozenModel) -> None:
    batch = joint_batch(frozen, [[0.0, 1.0], [0.5, 0.0], [1.5, 0.7]])
    some = part(batch, 1, 3).weights
    assert some is not None and batch.weights is not None and torch.equal(some, batch.weights[1:])


# The choices ---------------------------------------------------------------------------------------------------------


def test_weights_have_the_shares_and_the_range_of_the_recipe() -> None:
    drawn = np.array([choose_weights(5, draw, 3) for draw in range(20_000)])
    there = drawn > 0
    # 0.1 all, 0.1 none, and in the rest three coins: 0.8 / 8 for all and for none.
    assert there.all(1).mean() == pytest.approx(0.1 + 0.8 / 8, abs=0.01)
    assert (~there).all(1).mean() == pytest.approx(0.1 + 0.8 / 8, abs=0.01)
    assert there.mean(0) == pytest.approx([0.5] * 3, abs=0.015)
    low, high = WEIGHT_RANGE
    assert drawn[there].min() >= low and drawn[there].max() <= high
    assert drawn[there].mean() == pytest.approx(1.0, abs=0.01)


def test_weights_are_a_function_of_seed_and_draw_and_change_no_other_choice() -> None:
    assert choose_weights(5, 7, 2) == choose_weights(5, 7, 2)
    assert len({choose_weights(seed, draw, 2) for seed in (5, 6) for draw in range(8)} - {(0.0, 0.0)}) > 5
    choices = choose(5, 7, (8, 8))
    assert choices.timestep not in choose_weights(5, 7, 8), "the streams are apart"


def test_loader_processes_and_the_training_process_hand_over_the_same_weights(config: Config) -> None:
    dataset = set_up(config).prepare_data().training
    taken = []
    for workers in (0, 1):
        changed = replace(config, data=replace(config.data, num_workers=workers))
        stream = make_partial_batches(dataset, changed, rank=0, world=1, start_step=2, stop_step=5, num_timesteps=1000)
        weights = [batch.weights for batch in stream]
        assert all(value is not None and value.shape == (2, 2) and value.dtype == torch.float32 for value in weights)
        taken.append(torch.cat([value for value in weights if value is not None]))
    assert torch.equal(taken[0], taken[1])
    wanted = [choose_weights(5, draw, 2) for draw in range(4, 10)]
    torch.testing.assert_close(taken[0], torch.tensor(wanted), rtol=0, atol=1e-7)


# A run ---------------------------------------------------------------------------------------------------------------


def test_a_run_trains_both_and_writes_each_to_a_folder_of_its_own(
    tiny_base: Path, tiny_data: Path, adapters: Adapters, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "joint"
    more = ["--train.max_steps", 6, "--optim.lr", "1e-3", "--compose", *adapters, "--conditions", *CONDITIONS]
    assert main(train_words(tiny_base, tiny_data, out, *more)) == 0
    shown = capsys.readouterr().out
    folders = [out / "adapter-0-outline", out / "adapter-1-lines"]
    for folder, old in zip(folders, adapters, strict=True):
        before, after = load_file(old / WEIGHTS), load_file(folder / WEIGHTS)
        assert before.keys() == after.keys()
        assert any(not torch.equal(before[name], after[name]) for name in before), "it was trained"
        assert f"evaluate --adapter {folder}" in shown and f"push --folder {folder}" in shown
    assert not (out / WEIGHTS).exists()
    opened = [T2IAdapter.from_pretrained(folder, local_files_only=True) for folder in folders]
    features = MultiAdapter(opened)([torch.rand(1, 3, 64, 64)] * 2, [1.0, 1.0])
    assert all(torch.isfinite(feature).all() for feature in features)
    first, second = (read_metadata(folder) for folder in folders)
    assert first is not None and second is not None
    assert first.condition["column"] == "conditioning_image" and second.condition["name"] == "canny"
    assert first.training["composed_with"] == [str(adapters[1])] and first.training["composed_weights"] == [0.5, 1.5]
    card = (folders[0] / "README.md").read_text()
    assert "trained together with" in card and "weight of 1" in card


def test_the_records_say_where_the_conditions_come_from(
    config: Config, tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run(config, summary=False)
    folders = (tmp_path / "run" / "adapter-0-outline", tmp_path / "run" / "adapter-1-lines")
    again = joint_config(tiny_base, tiny_data, folders, tmp_path / "again", data__conditions=(), train__max_steps=1)
    parts = set_up(again).source.parts
    assert [part.origin.partition(",")[0] for part in parts] == ["column:conditioning_image", "canny"]
    run(again, summary=False)
    names = sorted(path.name for path in (tmp_path / "again").glob("adapter-*"))
    assert names == ["adapter-0-outline", "adapter-1-lines"]


def test_the_plan_counts_the_weights_of_all(config: Config, adapters: Adapters) -> None:
    setup = set_up(config)
    wanted = sum(tensor.numel() for folder in adapters for tensor in load_file(folder / WEIGHTS).values())
    assert setup.plan.trainable_parameters == wanted
    memory = Shapes(config, setup.base, setup.adapter, torch.float32).memory(2, height=64, width=64)
    assert memory.adapter == 4 * wanted and memory.step > 0


def checkpoint_tensors(out: Path, step: int) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted((out / f"checkpoint-{step}").rglob("*.safetensors")):
        found |= {f"{file.parent.name}/{name}": tensor for name, tensor in load_file(file).items()}
    return found


def test_a_resumed_run_is_the_same_to_the_bit(config: Config, tmp_path: Path) -> None:
    ema = replace(config, train=replace(config.train, ema_decay=0.9))
    run(ema, summary=False)
    stopped = replace(ema, output_dir=str(tmp_path / "stopped"))
    with pytest.raises(Stopped):
        run(stopped, stop_after=3, summary=False)
    assert sorted(path.name for path in (tmp_path / "stopped" / "checkpoint-3").iterdir()) == [
        "state.json",
        "t2iadapter-0",
        "t2iadapter-1",
        "training.safetensors",
    ]
    resumed = replace(stopped, checkpoint=replace(stopped.checkpoint, resume="auto"))
    run(resumed, summary=False)
    a, b = checkpoint_tensors(tmp_path / "run", 6), checkpoint_tensors(tmp_path / "stopped", 6)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert losses(tmp_path / "run") == losses(tmp_path / "stopped")


def test_verify_resume_compares_both_adapters(config: Config, tmp_path: Path) -> None:
    run(config, summary=False)
    again = shutil.copytree(config.output_dir, tmp_path / "again")
    assert set(differences(tmp_path / "run", again, 6).values()) == {0.0}
    file = again / "checkpoint-6" / "t2iadapter-1" / WEIGHTS
    weights = load_file(file)
    weights["adapter.conv_in.bias"] += 1
    save_file(weights, file)
    found = differences(tmp_path / "run", again, 6)
    assert [name for name, value in found.items() if value] == ["t2iadapter-1/adapter.conv_in.bias"]


def test_a_finished_run_is_recognised(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    again = replace(config, checkpoint=replace(config.checkpoint, resume="auto"))
    run(again, summary=False)
    capsys.readouterr()
    run(again, summary=False)
    assert "Finished already" in capsys.readouterr().out


def test_other_adapters_are_another_run(config: Config, adapters: Adapters, fails: Callable[..., str]) -> None:
    run(config, summary=False)
    words = train_words(config.base.name, config.data.location, config.output_dir, "--checkpoint.resume", "auto")
    swapped = ["--compose", adapters[1], adapters[0], "--conditions", *CONDITIONS, "--train.seed=5"]
    assert "adapter.compose" in fails(*words, *swapped)


def test_threads_and_one_thread_train_alike(config: Config, tmp_path: Path) -> None:
    run(replace(config, train=replace(config.train, cpu_threads=1)), summary=False)
    other = replace(config, output_dir=str(tmp_path / "two"), train=replace(config.train, cpu_threads=2))
    run(other, summary=False)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "two"), rel=1e-4)


def test_control_of_the_sum_is_measured(
    tiny_base: Path, adapters: Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = LookPlan(steps=(2, 4), pairs=8, picture_steps=frozenset(), pictures=0)
    monkeypatch.setattr("t2i_adapter.training.setup.make_look_plan", lambda *_, **__: plan)
    monkeypatch.setattr("t2i_adapter.training.control.Control.is_paid", lambda *_: True)
    data = write_circles(tmp_path / "circles", num=100)
    run(joint_config(tiny_base, data, adapters, tmp_path / "run", train__max_steps=4), summary=False)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    gains = [row["gain"] for row in rows if "gain" in row]
    assert len(gains) == 2 and gains[-1]["on"] == "held-out"
    assert gains[0]["benefit"]["mean"] != 0, "random adapters change the loss"


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must end with a user error; returns its one line."""

    def fail(*words: object) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    return fail


def test_an_adapter_of_another_base_is_refused(
    tiny_base: Path, tiny_data: Path, adapters: Adapters, tmp_path: Path, fails: Callable[..., str]
) -> None:
    other = write_adapter(tmp_path / "wide", write_tiny_sdxl(tmp_path / "base", channels=(16, 32, 32)))
    words = train_words(tiny_base, tiny_data, tmp_path / "out", "--compose", adapters[0], other)
    line = fails(*words, "--conditions", *CONDITIONS)
    assert "wide" in line and "does not fit the base" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--compose", "{0}"], "name two adapters or more"),
        (["--compose", "{0}", "{1}"], "has no t2i_adapter.json that says how its condition is made"),
        (["--compose", "{0}", "{1}", "--conditions", "canny"], "1 conditions for 2 adapters"),
        (["--compose", "{0}", "{1}", "--conditions", "canny", "canny"], "two adapters would take the same condition"),
        (["--compose", "{0}", "{1}", "--conditions", "canny", "nothing"], "nothing"),
        (["--compose", "{0}", "{1}", "--conditions", "canny", "column:depth"], "no such column"),
        (["--compose", "{0}", "{1}", "--conditions", "canny", "folder:nowhere"], "which has none; name a column"),
        (["--compose", "{0}", "{1}", "--condition", "canny"], "is one condition for 2 adapters"),
        (["--conditions", "canny", "lineart"], "is for --adapter.compose"),
        (["--conditions", "canny", "lineart", "--condition", "canny"], "names the conditions of all adapters"),
        (["--compose", "{0}", "{1}", "--adapter.init_from", "{0}"], "omit one of them"),
        (["--compose", "{0}", "{1}", "--conditions", *CONDITIONS, "--hub.push"], "push each from its folder"),
        (
            ["--compose", "{0}", "{1}", "--conditions", *CONDITIONS, "--validation.judge", "canny"],
            "judges one condition",
        ),
        (
            *(["--compose", "{0}", "{1}", "--conditions", *CONDITIONS, "--validation.prompts", "a"],),
            "is given without --validation.images",
        ),
        (
            ["--compose", "{0}", "{1}", "--validation.prompts", "a", "--validation.images", "{0}/x.png"],
            "2 adapters take as many",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    tiny_base: Path,
    tiny_data: Path,
    adapters: Adapters,
    tmp_path: Path,
    fails: Callable[..., str],
    words: list[str],
    said: str,
) -> None:
    filled = [word.format(*adapters) for word in words]
    assert said in fails(*train_words(tiny_base, tiny_data, tmp_path / "out", *filled))


@pytest.mark.parametrize(
    ("change", "said"),
    [({"in_channels": 4}, "takes pictures of 4 channels"), ({"downscale_factor": 8}, "does not fit the base")],
)
def test_an_adapter_that_is_unlike_the_first_is_refused(
    tiny_base: Path,
    tiny_data: Path,
    adapters: Adapters,
    tmp_path: Path,
    fails: Callable[..., str],
    change: dict[str, int],
    said: str,
) -> None:
    sizes: Any = T2IAdapter.load_config(adapters[0])
    unlike: Any = T2IAdapter.from_config({**sizes, **change})
    unlike.save_pretrained(tmp_path / "unlike")
    words = train_words(tiny_base, tiny_data, tmp_path / "out", "--compose", adapters[0], tmp_path / "unlike")
    assert said in fails(*words, "--conditions", *CONDITIONS)


def test_code_that_a_record_names_is_not_run(
    tiny_base: Path, tiny_data: Path, adapters: Adapters, tmp_path: Path, fails: Callable[..., str]
) -> None:
    spoilt = tmp_path / "spoilt"
    shutil.copytree(adapters[0], spoilt)
    record = json.loads((spoilt / "t2i_adapter.json").read_text())
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')\n\n\nclass Evil:\n    pass\n")
    record["condition"] = {"name": f"{tmp_path / 'evil.py'}:Evil"}
    (spoilt / "t2i_adapter.json").write_text(json.dumps(record))
    line = fails(*train_words(tiny_base, tiny_data, tmp_path / "out", "--compose", spoilt, adapters[1]))
    assert "no installed annotator has that name" in line and not (tmp_path / "harm").exists()
