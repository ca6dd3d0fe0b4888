"""Flags to a frozen dataclass of options, through tyro; and every mistake in them as one line.

tyro answers a mistake with a box of several lines; here each becomes a UserError that names the flag and, where the
flag is unknown, the nearest one. Flags read `--train.batch_size` and may be written `--train.batch-size`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Annotated, Any, NoReturn, TypeVar, get_type_hints

import tyro

from t2i_adapter.config.read import describe, nearest, option_types, with_values
from t2i_adapter.config.recipe import load
from t2i_adapter.config.tree import Config
from t2i_adapter.errors import UserError, register_secret

T = TypeVar("T")


@dataclass(frozen=True)
class TrainFlags:
    """A run's options: the defaults, then what --recipe sets, then what the flags set."""

    recipe: str | None = None
    """YAML file of options; flags win over it."""
    dry_run: bool = False
    """Print the resolved options and the plan, and stop."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def parse_train(
    argv: Sequence[str],
    prog: str,
    defaults: Config | None = None,
    values: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
    cls: Any = TrainFlags,
) -> Any:
    """Flags of a training run: `defaults`, then the recipe, then `values` by dotted path, then what `argv` sets.

    `names` as in `parse_flags`. cls: what is returned, a run's options (`config`) and what a verb has beside them.
    """
    argv = [_spelt_out(word) for word in argv]
    recipe = _recipe(argv)
    config = load(recipe, defaults or Config()) if recipe else defaults or Config()
    config = with_values(config, values or {})
    flags = parse_flags(cls, argv, prog, replace(cls(), config=config), None, names)
    _check_named(flags.config)
    return flags


SHORT = {
    "profile": "train.profile",
    "max_time": "train.max_time",
    "on_nonfinite": "train.on_nonfinite",
    "allow_changed": "checkpoint.allow_changed",
}
"""Flags of a run that people know by their last word alone, from other trainers."""


def _spelt_out(word: str) -> str:
    """A word of the command line, where it is one of those flags with its whole path."""
    name, equals, value = word.partition("=")
    path = SHORT.get(name[2:].replace("-", "_")) if name.startswith("--") else None
    return f"--{path}{equals}{value}" if path else word


def parse_flags(
    cls: type[T],
    argv: Sequence[str],
    prog: str,
    default: T | None = None,
    types: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
) -> T:
    """Options of class `cls` from flags. `--help` prints and exits; what does not parse raises UserError.

    `types` gives each flag's type, where it is not each field's of `cls`; `names` maps further words that a misspelt
    flag may have meant to the flag to name then.
    """
    types = types or flag_types(cls)
    if not {"-h", "--help"} & set(argv):
        _check_known(argv, prog, types, names or {})
        _check_required(cls, argv)
    told = io.StringIO()
    extra: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(told):
            options, unknown = tyro.cli(
                cls, args=list(argv), prog=prog, use_underscores=True, return_unknown_args=True, **extra
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_sentence(told.getvalue(), types, prog)) from None
    if unknown:
        raise UserError(f"{unknown[0]!r} belongs to no flag; see `{prog} --help`")
    return options


def flag_types(cls: Any) -> dict[str, Any]:
    """Flag -> type of every option of `cls` that is a flag, and not told by its place among the words."""
    hints = get_type_hints(cls, include_extras=True)
    return {
        path.removeprefix("config."): kind  # a run's options stand beside a verb's own
        for path, kind in option_types(cls).items()
        if tyro.conf.Positional not in getattr(hints.get(path), "__metadata__", ())
    }


_ARGPARSE_WORDS = (
    (r"^argument ", ""),
    (r"expected (one|at least one) argument", r"needs \1 value"),
    (r"ignored explicit argument (.*)", r"takes no value; got \1"),
    (r"invalid choice: (.*) \(choose from (.*)\)", r"got \1, allowed is one of \2"),
)


class UnknownFlagError(UserError):
    """A flag that does not exist, told with the nearest one that does."""


class LineParser(argparse.ArgumentParser):
    """argparse without abbreviations, whose mistakes are a UserError and which leaves out what was not given."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS, **options)

    def error(self, message: str) -> NoReturn:
        for theirs, ours in _ARGPARSE_WORDS:
            message = re.sub(theirs, ours, message)
        raise UserError(message)


def _recipe(argv: Sequence[str]) -> str | None:
    """The value of --recipe, which must be read before the flags, as they go on top of it."""
    parser = LineParser()
    parser.add_argument("--recipe")
    return vars(parser.parse_known_args(list(argv))[0]).get("recipe")


def _stem(word: str) -> str:
    return word.partition("=")[0].lstrip("-").replace("-", "_")


def _check_known(argv: Sequence[str], prog: str, types: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Every word with two dashes is a flag of ours, and a switch has no value."""
    for word in (word for word in argv if word.startswith("--") and word != "--"):
        stem, equals, value = _stem(word), *word.partition("=")[1:]
        switch = re.sub(r"(^|\.)no_", r"\1", stem)
        if types.get(switch) is bool and not word.startswith("---"):
            if equals:
                head, _, tail = switch.rpartition(".")
                off = f"--{head}.no_{tail}" if head else f"--no_{tail}"
                raise UserError(f"{word}: takes no value; write --{switch} or {off}")
        elif stem not in types or word.startswith("---"):
            if "tok" in stem:  # a misspelt --hub.token
                register_secret(value)
            raise UnknownFlagError(f"{word}: no such flag; {_hint(stem, equals + value, prog, types, names)}")


def _hint(stem: str, value: str, prog: str, types: Mapping[str, Any], names: Mapping[str, str]) -> str:
    meaning = {**{name: name for name in types}, **names}
    meant = [stem] if stem in meaning else nearest(stem, [*names, *types])
    flags = dict.fromkeys(f"--{meaning[name]}{value}" for name in meant)
    return f"did you mean {' or '.join(flags)}?" if flags else f"see `{prog} --help`"


def _check_required(cls: Any, argv: Sequence[str]) -> None:
    given, flags = {_stem(word) for word in argv if word.startswith("--")}, flag_types(cls)
    required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    missing = [f"--{name}" for name in required if name in flags and name not in given]
    if missing:
        raise UserError(f"{' and '.join(missing)}: required, and not given")


def _check_named(config: Config) -> None:
    """A run has a base and one source of data."""
    if not config.base.name:
        raise UserError(
            "--pretrained_model_name_or_path: required, and not given; a hub id, a folder, a file or `nano`"
        )
    given = [name for name in ("dataset_name", "train_data_dir") if getattr(config.data, name) is not None]
    if len(given) != 1:
        got = "--dataset_name and --train_data_dir are both given" if given else "no training data is named"
        raise UserError(f"{got}: give one, --dataset_name (a hub id) or --train_data_dir (a folder of pairs)")


def _sentence(box: str, types: Mapping[str, Any], prog: str) -> str:
    """What tyro says in a box, as one line: its first section, with what is allowed by the option's type."""
    said = _first_section(box)
    if place := re.match(r"Missing from .*?: ([A-Z]+)\b", said):
        return f"{place[1]}: required, and not given"
    flag = re.search(r"--([\w.\-]+)", said)
    kind = types.get(_stem(flag[1])) if flag else None
    if flag is None or kind is None:  # tyro's messages have another form than those known here
        return f"{said}; see `{prog} --help`"
    if said.startswith("Missing"):
        return f"{flag[0]}: needs a value; allowed is {describe(kind)}"
    got = re.search(r"choice ('.*') for|arguments (\[.*\]) into|('[^']*')[^']*$", said)
    words = next((group for group in got.groups() if group), said) if got else said
    return f"{flag[0]} {words}: allowed is {describe(kind)}"


def _first_section(box: str) -> str:
    """The text between a box's title and its first rule.

    Where standard output is not UTF-8 the box has no borders, and a rule below its title.
    """
    sections: list[list[str]] = [[]]
    for line in box.splitlines():
        inner = line.strip("│ ")
        if inner and set(inner) <= set("─-"):
            sections.append([])
        elif inner and not inner.startswith(("╭", "╰")):
            sections[-1].append(inner)
    has_borders = box.lstrip().startswith("╭")
    return " ".join(sections[0] if has_borders or len(sections) == 1 else sections[1]).rstrip(".")
