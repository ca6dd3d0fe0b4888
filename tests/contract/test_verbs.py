"""The table of verbs: every row resolves, and every verb's `--help` is complete."""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest

from t2i_adapter.cli import VERBS, main
from t2i_adapter.config.read import describe, option_types
from t2i_adapter.flags import flag_types
from t2i_adapter.imports import resolve


@pytest.mark.parametrize("name", VERBS)
def test_row_resolves(name: str) -> None:
    verb = VERBS[name]
    options, function = resolve(verb.options), resolve(verb.function)
    assert dataclasses.is_dataclass(options)
    assert options.__dataclass_params__.frozen
    parameters = list(inspect.signature(function).parameters.values())
    assert parameters, f"{verb.function} takes no options"
    assert all(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in parameters[1:])
    assert verb.summary.endswith(".") and len(verb.summary) < 80


@pytest.mark.parametrize("name", VERBS)
def test_every_option_has_a_type_that_messages_can_name(name: str) -> None:
    for path, kind in option_types(resolve(VERBS[name].options)).items():
        assert describe(kind), path


@pytest.mark.parametrize("name", VERBS)
def test_help_shows_and_explains_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    assert not stop.value.code
    entries = help_entries(capsys.readouterr().out)
    flags = [f"--{path}" for path in flag_types(resolve(VERBS[name].options))]
    for flag in flags + (["--recipe", "--dry_run"] if name == "train" else []):
        assert flag in entries, f"{flag} is missing in the help of {name}"
        words = re.findall(r"[a-z]{2,}", re.sub(r"\(default:.*?\)|\(required\)", "", entries[flag]))
        assert len(words) >= 2, f"{flag} of {name} has no documentation under its field"


def help_entries(told: str) -> dict[str, str]:
    """Flag -> what the help says after it, from tyro's help with or without its boxes."""
    entries: dict[str, str] = {}
    flag = ""
    for shown in told.splitlines():
        line = re.sub(r"^-\w [^,]*, (?=--)", "", shown.strip("│ "))  # -o FILE, --out FILE
        if line.startswith("--") and set(line) != {"-"}:
            flag, _, line = re.sub(r", --\S+", "", line).partition(" ")
        entries[flag] = f"{entries.get(flag, '')} {line}"
    return entries
