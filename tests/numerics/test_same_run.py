"""A run stays the same run: with a skipped step, a time limit, a resume, another split of its batch; and keep_best."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from safetensors.torch import load_file, save_file
from support.doc_pages import code
from support.push_hub import TOKEN, running_hub
from support.runs import read_metrics, tiny_config

from t2i_adapter import script as compat
from t2i_adapter.cli import main
from t2i_adapter.config import recipe as load
from t2i_adapter.config.read import with_values
from t2i_adapter.config.tree import (
    CheckpointOptions,
    Config,
    HubOptions,
    TrackingOptions,
    TrainOptions,
    ValidationOptions,
    seconds_of,
    to_dict,
)
from t2i_adapter.errors import Stopped, UserError
from t2i_adapter.flags import parse_train
from t2i_adapter.training import nonfinite, resume
from t2i_adapter.training.loop import Trainer
from t2i_adapter.training.muon import Muon
from t2i_adapter.training.setup import make_trainer, set_up
from t2i_adapter.training.signals import Stopper
from t2i_adapter.training.step import batch_losses
from t2i_adapter.types import Batch
from t2i_adapter.verbs import verify_resume as verify
from t2i_adapter.verbs.train import run

BAD_STEP = 3


@pytest.fixture
def config(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> Config:
    changes = {"train.max_steps": 6, "train.ema_decay": 0.9, "checkpoint.every": 1, "checkpoint.keep": None}
    changes |= {"optim.lr": 1e-3, "optim.schedule": "cosine", "optim.warmup_steps": 2}
    return tiny_config(tiny_base, tiny_data, tmp_path / "run", changes)


def with_nan(batches: Callable[[int], Iterator[Batch]]) -> Callable[[int], Iterator[Batch]]:
    """Batches whose second sample of step BAD_STEP has noise that is no number."""

    def spoilt(start: int) -> Iterator[Batch]:
        for step, batch in enumerate(batches(start), start):
            if step == BAD_STEP:
                noise = batch.noise.clone()
                noise[1, 0, 0, 0] = torch.nan
                batch = replace(batch, noise=noise)
            yield batch

    return spoilt


def trainer_with_a_bad_step(config: Config, stop_after: int | None = None) -> Trainer:
    setup = set_up(config)
    trainer = make_trainer(setup, setup.prepare_data(), Stopper(stop_after=stop_after))
    trainer.batches = with_nan(trainer.batches)
    Path(config.output_dir).mkdir(exist_ok=True)
    return trainer


def checkpoint_of(config: Config, step: int) -> dict[str, torch.Tensor]:
    folder = Path(config.output_dir) / f"checkpoint-{step}"
    return load_file(folder / "t2iadapter" / "diffusion_pytorch_model.safetensors") | load_file(
        folder / "training.safetensors"
    )


def different(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in a | b if name not in a or name not in b or not torch.equal(a[name], b[name])]


def test_a_bad_step_stops_before_the_optimiser_names_its_sample_and_keeps_its_batch(config: Config):
    trainer = trainer_with_a_bad_step(config)
    with pytest.raises(UserError, match="Step 3: NaN or inf in the gradient; the update was skipped") as told:
        trainer.fit()
    whole = replace(config, output_dir=f"{config.output_dir}-whole")
    run(whole)
    assert not different(checkpoint_of(config, BAD_STEP), checkpoint_of(whole, BAD_STEP))
    now = trainer.update.adapter.state_dict()
    kept = checkpoint_of(config, BAD_STEP)
    assert all(torch.equal(value, kept[f"weights.{name}"]) for name, value in now.items()), "the weights were touched"
    assert not (Path(config.output_dir) / "checkpoint-4").exists()

    (Path(config.output_dir) / "options.yaml").write_text(load.dump(config))
    page = Path(__file__).parents[2] / "docs" / "reliability.md"
    shown: dict[str, Any] = {}
    exec(code(page, "from dataclasses import replace").replace("my-adapter", config.output_dir), shown)
    (batch,) = shown["batches"]
    assert f"Samples: {batch.keys[1]} (timestep {batch.timesteps[1]}, loss nan)" in str(told.value)
    assert batch.keys[0] not in str(told.value)
    replayed = batch_losses(shown["setup"].adapter, shown["frozen"], batch).tolist()
    assert replayed[0] == replayed[0] and replayed[1] != replayed[1]


def test_a_bad_step_may_be_skipped_and_the_run_still_resumes_to_the_bit(config: Config):
    config = replace(config, train=replace(config.train, on_nonfinite="skip", max_nonfinite=1))
    trainer_with_a_bad_step(config).fit()
    assert not different(
        {k: v for k, v in checkpoint_of(config, 4).items() if k.startswith("weights.")},
        {k: v for k, v in checkpoint_of(config, 3).items() if k.startswith("weights.")},
    ), "the bad step moved the weights"
    rows = read_metrics(config.output_dir)
    assert [row["step"] for row in rows if row.get("loss", 0) > 0] == [1, 2, 3, 5, 6]
    assert ["NaN" in row["warning"] for row in rows if "warning" in row] == [True]

    stopped = replace(config, output_dir=f"{config.output_dir}-stopped")
    with pytest.raises(Stopped):
        trainer_with_a_bad_step(stopped, stop_after=4).fit()
    again = trainer_with_a_bad_step(replace(stopped, checkpoint=replace(stopped.checkpoint, resume="auto")))
    again.resume(Path(stopped.output_dir) / "checkpoint-4")
    assert again.skipped_steps == 1
    again.fit()
    assert not different(checkpoint_of(config, 6), checkpoint_of(stopped, 6))


def test_more_bad_steps_than_may_be_skipped_stop_the_run(config: Config):
    trainer = trainer_with_a_bad_step(
        replace(config, train=replace(config.train, on_nonfinite="skip", max_nonfinite=0))
    )
    with pytest.raises(UserError, match="Step 3: NaN or inf in the gradient"):
        trainer.fit()


@pytest.mark.parametrize("make", [partial(torch.optim.AdamW, fused=True), Muon], ids=["adamw", "muon"])
def test_an_optimiser_that_reads_found_inf_changes_nothing_in_a_skipped_step(make: Callable[..., Any]):
    """What the guard relies on if the host does not wait for the device. Weights, moments and counts stay."""
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 3)
    optimizer = make(network.parameters(), lr=0.1, weight_decay=0.1)
    guard = nonfinite.Guard(optimizer, supports_found_inf=True, is_scaled=False)

    def step(number: int, spoil: bool) -> None:
        network(torch.ones(1, 3)).sum().backward()
        if spoil:
            network.weight.grad[0, 0] = torch.nan  # type: ignore[index]
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        assert guard.allows(norm, number)
        optimizer.step()
        optimizer.zero_grad()

    def everything() -> list[torch.Tensor]:
        state = [value.clone() for entry in optimizer.state.values() for value in entry.values()]
        return [*(value.detach().clone() for value in network.parameters()), *state]

    step(0, False)
    before = everything()
    step(1, True)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    step(2, False)
    assert not torch.equal(before[0], everything()[0])
    assert guard.all() == [1] and guard.all() == []


def test_verify_resume_finds_no_difference(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """By a recipe, and flags that win over it, as `train` takes them."""
    (tmp_path / "run.yaml").write_text(load.dump(config))
    words = ["verify-resume", "--recipe", str(tmp_path / "run.yaml"), "--steps", "2", "--train.ema_decay", "0"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "are the same to the bit" in said and "logged losses" in said and "optimizer.0.exp_avg" in said
    assert "weights." not in said, "the flag has not won over the recipe"
    assert not Path(config.output_dir).exists()


def test_verify_resume_would_see_a_difference(tmp_path: Path):
    for name, seed in (("a", 0), ("b", 1)):
        torch.manual_seed(seed)
        folder = tmp_path / name / "checkpoint-2"
        (folder / "t2iadapter").mkdir(parents=True)
        save_file({"w": torch.rand(3)}, folder / "t2iadapter" / "diffusion_pytorch_model.safetensors")
        save_file({"s": torch.ones(1), f"only-{name}": torch.ones(1)}, folder / "training.safetensors")
        (tmp_path / name / "metrics.jsonl").write_text('{"loss": 1.0}\n')
    found = verify.differences(tmp_path / "a", tmp_path / "b", 2)
    assert found["s"] == found["logged losses"] == 0 and 0 < found["w"] < 1
    assert found["only-a"] == found["only-b"] == float("inf")


def test_a_tensor_that_differs_fails_unless_two_uninterrupted_runs_differ_so():
    exact = {"w": 0.0, "logged losses": 0.0}
    near, far = {"w": 3e-3, "logged losses": 0.0}, {"w": 3e-2, "logged losses": 0.0}
    assert verify.verdict(exact, None) == (
        "All 2 are the same to the bit: a resumed run equals an uninterrupted one here.",
        True,
    )
    assert verify.verdict({"w": 1e-300}, None)[1] is False, "nothing may differ"
    line, is_same = verify.verdict(near, {"w": 1e-3, "logged losses": 0.0})
    assert is_same and "Equality to the bit was not checked" in line and "--train.deterministic" in line
    line, is_same = verify.verdict(far, {"w": 1e-3, "logged losses": 0.0})
    assert not is_same and "1 do, first w" in line
    assert verify.verdict({"w": 5e-5}, {"w": 0.0})[1], "last bits, on a device where two runs were equal by chance"
    assert not verify.verdict({"w": 5e-4}, {"w": 0.0})[1]
    assert not verify.verdict({"w": float("inf")}, {"w": 1e-3})[1] and not verify.verdict({"w": 1e-3}, {})[1]


def test_a_distance_is_a_share_of_the_tensor_and_sees_every_bit():
    one = torch.tensor([3.0, 4.0])
    assert verify._distance(one, one.clone()) == 0
    assert verify._distance(one, torch.tensor([3.0, 4.5])) == pytest.approx(0.1)
    assert 0 < verify._distance(torch.zeros(2), -torch.zeros(2)) < 1e-300
    nan = torch.tensor([1.0, torch.nan])
    assert verify._distance(nan, nan.clone()) == 0 and verify._distance(nan, one) == float("inf")
    assert verify._distance(one, torch.ones(3)) == verify._distance(torch.zeros(2), one) == float("inf")


def test_a_resume_compares_the_precision_that_was_in_use(config: Config):
    """`None` is another precision on another device."""
    setup = set_up(config)
    state = {"options": to_dict(config), "plan": setup.plan.to_dict()}
    assert resume.changes(state, config, setup.plan.to_dict()) == []
    named = replace(config, train=replace(config.train, mixed_precision="no"))
    assert resume.changes(state, named, setup.plan.to_dict()) == []
    (change,) = resume.changes(state, config, {**setup.plan.to_dict(), "precision": "bf16"})
    assert str(change) == "train.mixed_precision fp32 -> bf16" and not change.is_harmless
    moved = replace(config, train=replace(config.train, device="cpu", deterministic=True))
    assert [(c.name, c.is_harmless) for c in resume.changes(state, moved, setup.plan.to_dict())] == [
        ("train.device", True),
        ("train.deterministic", True),
    ]


def test_the_best_checkpoint_by_its_pictures_is_kept(config: Config, tiny_data: Path):
    picture = next((tiny_data / "test").glob("*_*.png"))
    judged = replace(
        config,
        checkpoint=CheckpointOptions(every=6, keep=1, keep_best=True),
        validation=ValidationOptions(("red circle",), (str(picture),), num_images=1, every=2, steps=2, judge="grey"),
    )
    run(judged)
    folder = Path(judged.output_dir)
    rows = read_metrics(folder)
    scores = {row["step"]: row["control"] for row in rows if "control" in row}
    assert sorted(scores) == [0, 2, 4, 6] and all(0 <= score <= 1 for score in scores.values())
    best = max((step for step in scores if step), key=lambda step: scores[step])
    assert json.loads((folder / "best.json").read_text()) == {"step": best, "score": scores[best]}
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-6", f"checkpoint-{best}"}


def test_keep_best_without_anything_to_go_by_is_refused(config: Config, tiny_data: Path):
    asked = replace(config, checkpoint=replace(config.checkpoint, keep_best=True))
    with pytest.raises(UserError, match="keep_best needs a measure.*--validation.budget.*--validation.prompts"):
        set_up(asked)
    picture = next((tiny_data / "test").glob("*_*.png"))
    shown = replace(asked, validation=ValidationOptions(("red circle",), (str(picture),)))
    with pytest.raises(UserError, match="keep_best needs a measure.*--validation.judge"):
        set_up(shown)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client tries six times, and waits half a minute in all between: here a hundredth of it."""
    quick = {**vars(time), "sleep": lambda seconds: time.sleep(seconds / 100)}
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(**quick))


@pytest.mark.usefixtures("hasty")
def test_a_hub_out_of_reach_and_a_tracker_that_cannot_write_stop_no_run_that_goes_on(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    with pytest.raises(Stopped):
        run(config, stop_after=3)
    (tmp_path / "run" / "logs").write_text("a file where the tracker's folder is to be")
    again = replace(
        config,
        hub=HubOptions(push=True, token="hf_planted"),
        tracking=TrackingOptions(report_to="tensorboard", log_every=1),
        checkpoint=replace(config.checkpoint, resume="auto"),
    )
    with pytest.raises(UserError, match="hub.push"):
        run(replace(again, output_dir=f"{config.output_dir}-new"))
    run(again)  # the tests' surroundings are offline
    assert "Training does not wait for it" in capsys.readouterr().out
    assert "Could not start a tracker" in caplog.text
    assert (tmp_path / "run" / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("403", "403"),
        ("500", "500"),
        ("hung up", "disconnected"),
        ("silence", "Timeout"),
        ("slow", "Published: http"),
    ],
)
def test_a_hub_in_trouble_at_the_end_costs_a_line(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trouble: str, said: str
):
    with running_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("t2i_adapter.export.hub.READ_TIMEOUT", 1.0)
        hub.trouble = trouble
        short = replace(config, train=replace(config.train, max_steps=1), hub=HubOptions(push=True, token=TOKEN))
        run(short)
    told = capsys.readouterr().out
    (line,) = (line for line in told.splitlines() if said in line)
    assert line.startswith("Published") or "the request to the hub failed" in line
    assert ("to push it later: t2i-adapter push" in told) == (trouble != "slow")
    assert (Path(config.output_dir) / "diffusion_pytorch_model.safetensors").is_file()


class Unreliable(GeneralTracker):
    """A tracker that raises in the part that `fails` names."""

    name = "tensorboard"
    requires_logging_directory = False
    fails = ""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()
        self._may_fail("init")

    def _may_fail(self, part: str) -> None:
        if part == self.fails:
            raise ConnectionError(f"no {part}")

    @property
    def tracker(self) -> None: ...

    def start(self) -> None: ...

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._may_fail("start")

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self._may_fail("log")

    def finish(self) -> None:
        self._may_fail("end")


@pytest.mark.parametrize(("part", "said"), [("init", "start"), ("start", "start"), ("log", "log to"), ("end", "close")])
def test_a_tracker_that_fails_costs_a_line(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, part: str, said: str
):
    monkeypatch.setattr(Unreliable, "fails", part)
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Unreliable)
    run(replace(config, tracking=TrackingOptions(report_to="tensorboard", log_every=1)))
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("t2i_adapter")]
    assert lines == [f"Could not {said} a tracker (ConnectionError: no {part}); training goes on."]
    assert (Path(config.output_dir) / "diffusion_pytorch_model.safetensors").is_file()


# What may change ------------------------------------------------------------------------------------------------------


PLAN: dict[str, Any] = {"seed": 5, "global_batch": 4, "samples": 8, "precision": "fp32"}


def test_the_flags_that_stand_alone_are_those_of_the_tree_in_verb_and_script():
    given = ("--max_time", "2h", "--on_nonfinite=skip", "--allow-changed")
    for parsed in (
        parse_train(["--data", "x", *given], "t2i-adapter train"),
        compat.parse(["--pretrained_model_name_or_path", "nano", "--train_data_dir", "x", *given]),
    ):
        config = parsed.config
        assert (config.train.max_time, config.train.on_nonfinite) == ("2h", "skip")
        assert config.checkpoint.allow_changed


def changes(config: Config, plan: dict[str, Any] = PLAN, **state: Any) -> list[resume.Change]:
    return resume.changes({"options": to_dict(Config()), "plan": PLAN, **state}, config, plan)


def test_every_name_in_the_table_of_harmless_changes_is_an_option():
    known = set(load.option_types(Config))
    groups = {path.partition(".")[0] for path in known if "." in path}
    assert set(resume.HARMLESS) <= known | groups


@pytest.mark.parametrize("path", sorted({"base.name", "data.resolution", "adapter.num_res_blocks", "optim.name",
                                         "optim.lr", "objective.timesteps", "data.location"}))  # fmt: skip
def test_what_decides_the_numbers_makes_another_run(path: str):
    assert not resume.is_harmless(path)


def test_a_global_batch_that_is_split_otherwise_is_the_same_run():
    halves = replace(Config(), train=replace(Config().train, batch_size=2, gradient_accumulation_steps=2))
    found = changes(halves)
    assert [change.name for change in found] == ["train.batch_size", "train.gradient_accumulation_steps"]
    resume.check(found, "checkpoint-1", allowed=False)
    with pytest.raises(UserError, match="the global batch 4 -> 8 since checkpoint-1.*allow_changed"):
        resume.check(changes(halves, {**PLAN, "global_batch": 8}), "checkpoint-1", allowed=False)


def test_an_option_that_an_older_version_did_not_have_is_as_it_is_by_default():
    old = to_dict(Config())
    del old["train"]["ema_decay"]
    assert changes(Config(), options=old) == []
    newer = replace(Config(), train=replace(Config().train, ema_decay=0.9))
    assert [str(change) for change in changes(newer, options=old)] == ["train.ema_decay 0.0 -> 0.9"]


@pytest.mark.parametrize(("former", "other"), [("train_data_dir", "dataset_name"), ("dataset_name", "train_data_dir")])
def test_an_option_that_an_older_version_called_otherwise_is_the_same_one(former: str, other: str):
    config = with_values(Config(), {"data.location": "pairs"})
    old = to_dict(config)
    del old["data"]["location"]
    old["data"] |= {former: "pairs", other: None}
    assert changes(config, options=old) == []
    moved = with_values(Config(), {"data.location": "elsewhere"})
    assert [str(change) for change in changes(moved, options=old)] == ["data.location pairs -> elsewhere"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90m", 5400), ("1h30m", 5400), ("2h", 7200), ("12:00:00", 43200), ("1-12:00:00", 129600)],
)
def test_times(text: str, seconds: int):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "1.5h", "12:00", "h", "-1", "90 m", "1d2", "٣m"])
def test_what_is_no_time_is_refused(text: str):
    with pytest.raises(UserError, match="train.max_time .*write 90m"):
        TrainOptions(max_time=text)


def resume_lines(config: Config, capsys: pytest.CaptureFixture[str], **options: Any) -> list[str]:
    """What the run prints about its learning rate when it resumes with these options of `optim` and `train`."""
    names = {"max_steps": "train.max_steps", "epochs": "train.epochs"}
    values = {names.get(name, f"optim.{name}"): value for name, value in options.items()}
    capsys.readouterr()
    run(with_values(config, {**values, "checkpoint.resume": "checkpoint-4", "checkpoint.allow_changed": True}))
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("Learning rate: ")]


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({"schedule": "cosine", "max_steps": 8}, "0.0005, 0.5 of the peak rate"),
        ({"schedule": "cosine", "max_steps": 8, "schedule_from": 4}, None),
        ({"schedule": "cosine", "max_steps": 12, "schedule_from": 2}, "0.0009045, 0.9 of the peak rate"),
        ({"lr": 1e-4}, "0.0001, 1 of the peak rate"),
        ({"schedule": "constant_with_warmup", "warmup_steps": 8}, "0.0005, 0.5 of the peak rate"),
        ({"max_steps": 7}, None),
    ],
    ids=str,
)
def test_a_resume_says_which_learning_rate_the_next_step_gets(
    config: Config, capsys: pytest.CaptureFixture[str], options: dict[str, Any], rate: str | None
):
    config = with_values(config, {"optim.schedule": "constant", "optim.warmup_steps": 0, "train.max_steps": 5})
    run(config)
    had = "step 4 had 0.001, 1 of it."
    assert resume_lines(config, capsys, **options) == ([f"Learning rate: step 5 gets {rate}; {had}"] if rate else [])
    if "schedule_from" in options:
        logged = {row["step"]: row["lr"] for row in read_metrics(config.output_dir)}
        assert logged[options["schedule_from"]] == 1e-3 > logged[options["max_steps"]] > 0


def test_another_end_of_a_cosine_is_another_rate(config: Config, capsys: pytest.CaptureFixture[str]):
    run(with_values(config, {"optim.warmup_steps": 0, "train.max_steps": 5}))
    (line,) = resume_lines(with_values(config, {"optim.warmup_steps": 0}), capsys, max_steps=8)
    assert line.startswith("Learning rate: step 5 gets 0.0005, 0.5 of the peak rate; step 4 had 0.0003455, 0.35 of it")


def test_a_schedule_that_begins_after_the_end_is_refused(config: Config):
    with pytest.raises(UserError, match="optim.schedule_from 6: allowed is 0 to 5"):
        set_up(with_values(config, {"optim.schedule_from": 6}))
