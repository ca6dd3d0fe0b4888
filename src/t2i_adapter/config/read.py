"""What options a tree of dataclasses has, their types in words, and how values are set in it. Loads no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


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
    """The options of `known` that `name` may mean: the same last word (`lr`: `optim.lr`), else the most alike."""
    same_word = [path for path in known if path.rpartition(".")[2] == name.rpartition(".")[2]]
    if same_word:
        return same_word
    words: dict[str, str] = {path.rpartition(".")[2]: path for path in reversed(known)}
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7) or [
        words[word] for word in difflib.get_close_matches(name.rpartition(".")[2], list(words), n=1, cutoff=0.7)
    ]
    return close or difflib.get_close_matches(name, known, n=1, cutoff=0.5)


def describe(kind: Any) -> str:
    """A type of an option in words: "a whole number", "one of no, fp16, bf16 or None"."""
    if NoneType in get_args(kind):
        return " or ".join([*(describe(arg) for arg in get_args(kind) if arg is not NoneType), "None"])
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is tuple:
        each, *others = get_args(kind)
        return (
            f"a list, each {describe(each)}"
            if Ellipsis in others
            else f"{1 + len(others)} items, each {describe(each)}"
        )
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}[kind]
