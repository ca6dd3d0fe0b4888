"""Typed options from text: the one reader for YAML recipes, flags and plug-in options. Importing it loads no torch.

It is strict, because a value that is read as something else costs a whole run: an integer has no leading zero, NaN is
refused, and a choice must be one of those listed.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def read_value(text: str, kind: Any) -> Any:
    """The value of type `kind` that `text` writes; "None" is None if the type allows it. Raises ValueError.

    kind: str, int, float, bool, Path, a Literal, or one of these with `| None`.
    """
    if NoneType in get_args(kind):
        return None if text == "None" else read_value(text, without_none(kind))
    if get_origin(kind) is Literal:
        choices = {str(choice): choice for choice in get_args(kind)}
        if text not in choices:
            raise ValueError(text)
        return choices[text]
    return _READERS[kind](text)


def read_values(texts: Sequence[str], kind: Any) -> tuple[Any, ...]:
    """The tuple of type `kind` (tuple[X, ...] or tuple[X, Y]) whose items `texts` write. Raises ValueError."""
    kinds = item_kinds(kind, len(texts))
    return tuple(read_value(text, kind) for text, kind in zip(texts, kinds, strict=True))


def item_kinds(kind: Any, count: int) -> tuple[Any, ...]:
    """The types of the `count` items of a tuple of type `kind`. Raises ValueError if it has another number of items."""
    kinds = get_args(kind)
    if kinds[-1] is Ellipsis:
        return kinds[:1] * count
    if len(kinds) != count:
        raise ValueError(f"{count} items")
    return kinds


def without_none(kind: Any) -> Any:
    """The type X of `X | None`; any other type unchanged."""
    others = [arg for arg in get_args(kind) if arg is not NoneType]
    return others[0] if NoneType in get_args(kind) else kind


def describe(kind: Any) -> str:
    """A type in words: "a whole number", "one of no, fp16, bf16 or None"."""
    if NoneType in get_args(kind):
        return f"{describe(without_none(kind))} or None"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is tuple:
        each, *others = get_args(kind)
        count = "a list" if Ellipsis in others else f"{1 + len(others)} items"
        return f"{count}, each {describe(each)}"
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}[kind]


def allowed(kind: Any, text: str) -> str:
    """What is allowed instead of `text`, for an error: the type in words, and the choice that it may have meant."""
    choices = [str(choice) for choice in get_args(without_none(kind)) if isinstance(choice, str)]
    close = difflib.get_close_matches(text, choices, n=1)
    return f"allowed is {describe(kind)}" + (f"; did you mean {close[0]}?" if close else "")


def with_values(tree: T, values: Mapping[str, Any]) -> T:
    """A copy of a tree of dataclasses with `values`, by dotted path ("optim.lr"; "optim.betas.0" is a tuple's item).

    Each dataclass is made once, so its checks see all of its new values together.
    """
    changes: dict[str, Any] = {}
    for name in dict.fromkeys(path.partition(".")[0] for path in values):
        below = {path.partition(".")[2]: value for path, value in values.items() if path.partition(".")[0] == name}
        current = getattr(tree, name)
        if "" in below:
            changes[name] = below[""]
        elif isinstance(current, tuple):
            changes[name] = tuple(below.get(str(index), item) for index, item in enumerate(current))
        else:
            changes[name] = with_values(current, below)
    return replace(tree, **changes)  # type: ignore[type-var]  # T is always a dataclass here


def option_types(cls: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> type of every option of a tree of dataclasses, in the order of declaration."""
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(cls).items():
        found |= option_types(kind, f"{prefix}{name}.") if is_dataclass(kind) else {f"{prefix}{name}": kind}
    return found


def nearest(name: str, known: list[str]) -> list[str]:
    """The options of `known` that `name` may mean: those with its last word, else the most similar."""
    same_word = [path for path in known if path.rpartition(".")[2] == name.rpartition(".")[2]]
    if same_word:
        return same_word
    words: dict[str, str] = {path.rpartition(".")[2]: path for path in reversed(known)}
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7) or [
        words[word] for word in difflib.get_close_matches(name.rpartition(".")[2], list(words), n=1, cutoff=0.7)
    ]
    return close or difflib.get_close_matches(name, known, n=1, cutoff=0.5)


def _read_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _read_int(text: str) -> int:
    if not re.fullmatch(r"[-+]?(0|[1-9][0-9_]*)", text):  # YAML 1.1 reads 010 as 8 and 1:30 as 90
        raise ValueError(text)
    return int(text)


def _read_float(text: str) -> float:
    number = float(text.lower().replace(".inf", "inf"))  # YAML writes .inf
    if math.isnan(number):
        raise ValueError(text)
    return number


_READERS: dict[Any, Callable[[str], Any]] = {
    str: str,
    Path: Path,
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
}
