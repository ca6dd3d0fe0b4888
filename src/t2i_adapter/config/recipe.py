"""A tree of options from a YAML recipe, and back. Importing this module loads no torch.

Strict, because a misspelt option that is silently the default costs a whole run: an unknown option is an error that
names the nearest one, a value of another type is an error, an option given twice is an error. PyYAML only parses;
values are read by the type of their option, so `lr: 1e-4` (text to YAML 1.1) is a number, `mixed_precision: no` (false
to YAML 1.1) is the word, and no tag can construct anything.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from t2i_adapter.config.read import describe, nearest, option_types, with_values
from t2i_adapter.config.tree import SECRET, to_dict
from t2i_adapter.errors import UserError

T = TypeVar("T")
_PLAIN_TAGS = {
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp", "seq", "map")
}


def load(file: str | Path, defaults: T) -> T:
    """`defaults`, a tree of dataclasses, with what the YAML recipe sets.

    Raises UserError naming file, line and option.
    """
    root = _compose(Path(file))
    values = dict(_read_options(root, type(defaults), "", Path(file))) if root else {}
    try:
        return with_values(defaults, values)
    except UserError as error:  # a check of the option tree itself
        raise UserError(f"{file}: {error}") from None


def dump(options: Any) -> str:
    """YAML text that `load` reads back to an equal tree; secrets are left out."""
    return yaml.safe_dump(to_dict(options), sort_keys=False, allow_unicode=True, width=120)


def _compose(file: Path) -> yaml.Node | None:
    try:
        text = file.read_text(encoding="utf-8")
        _check_depth(text, file)
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"--recipe {file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"--recipe {file}: is not text in UTF-8; a recipe is a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise UserError(f"{file}{f':{mark.line + 1}' if mark else ''}: not YAML: {problem}") from None


def _check_depth(text: str, file: Path) -> None:
    """PyYAML takes time with the square of the depth, and then all of the stack."""
    depth = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        depth += isinstance(token, _OPENING)
        depth -= isinstance(token, _CLOSING)
        if depth > _DEEPEST:
            raise UserError(f"{file}:{token.start_mark.line + 1}: is nested too deeply to be a recipe")


_DEEPEST = 50
_OPENING = (
    *(yaml.BlockMappingStartToken, yaml.BlockSequenceStartToken),
    *(yaml.FlowMappingStartToken, yaml.FlowSequenceStartToken),
)
_CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


def _read_options(node: yaml.Node, cls: type, prefix: str, file: Path) -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every option below `node`, which stands for the dataclass `cls`."""
    if _is_null(node):  # a section whose options are all commented out
        return
    if not isinstance(node, yaml.MappingNode):
        raise _error(file, node, prefix.rstrip("."), f"expected options of its own, each on a line; got {_got(node)}")
    hints = get_type_hints(cls)
    secret = {f.name for f in fields(cls) if f.metadata.get(SECRET)}
    seen: set[str] = set()
    for key, value in node.value:
        name = str(key.value)
        path = prefix + name
        if name not in hints:
            raise _error(file, key, path, f"no such option{_suggest(name, cls, prefix)}")
        if name in seen:
            raise _error(file, key, path, "is given twice; keep one")
        if name in secret:
            raise _error(file, key, path, f"is a secret and has no place in a recipe; give it as --{path}")
        seen.add(name)
        if is_dataclass(hints[name]):
            yield from _read_options(value, hints[name], f"{path}.", file)
        else:
            yield path, _read_value(value, hints[name], path, file)


def _suggest(name: str, cls: type, prefix: str) -> str:
    level = list(get_type_hints(cls))
    close = difflib.get_close_matches(name, level, n=1) or nearest(name, list(option_types(cls)))
    if close:
        return f"; did you mean {' or '.join(repr(option) for option in close)}?"
    return f"; {prefix.rstrip('.') or 'a recipe'} has {', '.join(level)}"


def _read_value(node: yaml.Node, kind: Any, path: str, file: Path) -> Any:
    """The value that `node` writes for an option of type `kind`."""
    inner = kind
    if NoneType in get_args(kind):
        if _is_null(node):
            return None
        (inner,) = (arg for arg in get_args(kind) if arg is not NoneType)
    try:
        if node.tag in _PLAIN_TAGS:
            return _read_tuple(node, inner, path, file) if get_origin(inner) is tuple else _read_scalar(node, inner)
    except (ValueError, KeyError):
        pass  # told below, with what was expected
    raise _error(file, node, path, f"got {_got(node)}, allowed is {describe(kind)}")


def _read_tuple(node: yaml.Node, kind: Any, path: str, file: Path) -> tuple[Any, ...]:
    kinds = get_args(kind)
    if not isinstance(node, yaml.SequenceNode):
        raise ValueError
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(node.value)
    if len(kinds) != len(node.value):
        raise ValueError
    return tuple(
        _read_value(item, kind, f"{path}[{index}]", file)
        for index, (item, kind) in enumerate(zip(node.value, kinds, strict=True))
    )


def _read_scalar(node: yaml.Node, kind: Any) -> Any:
    """Raises ValueError or KeyError where what is written is no `kind`."""
    if not isinstance(node, yaml.ScalarNode) or _is_null(node):
        raise ValueError
    text = node.value
    if get_origin(kind) is Literal:
        return {str(choice): choice for choice in get_args(kind)}[text]
    if kind is str:
        return text
    if node.style in ("'", '"'):
        raise ValueError(f"{text!r} in quotes is meant as text")
    return _READERS[kind](text)


def _read_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _read_int(text: str) -> int:
    if not re.fullmatch(r"[-+]?(0|[1-9][0-9_]*)", text):  # YAML 1.1 reads 010 as 8 and 1:30 as 90: refused
        raise ValueError(text)
    return int(text)


def _read_float(text: str) -> float:
    number = float(text.lower().replace(".inf", "inf"))
    if math.isnan(number):
        raise ValueError(text)
    return number


_READERS = {bool: _read_bool, int: _read_int, float: _read_float}


def _is_null(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def _got(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        quoted = " (in quotes)" if node.style in ("'", '"') else ""
        return "nothing" if _is_null(node) else f"{node.value!r}{quoted}"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _error(file: Path, node: yaml.Node, path: str, message: str) -> UserError:
    return UserError(f"{file}:{node.start_mark.line + 1}: {path or 'the recipe'}: {message}")
