"""YAML recipes: a file of options to a tree of dataclasses, and back. Importing this module loads no torch.

An unknown option is an error that names the nearest one. A value of another type is an error, and so is an option that
is given twice. PyYAML only parses; `config.read` reads each value by its option's type. So `lr: 1e-4`, text to YAML
1.1, is a number, `mixed_precision: no`, false to YAML 1.1, is the word, and no tag can construct an object.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from t2i_adapter.config.read import (
    describe,
    item_kinds,
    nearest,
    option_types,
    read_value,
    with_values,
    without_none,
)
from t2i_adapter.config.tree import SECRET, to_dict
from t2i_adapter.errors import UserError

T = TypeVar("T")
_PLAIN_TAGS = {
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp", "seq", "map")
}
_NULL = "tag:yaml.org,2002:null"
RENAMED = {
    "train.lanes": "train.cpu_threads",
    "data.train_data_dir": "data.location",
    "data.dataset_name": "data.location",
}
"""Former path of an option -> its path, for recipes and command lines written before."""
_MAX_DEPTH = 50
_OPENING = (
    *(yaml.BlockMappingStartToken, yaml.BlockSequenceStartToken),
    *(yaml.FlowMappingStartToken, yaml.FlowSequenceStartToken),
)
_CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


def load(file: str | Path, defaults: T) -> T:
    """`defaults`, a tree of dataclasses, with what the YAML recipe sets.

    Raises UserError naming file, line and option.
    """
    root = _parse(Path(file))
    values = dict(_read_section(root, type(defaults), "", Path(file))) if root else {}
    try:
        return with_values(defaults, values)
    except UserError as error:  # a check of the option tree itself
        raise error.within(str(file)) from None


def dump(options: Any) -> str:
    """YAML text that `load` reads back to an equal tree; secrets are omitted."""
    return yaml.safe_dump(to_dict(options), sort_keys=False, allow_unicode=True, width=120)


def _parse(file: Path) -> yaml.Node | None:
    try:
        text = file.read_text(encoding="utf-8")
        check_depth(text, file)
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}", option="recipe") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: the file is not UTF-8 text; a recipe is a YAML file", option="recipe") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise UserError(f"{file}{f':{mark.line + 1}' if mark else ''}: not YAML: {problem}") from None


def check_depth(text: str, file: Path) -> None:
    """Raises UserError for deep nesting, for which PyYAML takes time with the square of the depth and overflows the
    stack."""
    depth = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        depth += isinstance(token, _OPENING)
        depth -= isinstance(token, _CLOSING)
        if depth > _MAX_DEPTH:
            raise UserError(f"{file}:{token.start_mark.line + 1}: nested deeper than {_MAX_DEPTH} levels")


def _read_section(node: yaml.Node, cls: type, prefix: str, file: Path) -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every option below `node`, which stands for the dataclass `cls`."""
    if node.tag == _NULL:  # a section whose options are all commented out
        return
    if not isinstance(node, yaml.MappingNode):
        raise _error(file, node, prefix.rstrip("."), f"expected options of its own, each on a line; got {_got(node)}")
    hints = get_type_hints(cls)
    secret = {f.name for f in fields(cls) if f.metadata.get(SECRET)}
    seen: set[str] = set()
    for key, value in node.value:
        path = RENAMED.get(f"{prefix}{key.value}", f"{prefix}{key.value}")
        if value.tag == _NULL and path != f"{prefix}{key.value}":
            continue  # a former option that an older run's options.yaml lists without a value
        name = path.removeprefix(prefix)
        if name not in hints:
            raise _error(file, key, path, f"no such option{_suggest(name, cls, prefix)}")
        if name in seen:
            raise _error(file, key, path, "is given twice; keep one")
        if name in secret:
            raise _error(file, key, path, f"is a secret, which a recipe may not hold; give it as --{path}")
        seen.add(name)
        if is_dataclass(hints[name]):
            yield from _read_section(value, hints[name], f"{path}.", file)
        else:
            yield path, _read(value, hints[name], path, file)


def _suggest(name: str, cls: type, prefix: str) -> str:
    level = list(get_type_hints(cls))
    close = difflib.get_close_matches(name, level, n=1) or nearest(name, list(option_types(cls)))
    if close:
        return f"; did you mean {' or '.join(repr(option) for option in close)}?"
    return f"; {prefix.rstrip('.') or 'a recipe'} has {', '.join(level)}"


def _read(node: yaml.Node, kind: Any, path: str, file: Path) -> Any:
    """The value of type `kind` that `node` writes."""
    if node.tag == _NULL and NoneType in get_args(kind):
        return None
    inner = without_none(kind)
    try:
        if get_origin(inner) is tuple and isinstance(node, yaml.SequenceNode):
            kinds = item_kinds(inner, len(node.value))
            pairs = enumerate(zip(node.value, kinds, strict=True))
            return tuple(_read(item, kind, f"{path}[{index}]", file) for index, (item, kind) in pairs)
        if isinstance(node, yaml.ScalarNode) and node.tag in _PLAIN_TAGS - {_NULL}:
            value = read_value(node.value, inner)
            if isinstance(value, str) or node.style not in ("'", '"'):  # a number in quotes is meant as text
                return value
    except (ValueError, KeyError):
        pass  # reported below, with what is allowed
    raise _error(file, node, path, f"got {_got(node)}, allowed is {describe(kind)}")


def _got(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        quoted = " (in quotes)" if node.style in ("'", '"') else ""
        return "nothing" if node.tag == _NULL else f"{node.value!r}{quoted}"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _error(file: Path, node: yaml.Node, path: str, message: str) -> UserError:
    return UserError(f"{file}:{node.start_mark.line + 1}: {path or 'the recipe'}: {message}")
