"""YAML to a tree of options and back: strict, by type, with errors that name file, line and option."""

from __future__ import annotations

import string
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest

from t2i_adapter.config.read import describe, nearest, option_types, with_values
from t2i_adapter.config.recipe import dump, load
from t2i_adapter.config.tree import SECRET, Config, HubOptions, OptimOptions
from t2i_adapter.errors import UserError


def read(tmp_path: Path, text: str, defaults: Config | None = None) -> Config:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return load(file, defaults or Config())


def test_sets_what_is_written_and_keeps_the_rest(tmp_path: Path) -> None:
    mine = Config(output_dir="kept", optim=OptimOptions(lr=0.5, warmup_steps=7))
    config = read(tmp_path, "optim: {lr: 1e-4}\ntrain:\n  seed: 3\n", mine)
    assert config == with_values(mine, {"optim.lr": 1e-4, "train.seed": 3})
    assert config.optim.warmup_steps == 7 and config.output_dir == "kept"


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "data:\n  # resolution: 8\n"])
def test_an_empty_recipe_is_the_defaults(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text) == Config()


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("optim: {lr: 1e-4}", "optim.lr", 1e-4),  # text to YAML 1.1
        ("optim: {lr: 1}", "optim.lr", 1.0),
        ("optim: {max_grad_norm: .inf}", "optim.max_grad_norm", float("inf")),
        ("train: {mixed_precision: no}", "train.mixed_precision", "no"),  # false to YAML 1.1
        ("train: {mixed_precision: null}", "train.mixed_precision", None),
        ("train: {seed: ~}", "train.seed", None),
        ("data: {crops_coords_top_left_h: -1}", "data.crops_coords_top_left_h", -1),
        ("train: {max_steps: 1_000}", "train.max_steps", 1000),
        ("train: {allow_tf32: True}", "train.allow_tf32", True),
        ("base: {revision: 1234567}", "base.revision", "1234567"),
        ("base: {revision: 2024-01-31}", "base.revision", "2024-01-31"),  # a date to YAML 1.1
        ("base: {revision: 'null'}", "base.revision", "null"),
        ("data: {split: ''}", "data.split", ""),
        ("adapter: {in_channels: 1}", "adapter.in_channels", 1),
        ("optim: {betas: [0.8, 99e-2]}", "optim.betas", (0.8, 0.99)),
        ("validation: {prompts: [yes, a cat], images: [x.png]}", "validation.prompts", ("yes", "a cat")),
        ("validation: {prompts: []}", "validation.prompts", ()),
        ("train: {batch_size: &n 3, epochs: *n}", "train.epochs", 3),
    ],
)
def test_reads_by_the_type_of_the_option(tmp_path: Path, text: str, path: str, value: Any) -> None:
    config = read(tmp_path, text)
    part, _, name = path.partition(".")
    got = getattr(getattr(config, part), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data:\n  resolutoin: 8", "recipe.yaml:2: data.resolutoin: no such option; did you mean 'resolution'?"),
        ("optimizer: {lr: 1}", "recipe.yaml:1: optimizer: no such option; did you mean 'optim'?"),
        ("lr: 1", "recipe.yaml:1: lr: no such option; did you mean 'optim.lr'?"),
        (
            "cache_dir: x",
            "recipe.yaml:1: cache_dir: no such option; did you mean 'base.cache_dir' or 'data.cache_dir'?",
        ),
        ("hub: {zzzzzz: 1}", "hub.zzzzzz: no such option; hub has push, model_id, token, private"),
        ("<<: {a: 1}", "<<: no such option"),
        ("1: 2", "recipe.yaml:1: 1: no such option"),
        ("train:\n  seed: 1\n  seed: 2", "recipe.yaml:3: train.seed: is given twice"),
        ("train: {seed: 1}\ntrain: {epochs: 2}", "recipe.yaml:2: train: is given twice"),
        ("hub: {token: hf_x}", "hub.token: is a secret, which a recipe may not hold; give it as --hub.token"),
        ("train: 3", "recipe.yaml:1: train: expected options of its own, each on a line; got '3'"),
        ("- a\n- b", "recipe.yaml:1: the recipe: expected options of its own, each on a line; got a list"),
        ("word", "the recipe: expected options of its own"),
        ("train: {batch_size: 2.5}", "train.batch_size: got '2.5', allowed is a whole number"),
        ("train: {batch_size: 010}", "train.batch_size: got '010', allowed is a whole number"),
        ("train: {batch_size: 1:30}", "train.batch_size: got '1:30', allowed is a whole number"),
        ("train: {batch_size: '4'}", "train.batch_size: got '4' (in quotes), allowed is a whole number"),
        ("train: {batch_size: null}", "train.batch_size: got nothing, allowed is a whole number"),
        ("train: {batch_size:}", "train.batch_size: got nothing, allowed is a whole number"),
        ("train: {batch_size: [1]}", "train.batch_size: got a list, allowed is a whole number"),
        ("train: {seed: x}", "train.seed: got 'x', allowed is a whole number or None"),
        ("optim: {lr: fast}", "optim.lr: got 'fast', allowed is a number"),
        ("optim: {lr: .nan}", "optim.lr: got '.nan', allowed is a number"),
        ("optim: {lr: {a: 1}}", "optim.lr: got a mapping, allowed is a number"),
        ("hub: {push: yes}", "hub.push: got 'yes', allowed is true or false"),
        ("hub: {push: 1}", "hub.push: got '1', allowed is true or false"),
        ("data: {split: [a]}", "data.split: got a list, allowed is text"),
        ("data: {split: }", "data.split: got nothing, allowed is text"),
        ("adapter: {in_channels: 2}", "adapter.in_channels: got '2', allowed is one of 1, 3"),
        ("train: {mixed_precision: fp8}", "train.mixed_precision: got 'fp8', allowed is one of no, fp16, bf16 or None"),
        ("optim: {betas: [0.9]}", "optim.betas: got a list, allowed is 2 items, each a number"),
        ("optim: {betas: 0.9}", "optim.betas: got '0.9', allowed is 2 items, each a number"),
        ("optim: {betas: [0.9, x]}", "optim.betas[1]: got 'x', allowed is a number"),
        ("validation: {prompts: one}", "validation.prompts: got 'one', allowed is a list, each text"),
        ("data: {resolution: 0}", "recipe.yaml: --data.resolution 0: allowed is 1 to 8192 pixels"),
        ("validation: {prompts: [a]}", "recipe.yaml: --validation.prompts is given without --validation.images"),
        ("train: {seed: !!python/object/apply:os.getpid []}", "train.seed: got"),
        ("base: {name: !!python/name:os.system x}", "base.name: got"),
        ("base: {name: !secret x}", "base.name: got"),
        ("a: [", "recipe.yaml:1: not YAML:"),
        ("a: 1\n\tb: 2", "recipe.yaml:2: not YAML:"),
        ("a: *b", "not YAML: found undefined alias"),
        ("a: 1\n---\nb: 2", "not YAML:"),
        ("[" * 1200, "nested deeper than 50 levels"),
    ],
)
def test_refuses_with_the_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        read(tmp_path, text)
    assert message in str(refused.value)
    assert str(refused.value).startswith(str(tmp_path))


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("output_dir: \xe9".encode("latin-1"))
    for name, said in (("none.yaml", "No such file"), ("", "Is a directory"), ("latin.yaml", "not UTF-8 text")):
        with pytest.raises(UserError, match=said):
            load(tmp_path / name, Config())


def random_value(kind: Any, choices: np.random.Generator) -> Any:
    """A value of an option's type; texts are drawn to be hard to write down."""
    if NoneType in get_args(kind):
        (kind,) = (arg for arg in get_args(kind) if arg is not NoneType)
        if choices.random() < 0.3:
            return None
    if get_origin(kind) is Literal:
        return choices.choice(np.array(get_args(kind), dtype=object))
    if get_origin(kind) is tuple:
        each, *others = get_args(kind)
        return tuple(random_value(each, choices) for _ in range(2 if others == [each] else choices.integers(0, 4)))
    if kind is str:
        hard = [
            "no",
            "null",
            "~",
            "1e-4",
            "007",
            "",
            " a ",
            "- x",
            "a: b # c",
            "é\u2028\n\ttab",
            "'\"\\",
            "{[&*!",
            "🙂",
            "\x00\x7f",
        ]
        return str(choices.choice(hard)) if choices.random() < 0.6 else "".join(choices.choice([*string.printable], 60))
    if kind is bool:
        return bool(choices.random() < 0.5)
    return int(choices.integers(1, 10**9)) if kind is int else float(10.0 ** choices.uniform(-12, -0.01))


def random_tree(tree: Any, choices: np.random.Generator) -> Any:
    hints = get_type_hints(type(tree))
    values = {
        f.name: random_tree(getattr(tree, f.name), choices)
        if is_dataclass(hints[f.name])
        else random_value(hints[f.name], choices)
        for f in fields(tree)
        if not f.metadata.get(SECRET)
    }
    if {"prompts", "images"} <= set(values):
        values["images"] = tuple(reversed(values["prompts"]))
    checked = {
        "resolution": 64,
        "bucket_step": 64,
        "views": 2,
        "noise_draws": 2,
        "max_time": "90m",
        "patience": "30m",
        "stop_code": 75,
        "part": None,
        "schedule": "cosine",
        "captions": "filename",
        "conditioning_dir": None,
        "conditions": (),
        "compose": (),
        "license_name": None,
        "license_link": None,
        "held_out": 16,
        "budget": 0.25,
    }  # options of which not all values pass
    return replace(tree, **{**values, **{name: value for name, value in checked.items() if name in values}})


def test_what_is_dumped_reads_back_equal(tmp_path: Path) -> None:
    """50 random trees, hard texts included; a text's value, not its look in YAML, is what must survive."""
    choices = np.random.default_rng(0)
    for _ in range(50):
        config = random_tree(Config(), choices)
        (tmp_path / "run.yaml").write_text(dump(config), encoding="utf-8", newline="")
        assert load(tmp_path / "run.yaml", Config()) == config


def test_dump_leaves_secrets_out() -> None:
    text = dump(Config(hub=HubOptions(token="hf_abc", model_id="me/mine")))
    assert "hf_abc" not in text and "\n  token:" not in text and "me/mine" in text


def test_with_values_checks_once_with_everything() -> None:
    both = {"validation.prompts": ("a", "b"), "validation.images": ("x",)}
    assert with_values(Config(), both).validation.pairs() == [("a", "x"), ("b", "x")]
    assert with_values(Config(), {"optim.betas.1": 0.5}).optim.betas == (0.9, 0.5)
    with pytest.raises(UserError, match="--validation.prompts"):
        with_values(Config(), {"validation.prompts": ("a",)})


def test_nearest_knows_last_words_and_slips() -> None:
    known = list(option_types(Config))
    assert nearest("lr", known) == ["optim.lr"]
    assert nearest("train.batch_siz", known) == ["train.batch_size"]
    assert nearest("batchsize", known) == ["train.batch_size"]
    assert nearest("qqqqqqqqqq", known) == []


def test_describe_every_kind_of_option() -> None:
    assert describe(int | None) == "a whole number or None"
    assert describe(tuple[str, ...]) == "a list, each text"
    assert describe(Literal["a", "b"]) == "one of a, b"


def test_a_recipe_with_the_former_name_of_an_option_is_read(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("train: {lanes: 2}\n")
    assert load(tmp_path / "old.yaml", Config()).train.cpu_threads == 2
    (tmp_path / "both.yaml").write_text("train: {lanes: 2, cpu_threads: 3}\n")
    with pytest.raises(UserError, match="train.cpu_threads: is given twice"):
        load(tmp_path / "both.yaml", Config())
