"""Forms: the options of a verb with their help, and the way from values to a command and back.

The option tree is the only list of options. A form is made from its types and docstrings, and what a user types is read
and checked by the readers of the command line.
"""

from __future__ import annotations

import ast
import inspect
import tempfile
import textwrap
import threading
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import yaml

from t2i_adapter import cli
from t2i_adapter.config import recipe
from t2i_adapter.config.read import allowed, describe, item_kinds, option_types, read_value, without_none
from t2i_adapter.config.tree import SECRET, Config, flat, to_dict
from t2i_adapter.errors import UserError
from t2i_adapter.flags import Words, build
from t2i_adapter.imports import resolve

_CONFIG = "config."
HIDDEN = ("hub.token", "hub.push", "checkpoint.resume", "checkpoint.allow_changed", "recipe", "json")
"""Options that no form shows: secrets, and what the studio sets itself."""


def schema(verb: str) -> list[dict[str, Any]]:
    """The options of a verb in their order: path, kind, choices, default, help, group. Raises UserError."""
    if verb not in cli.VERBS:
        raise UserError(f"{verb}: no such verb")
    found = [_entry(*option) for option in _options(resolve(cli.VERBS[verb].options), "")]
    return [entry for entry in found if entry["path"] not in HIDDEN]


def _options(cls: Any, prefix: str) -> Iterator[tuple[str, Any, Field[Any], str]]:
    """(path, type, field, help) of each option of a tree of dataclasses. A run's options that a verb has beside its own
    are named as `train` names them, without `config.` in front."""
    hints, help_ = get_type_hints(cls), docs_of(cls)
    for one in fields(cls):
        kind = hints[one.name]
        if is_dataclass(kind):
            yield from _options(kind, "" if kind is Config else f"{prefix}{one.name}.")
        elif not one.metadata.get(SECRET):
            yield f"{prefix}{one.name}", kind, one, help_.get(one.name, "")


def _entry(path: str, kind: Any, one: Field[Any], help_: str) -> dict[str, Any]:
    inner = without_none(kind)
    each = get_args(inner)[0] if get_origin(inner) is tuple else inner
    choices = list(get_args(each)) if get_origin(each) is Literal else []
    default = plain_default(one)
    return {
        "path": path,
        "kind": _kind(inner),
        "allowed": describe(kind),
        "choices": choices,
        "optional": NoneType in get_args(kind),
        "default": None if default is MISSING else default,
        "required": default is MISSING,
        "help": help_,
        "group": path.rpartition(".")[0],
    }


def _kind(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "choice"
    if get_origin(kind) is tuple:
        return "list"
    return {bool: "switch", int: "integer", float: "number"}.get(kind, "text")


def docs_of(cls: Any) -> Mapping[str, str]:
    """Field -> the docstring below it, of a dataclass and those that it extends."""
    with _PARSING:
        return _parse_docs(cls)


_PARSING = threading.Lock()
"""Python 3.11 fails now and then if two threads parse at once."""


@cache
def _parse_docs(cls: Any) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        if not is_dataclass(one):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(cast(type, one)))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, doc in zip(body.body, body.body[1:], strict=False):
            is_text = isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
                assert isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
                found[field.target.id] = " ".join(str(doc.value.value).split())
    return found


# Values -------------------------------------------------------------------------------------------------------------


def options_of(verb: str, values: Mapping[str, Any], own: Mapping[str, Any] | None = None) -> Any:
    """A verb's options, of values by path as JSON has them. Raises the first UserError.

    own: values of the studio itself, which win, and may set options that no form shows.
    """
    options, faults = _read(verb, values, own or {})
    if faults:
        raise faults[0]
    return options


def read_options(verb: str, values: Mapping[str, Any]) -> tuple[Any, list[dict[str, str | None]]]:
    """(the verb's options, errors) of values by path, as JSON has them; None and all errors if there are some.

    Each error is {"option": path or None, "message": sentence}.
    """
    options, faults = _read(verb, values, {})
    return options, [{"option": fault.option, "message": fault.message(_plain)} for fault in faults]


def _read(verb: str, values: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[Any, list[UserError]]:
    cls = resolve(cli.VERBS[verb].options)
    whole = option_types(cls)
    kinds = {path.removeprefix(_CONFIG): kind for path, kind in whole.items()}
    faults: list[UserError] = []
    read: dict[str, Any] = {}
    for path, value in {**values, **own}.items():
        if path not in kinds or (path in HIDDEN and path not in own):
            faults.append(UserError(f"{path[:80]}: there is no such option here."))
            continue
        try:
            read[path] = typed(value, kinds[path])
        except ValueError:
            faults.append(UserError(f"{value!r}: {allowed(kinds[path], str(value))}.", option=path))
    if faults:
        return None, faults
    full = {path if path in whole else _CONFIG + path: read[path] for path in read}
    try:
        return build(cls, full), []
    except UserError as fault:
        return None, [fault]
    except TypeError as fault:
        return None, [UserError(f"{verb}: {str(fault).partition('()')[2].strip() or fault}")]


def check_shown(values: Mapping[str, Any]) -> None:
    """Raises UserError for an option that no form shows, as a recipe's text may set it."""
    for path in values.keys() & set(HIDDEN):
        raise UserError("cannot be set here; remove it, or run the command in a terminal", option=path)


def typed(value: Any, kind: Any) -> Any:
    """A JSON value as an option of type `kind`. Raises ValueError."""
    inner = without_none(kind)
    if value is None or (value == "" and NoneType in get_args(kind)):
        if NoneType not in get_args(kind):
            raise ValueError(value)
        return None
    if get_origin(inner) is tuple:
        items = value if isinstance(value, list) else [value]
        kinds = item_kinds(inner, len(items))
        return tuple(typed(item, one) for item, one in zip(items, kinds, strict=True))
    if isinstance(value, bool):
        return read_value("true" if value else "false", inner)
    if isinstance(value, int | float):
        return read_value(repr(value), inner)
    if isinstance(value, str):
        return read_value(value, inner)
    raise ValueError(value)


def changed(options: Any) -> dict[str, Any]:
    """Path -> value, as JSON has it, of the options that differ from their defaults."""
    defaults = {path: entry for path, _, entry, _ in _options(type(options), "")}
    values = {path.removeprefix(_CONFIG): value for path, value in flat(to_dict(options)).items()}
    found = {}
    for path, value in values.items():
        one = defaults.get(path)
        if one is None:
            continue
        if value != plain_default(one):
            found[path] = value
    return found


def plain_default(one: Field[Any]) -> Any:
    """The default of a field as JSON has it; MISSING if it is required."""
    default = one.default_factory() if one.default_factory is not MISSING else one.default
    return list(default) if isinstance(default, tuple) else default


def to_yaml(options: Config) -> str:
    """A recipe of the options that differ from their defaults."""
    tree: dict[str, Any] = {}
    for path, value in changed(options).items():
        *sections, name = path.split(".")
        level = tree
        for section in sections:
            level = level.setdefault(section, {})
        level[name] = value
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120) if tree else ""


def from_yaml(text: str) -> Config:
    """The options of a recipe's text. Raises UserError that names the line."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(text, encoding="utf-8", errors="replace")
        try:
            return recipe.load(file, Config())
        except UserError as fault:
            line = fault.message(_plain).replace(f"{file}:", "line ").replace(str(file), "the recipe")
            shown = UserError(line, kind=fault.kind)
            shown.option = fault.option  # which the line names already
            raise shown from None


def argv_of(verb: str, options: Any) -> list[str]:
    """The words of the command that sets these options; defaults are omitted."""
    words, hints = verb.split(), get_type_hints(type(options), include_extras=True)
    positional: list[str] = []
    for path, value in changed(options).items():
        name = "--data" if path == "data.location" else f"--{path}"
        items = value if isinstance(value, list) else [value]
        if isinstance(value, bool):
            head, _, last = path.rpartition(".")
            words.append(name if value else f"--{head}{'.' * bool(head)}no_{last}")
        elif _is_positional(hints.get(path)):
            positional += [str(item) for item in items]
        elif len(items) == 1:
            words += [f"{name}={items[0]}"] if str(items[0]).startswith("-") else [name, str(items[0])]
        elif items:
            words += [name, *map(str, items)]
    return [*words, *(["--", *positional] if positional else [])]


def _is_positional(hint: Any) -> bool:
    """Whether an option is written without its flag."""
    return any(isinstance(one, Words) or "Positional" in repr(one) for one in getattr(hint, "__metadata__", ()))


def _plain(path: str) -> str:
    return path
