"""Recipes, flags and addresses of any form give valid options or a one-line error, never a hang or a traceback.

Some tests assert only that no exception other than a `UserError` escapes; their docstrings say so.
"""

from __future__ import annotations

import string
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from t2i_adapter import script as compat
from t2i_adapter.config import recipe as load
from t2i_adapter.config.read import option_types
from t2i_adapter.config.tree import Config, DataOptions
from t2i_adapter.data.addresses import expand
from t2i_adapter.data.remote import find
from t2i_adapter.errors import UserError, redact
from t2i_adapter.flags import parse_train
from t2i_adapter.models.record import is_path

PATHS = sorted(option_types(Config))
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.dates(), st.binary(max_size=8)
)
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


def read(text: str | bytes) -> Config | None:
    """The options of a recipe; None if it is refused with one line."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        try:
            return load.load(file, Config())
        except UserError as fault:
            assert "\n" not in str(fault) and len(str(fault)) > 5
            return None


@given(st.binary(max_size=200))
@example(b"a: &a [*a]")
@example(b"data: &a {location: *a}")
@example(b"validation: {prompts: &p [x, *p]}")
@example(b"[" * 20_000)
@example(b"{a: " * 5_000)
@example(b"? " * 3_000)
@example(b"a: " + b"9" * 100_000)
@example(b"train: {seed: " + b"9" * 5_000 + b"}")
@example(b"!!python/object/apply:os.system ['true']")
@example(b"optim: !!python/name:os.system {}")
@example(b"optim: {lr: 1e999}")
@example(b"optim: {lr: .nan}")
@example(b'data: {location: "\\ud800"}')
def test_any_bytes_are_a_recipe_or_a_line(content: bytes):
    """Asserts only that no exception other than a one-line UserError escapes."""
    read(content)


def test_nested_aliases_are_refused_without_expanding_them():
    """Nine levels of nine aliases expand to a billion items."""
    lines = ['a0: &a0 ["x","x","x","x","x","x","x","x","x"]']
    lines += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    assert read("\n".join(lines)) is None
    assert read("validation:\n  prompts: &p [x, x]\n  images: *p\n") is not None


@given(st.sampled_from(PATHS), TREES)
def test_any_value_of_any_option_is_taken_or_refused(path: str, value: Any):
    nested = value
    for name in reversed(path.split(".")):
        nested = {name: nested}
    options = read(yaml.safe_dump(nested, allow_unicode=True))
    if options is not None and path != "hub.token":
        again = read(load.dump(options))
        assert again == options, "a written recipe is read back with other values"


@given(st.recursive(LEAVES, lambda inner: st.dictionaries(st.sampled_from([*PATHS, "data", "optim"]), inner)))
def test_any_tree_is_taken_or_refused(tree: Any):
    """Asserts only that no exception other than a one-line UserError escapes."""
    read(yaml.safe_dump(tree))


WORDS = st.lists(
    st.one_of(
        st.sampled_from([f"--{path}" for path in PATHS]),
        st.sampled_from([f"--{row.flag}" for row in compat.ROWS]),
        st.text(string.printable, max_size=12),
        st.sampled_from(
            ["--", "-", "", "--data", "--train.seed=1", "---x", "--no_data.flip", "--recipe", "1e-4", "=", "--="]
        ),
    ),
    max_size=5,
)


@given(WORDS)
@settings(max_examples=settings().max_examples // 2)
def test_any_words_are_flags_or_a_line(words: list[str]):
    """Asserts only that no exception other than a UserError escapes."""
    if {"-h", "--help"} & set(words):
        return
    for parse in (compat.parse, lambda argv: parse_train(argv, "t2i-adapter train", meant={})):
        try:
            parse(words)
        except UserError as fault:
            assert str(fault)


ADDRESSES = st.one_of(
    st.text(max_size=30),
    st.from_regex(r"(https?|s3|hf|file|ftp|x)://[ -~]{0,20}", fullmatch=True),
    st.from_regex(r"[a-z/.]{0,5}\{[0-9.,a-z{}]{0,12}\}[*?\[\]]{0,3}", fullmatch=True),
)


@given(ADDRESSES)
@example("http://[")
@example("http://[::1")
@example("https://host:99999999/x.tar")
@example("http://a:b@[x]/{0..1}.tar")
@example("{0..999999999}{0..999999999}.tar")
@example("{{{{")
@example("~nobody-of-this-name/x.tar")
@example("\0")
@example("x\0.jsonl")
@example("s3://")
@example("hf://@@/")
def test_any_address_is_found_or_a_line(text: str):
    """Asserts mostly that no exception other than a UserError escapes."""
    assert "\x1b" not in redact(text)
    is_path(text)
    try:
        options = DataOptions(location=text)
        expand(text)
        if "://" not in text or text.startswith("file://"):
            find(text)
    except UserError:
        return
    assert load.with_values(options, {}) == replace(options)


@pytest.mark.parametrize(
    "address", ["http://[", "http://[::1", "ftp://h/x", "simplecache::http://h/x", "http://127.0.0.1:99999999/x.jsonl"]
)
def test_an_invalid_address_is_one_line(address: str, tmp_path: Path):
    from t2i_adapter.data.source import open_source

    with pytest.raises(UserError):
        open_source(DataOptions(location=f"{address}{{0..1}}.tar", prepared_dir=str(tmp_path)), seed=0)
