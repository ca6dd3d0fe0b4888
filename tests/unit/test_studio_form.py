"""Forms: every option of every verb is a flag, and values, commands and recipes say the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from t2i_adapter import cli
from t2i_adapter.config.tree import Config
from t2i_adapter.errors import UserError
from t2i_adapter.flags import flags_of, parse_flags, parse_train
from t2i_adapter.imports import resolve
from t2i_adapter.studio import form
from t2i_adapter.studio.jobs import QUEUES

TEXTS = (
    "a b",
    "-x",
    "é: #1 'q' \"p\"",
    "x",
    "canny",
    "1",
    "a/b",
    "16GB",
    "1:10,0.1",
    "187:0.8",
    "euler",
    "cpu",
    "1h",
    ".txt",
    "0-5",
)
NUMBERS = (0.5, 0.25, 1.0, 2.0, 0.01, 1e-6, 3.5, 20.0)
INTEGERS = (2, 3, 1, 7, 64, 128, 1024, 5000)
REQUIRED = {"out": "made", "adapter": ["a"], "data": "data", "folder": "a", "source": "a.pth", "repository": "a/b"}
REQUIRED |= {"kind": "canny", "location": "data", "to": "comfyui", "data.location": "data", "photo": "a.png"}
BESIDE: dict[str, dict[str, Any]] = {
    "generate": {"prompt": ["a"], "image": ["a.png"]},
    "annotate": {"data": "data", "out": "made"},
    "evaluate": {"data": "data"},
}
"""What a verb's own checks need beside an option."""
TOGETHER: dict[str, dict[str, Any]] = {
    "validation.images": {"validation.prompts": ["a"]},
    "validation.prompts": {"validation.images": ["a.png"]},
    "data.conditioning_dir": {"data.condition": None},
    "hub.license_name": {"hub.license": "other", "hub.license_link": "LICENSE"},
    "hub.license_link": {"hub.license": "other", "hub.license_name": "mine"},
    "license_name": {"license": "other", "license_link": "LICENSE"},
    "license_link": {"license": "other", "license_name": "mine"},
    "photo": {"image": [], "data": None},
    "condition": {"image": [], "photo": ["a.png"]},
    "prompt_file": {"prompt": [], "image": []},
    "mask": {"init_image": ["a.png"]},
    "strength": {"init_image": ["a.png"]},
    "controlnet": {"controlnet_image": ["a.png"]},
    "controlnet_image": {"controlnet": "a"},
    "controlnet_scale": {"controlnet": "a", "controlnet_image": ["a.png"]},
    "adapter.compose": {"data.conditions": []},
    "data.conditions": {"adapter.compose": ["a", "b"]},
}


def base_of(verb: str) -> dict[str, Any]:
    """Values with which a verb could start."""
    needed = {entry["path"]: REQUIRED[entry["path"]] for entry in form.schema(verb) if entry["required"]}
    needed |= {"data.location": "data"} if any(e["path"] == "data.location" for e in form.schema(verb)) else {}
    return needed | BESIDE.get(verb, {})


def together(verb: str, path: str) -> dict[str, Any]:
    """What an option needs beside it, of what a verb has."""
    known = {entry["path"] for entry in form.schema(verb)}
    return {name: value for name, value in TOGETHER.get(path, {}).items() if name in known}


def candidates(entry: dict[str, Any]) -> Iterator[Any]:
    """Values that an option may allow, others than its default."""
    plain = entry["choices"] or [*INTEGERS, *NUMBERS, *TEXTS]
    if entry["kind"] == "switch":
        yield not entry["default"]
    elif entry["kind"] == "list":
        for number, value in enumerate(plain):
            yield [value, plain[(number + 1) % len(plain)]]
            yield [value]
    elif entry["kind"] == "integer":
        yield from INTEGERS
    else:
        yield from plain


def parse(verb: str, argv: list[str]) -> Any:
    """The options that the command line reads from a verb's words."""
    assert argv[: len(verb.split())] == verb.split()
    words, cls = argv[len(verb.split()) :], resolve(cli.VERBS[verb].options)
    if cls is Config:
        return parse_train(words, "t").config
    if "config" in cls.__dataclass_fields__:
        return parse_train(words, "t", cls=cls)
    return parse_flags(cls, words, "t")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_option_of_the_form_is_a_flag_with_a_help(verb: str):
    flags = flags_of(resolve(cli.VERBS[verb].options))
    entries = form.schema(verb)
    assert [entry["path"] for entry in entries if entry["path"] not in flags] == []
    assert [entry["path"] for entry in entries if not entry["help"]] == []
    words_or_secrets = {name for name, flag in flags.items() if flag.label or name.rpartition(".")[2] == "token"}
    assert flags.keys() - {entry["path"] for entry in entries} <= {*form.HIDDEN, *words_or_secrets, "o"}


@pytest.mark.parametrize("verb", QUEUES)
def test_the_command_of_any_option_reads_back_to_the_same_options(verb: str):
    """One option at a time; a few depend on so many others that no value alone is allowed."""
    base, untried = base_of(verb), []
    for entry in form.schema(verb):
        path = entry["path"]
        more = together(verb, path)
        for value in candidates(entry):
            options, errors = form.read_options(verb, {**base, **more, path: value})
            if options is None:
                assert all(error["message"] for error in errors)
                continue
            assert parse(verb, form.argv_of(verb, options)) == options, (path, value)
            if form.changed(options).get(path) is not None:
                break
        else:
            untried.append(path)
    assert len(untried) <= 2, untried


def test_the_recipe_of_any_option_reads_back_to_the_same_options():
    base, tried = base_of("train"), 0
    for entry in form.schema("train"):
        for value in candidates(entry):
            options, _ = form.read_options("train", base | together("train", entry["path"]) | {entry["path"]: value})
            if options is not None:
                assert form.from_yaml(form.to_yaml(options)) == options, (entry["path"], value)
                tried += 1
                if entry["path"] not in ("data.caption_prefix", "validation.prompts"):
                    break
    assert tried > 100


def test_values_read_back_from_what_is_shown():
    """Recipe -> values -> recipe, as the page does it with its two views."""
    options = form.from_yaml("data:\n  location: 'a: b'\noptim:\n  lr: 2e-4\n  betas: [0.8, 0.9]\ntrain:\n  seed: 7\n")
    values = form.changed(options)
    assert values == {"data.location": "a: b", "optim.lr": 2e-4, "optim.betas": [0.8, 0.9], "train.seed": 7}
    assert form.read_options("train", values) == (options, [])
    assert form.to_yaml(Config()) == ""


@pytest.mark.parametrize(
    ("values", "option", "words"),
    [
        ({"train.batch_size": "many"}, "train.batch_size", "a whole number"),
        ({"train.batch_size": 1.5}, "train.batch_size", "a whole number"),
        ({"train.batch_size": None}, "train.batch_size", "a whole number"),
        ({"train.batch_size": [1]}, "train.batch_size", "a whole number"),
        ({"train.batch_size": {}}, "train.batch_size", "a whole number"),
        ({"train.batch_size": 0}, "train.batch_size", "0"),
        ({"train.mixed_precision": "fp61"}, "train.mixed_precision", "did you mean fp16"),
        ({"optim.betas": [0.9]}, "optim.betas", "2 items"),
        ({"data.flip": "yes"}, "data.flip", "true or false"),
        ({"train.batch_sise": 1}, None, "no such option"),
        ({"config.train.batch_size": 1}, None, "no such option"),
    ],
)
def test_a_bad_value_is_a_sentence_at_its_option(values: dict[str, Any], option: str | None, words: str):
    options, errors = form.read_options("train", {"data.location": "d", **values})
    assert options is None
    assert errors[0]["option"] == option
    assert words in str(errors[0]["message"])


def test_a_recipe_s_mistake_names_its_line():
    with pytest.raises(UserError, match="line 2: .*batch_sise.*batch_size"):
        form.from_yaml("train:\n  batch_sise: 4\n")


def test_secrets_are_no_options_of_a_form():
    assert not any("token" in entry["path"].rpartition(".")[2].split("_") for entry in form.schema("train"))
    with pytest.raises(UserError, match="token"):
        form.from_yaml("hub:\n  token: hf_x\n")


def test_a_mistake_names_its_option_once():
    with pytest.raises(UserError) as found:
        form.options_of("train", {"optim.lr": -1})
    assert str(found.value) == "--optim.lr -1.0: allowed is a number above 0"
    _, [error] = form.read_options("train", {"optim.lr": -1})
    assert error == {"option": "optim.lr", "message": "optim.lr -1.0: allowed is a number above 0"}
