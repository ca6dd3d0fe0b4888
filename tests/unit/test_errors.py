"""What a UserError prints at each front door, and what is removed from it."""

from __future__ import annotations

import pytest

from t2i_adapter.cli import main as cli_main
from t2i_adapter.errors import UserError, flag
from t2i_adapter.script import main as script_main


def test_a_line_begins_with_the_option_and_names_others_inside() -> None:
    error = UserError(
        f"0: allowed is a number above 0; or use {flag('optim.schedule')}", option="optim.lr", kind="range"
    )
    assert (error.option, error.kind) == ("optim.lr", "range")
    assert str(error) == "--optim.lr 0: allowed is a number above 0; or use --optim.schedule"
    script = {"optim.lr": "--learning_rate", "optim.schedule": "--lr_scheduler"}
    assert error.message(script.__getitem__) == "--learning_rate 0: allowed is a number above 0; or use --lr_scheduler"


def test_a_place_in_front_keeps_option_and_kind() -> None:
    outer = UserError("0: too small", option="data.resolution", kind="range").within("recipe.yaml")
    assert (outer.option, outer.kind) == ("data.resolution", "range")
    assert outer.message(lambda path: f"[{path}]") == "recipe.yaml: [data.resolution] 0: too small"


def test_secrets_are_removed_whoever_prints_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted_token")
    error = UserError("got hf_planted_token from https://me:word@host/x", option="hub.token")
    assert "planted" not in str(error) and "planted" not in error.message() and "word" not in str(error.within("x"))


@pytest.mark.parametrize(
    ("main", "words", "line"),
    [
        (cli_main, ["train", "--data=x", "--optim.lr=0"], "--optim.lr 0.0: allowed is"),
        (cli_main, ["plan", "--data=x", "--optim.betas", "0.9", "2"], "--optim.betas 2.0: allowed is"),
        (script_main, ["--train_data_dir=x", "--learning_rate=0"], "--learning_rate 0.0: allowed is"),
        (script_main, ["--train_data_dir=x", "--adam_beta2=2"], "--adam_beta2 2.0: allowed is"),
        (script_main, ["--train_data_dir=x", "--optim.eps=-1"], "--adam_epsilon -1.0: allowed is"),
        (script_main, ["--train_data_dir=x", "--data.views=0"], "--data.views 0: allowed is"),
    ],
)
def test_each_front_door_prints_its_own_flag(main, words: list[str], line: str, capsys) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(f"error: {line}")
