"""A command line to a frozen dataclass of options; every mistake in it is one line.

Words are read here, by the options' types (`config.read`); tyro only prints `--help`. A flag is written
`--train.batch_size 4`, `--train.batch-size 4` or `--train.batch_size=4`, and a switch `--data.flip` or
`--data.no_flip`. A list takes the words up to the next flag. If a flag is given twice, the last one counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

from t2i_adapter.config.read import allowed, describe, nearest, option_types, read_value, read_values, with_values
from t2i_adapter.config.recipe import RENAMED, load
from t2i_adapter.config.tree import Config
from t2i_adapter.errors import UserError, plain_flag, register_secret
from t2i_adapter.files import show_command

T = TypeVar("T")


@dataclass(frozen=True)
class Flag:
    """How one flag is read.

    Attributes:
        paths: dotted paths of the options that it sets; none: the flag is accepted and has no effect.
        kind: type of its value.
        constant: the value that a switch sets; None: the flag takes a value, or is `--x` and `--no_x` for a bool.
        label: what stands for the value in messages if it is a word without a flag, such as KIND; such words fill
            these options in order. "" for a flag.
    """

    paths: tuple[str, ...]
    kind: Any
    constant: Any = None
    label: str = ""


@dataclass(frozen=True)
class Words:
    """Annotates a list option whose words may also stand without its flag. label: what stands for them in messages."""

    label: str


@dataclass(frozen=True)
class TrainFlags:
    """A run's options: the defaults, then what --recipe sets, then what the flags set."""

    recipe: str | None = None
    """YAML file of options; flags win over it."""
    dry_run: bool = False
    """Print the resolved options and the plan, and stop."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


SHORT = {
    "data": "data.location",
    "layout": "data.kind",
    **{
        name: f"data.{name}"
        for name in (
            *("split", "resolution", "condition", "conditioning_dir", "captions", "skip"),
            *("image_column", "conditioning_image_column", "caption_column"),
        )
    },
    "compose": "adapter.compose",
    "conditions": "data.conditions",
    "profile": "train.profile",
    "max_time": "train.max_time",
    "on_nonfinite": "train.on_nonfinite",
    "allow_changed": "checkpoint.allow_changed",
}
"""Flags of a run that may be written without their section: those of the dataset as every verb has them, and those that
users of other trainers know by their last word alone."""
_CONFIG = "config."


def parse_flags(cls: type[T], argv: Sequence[str], prog: str) -> T:
    """Options of class `cls` from words. `--help` prints and exits. Raises UserError."""
    if is_help(argv):
        print_help(cls, prog)
    flags = flags_of(cls)
    for short, path in SHORT.items():
        both = {name: flags[name] for name in (short, path) if name in flags}
        flags |= {name: flag for flag in both.values() for name in (short, path) if name not in both}
    flags |= {former: flags[path] for former, path in RENAMED.items() if path in flags}
    values = read_flags(argv, flags, prog)
    _check_required(cls, values)
    return build(cls, values)


def parse_train(
    argv: Sequence[str],
    prog: str,
    *,
    cls: Any = TrainFlags,
    defaults: Config | None = None,
    more: Mapping[str, Flag] | None = None,
    meant: Mapping[str, str] | None = None,
) -> Any:
    """Options of a run from words: `defaults`, then the recipe, then the flags, the last one given winning.

    Args:
        cls: what is returned: a dataclass with a run's options as `config`, beside a verb's own.
        more: further flags, whose paths are those of `config`.
        meant: names that a misspelt flag may have meant -> the flag to suggest.

    `--help` prints and exits. Raises UserError; for a missing dataset too, unless `cls` has `DATA_IS_OPTIONAL`.
    """
    defaults = defaults or Config()
    if is_help(argv):
        print_help(cls, prog)
    flags = {**{short: Flag((f"{_CONFIG}{path}",), None) for short, path in SHORT.items()}, **flags_of(cls)}
    flags |= {short: flags[path] for short, path in SHORT.items()}
    flags |= {former: flags[path] for former, path in RENAMED.items()}
    for name, added in (more or {}).items():
        flags[name] = Flag(tuple(f"{_CONFIG}{path}" for path in added.paths), added.kind, added.constant)
    values = read_flags(argv, flags, prog, meant)
    recipe = values.get("recipe")
    of_run = {path.removeprefix(_CONFIG): value for path, value in values.items() if path.startswith(_CONFIG)}
    config = with_values(load(recipe, defaults) if recipe else defaults, of_run)
    _check_sources(config, needs_data=not getattr(cls, "DATA_IS_OPTIONAL", False))
    own = {path: value for path, value in values.items() if not path.startswith(_CONFIG)}
    return build(cls, {**own, "config": config})


def is_help(argv: Sequence[str]) -> bool:
    """Whether help is asked for."""
    return bool({"-h", "--help"} & set(argv))


def print_help(cls: Any, prog: str) -> None:
    """Prints the help of a verb whose options are of class `cls`, and exits with code 0."""
    tyro.cli(cls, args=["--help"], prog=prog, use_underscores=True)


def flags_of(cls: Any) -> dict[str, Flag]:
    """Name -> flag of every option of `cls`. A run's options (`config`) have their paths as names."""
    hints = get_type_hints(cls, include_extras=True)
    found: dict[str, Flag] = {}
    for path, kind in option_types(cls).items():
        extras = getattr(hints.get(path), "__metadata__", ())
        label = next((extra.metavar.strip("[]") for extra in extras if getattr(extra, "metavar", None)), path.upper())
        flag = Flag((path,), kind, label=label if tyro.conf.Positional in extras else "")
        found[path.removeprefix(_CONFIG)] = flag
        for extra in extras:
            if isinstance(extra, Words):
                found[extra.label] = Flag((path,), kind, label=extra.label)
            found |= dict.fromkeys((alias.lstrip("-") for alias in getattr(extra, "aliases", None) or ()), flag)
    return found


def flag_types(cls: Any) -> dict[str, Any]:
    """Name -> type of every option of `cls` that is written with a flag."""
    return {name: flag.kind for name, flag in flags_of(cls).items() if not flag.label and len(name) > 1}


def read_flags(
    argv: Sequence[str], flags: Mapping[str, Flag], prog: str, meant: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Dotted path -> value of every option that the words set. `meant` as in `parse_train`. Raises UserError."""
    values: dict[str, Any] = {}
    positional = [flag for flag in flags.values() if flag.label]
    named: dict[str, str] = {}
    for name, words in _split(argv, flags, prog, meant or {}):
        if name is None:
            if not positional:
                raise UserError(f"{words[0]!r} belongs to no flag; see `{prog} --help`")
            flag = positional[0] if get_origin(positional[0].kind) is tuple else positional.pop(0)
            label = flag.label
        else:
            negative, flag = _named(name, flags)
            label = f"--{name}"
            if flag.constant is not None or flag.kind is bool:
                values |= dict.fromkeys(flag.paths, not negative if flag.constant is None else flag.constant)
                continue
        value = _read(words, flag.kind, label)
        for path in flag.paths:
            other = named.setdefault(path, label)
            if other != label and path.endswith("data.location"):
                raise UserError(f"two datasets are given, by {other} and {label}; keep one of them")
            many = isinstance(value, tuple) and (name is None or other != label)
            values[path] = (*values.get(path, ()), *value) if many else value
    return values


def _split(
    argv: Sequence[str], flags: Mapping[str, Flag], prog: str, meant: Mapping[str, str]
) -> Iterator[tuple[str | None, list[str]]]:
    """(name of a flag, its words) in order; None for the name of a word that belongs to no flag."""
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--":
            yield from ((None, [rest]) for rest in words)
            return
        name, equals, value = word.partition("=")
        short = name[1:] if len(name) == 2 and name[0] == "-" and name[1:] in flags else None
        if not word.startswith("--") and short is None:
            yield None, [word]
            continue
        stem = short or name[2:].replace("-", "_")
        negative, flag = (False, None) if word.startswith("---") else _named(stem, flags)
        if flag is None:
            stem = name.lstrip("-").replace("-", "_")
            if "tok" in stem:  # a misspelt --hub.token
                register_secret(value)
            raise UserError(f"{word}: no such flag; {_hint(stem, equals + value, prog, flags, meant)}")
        if flag.constant is not None or flag.kind is bool:
            if equals:
                both = f"--{stem}" if negative or flag.constant is not None else f"--{stem} or --{_negated(stem)}"
                raise UserError(f"{word}: a switch takes no value; write {both}")
            yield stem, []
        elif equals:
            yield stem, [value]
        else:
            count = next((n for n, later in enumerate(words) if later.startswith("--")), len(words))
            count = min(count, _most_words(flag.kind))
            yield stem, [words.pop(0) for _ in range(count)]


def _named(stem: str, flags: Mapping[str, Flag]) -> tuple[bool, Any]:
    """(whether a name without dashes is the negative form of a switch, its flag); None if there is no such flag."""
    if stem in flags and not flags[stem].label:
        return False, flags[stem]
    head, dot, last = stem.rpartition(".")
    positive = flags.get(f"{head}{dot}{last.removeprefix('no_')}") if last.startswith("no_") else None
    is_switch = positive is not None and positive.kind is bool and positive.constant is None
    return (True, positive) if is_switch else (False, None)


def _negated(stem: str) -> str:
    head, dot, last = stem.rpartition(".")
    return f"{head}{dot}no_{last}"


def _most_words(kind: Any) -> int:
    if get_origin(kind) is not tuple:
        return 1
    kinds = get_args(kind)
    return 1_000_000 if kinds[-1] is Ellipsis else len(kinds)


def _read(words: list[str], kind: Any, flag: str) -> Any:
    if not words:
        raise UserError(f"{flag}: needs a value; allowed is {describe(kind)}")
    try:
        return read_values(words, kind) if get_origin(kind) is tuple else read_value(words[0], kind)
    except ValueError:
        got = repr(words[0]) if len(words) == 1 else repr(words)
        raise UserError(f"{flag} {got}: {allowed(kind, words[0])}") from None


def _hint(stem: str, value: str, prog: str, flags: Mapping[str, Flag], meant: Mapping[str, str]) -> str:
    written = {path: short for short, path in SHORT.items() if path == "data.location"}
    hidden = {*SHORT, *RENAMED} - {stem}
    known = {name: written.get(name, name) for name, flag in flags.items() if not flag.label and name not in hidden}
    known |= meant
    near = [stem] if stem in known else nearest(stem, [*meant, *known])
    suggested = dict.fromkeys(f"--{known[name]}{value}" for name in near)
    return f"did you mean {' or '.join(suggested)}?" if suggested else f"see `{prog} --help`"


def _check_required(cls: Any, values: Mapping[str, Any]) -> None:
    flags = flags_of(cls)
    missing = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    names = [flags[name].label or f"--{name}" for name in missing if name in flags and name not in values]
    if names:
        raise UserError(f"{' and '.join(names)}: required, and not given")


def build(cls: Any, values: Mapping[str, Any]) -> Any:
    """An instance of `cls` with `values` by dotted path, and defaults for the rest."""
    given: dict[str, Any] = {}
    for f in fields(cls):
        below = {path.partition(".")[2]: value for path, value in values.items() if path.partition(".")[0] == f.name}
        if "" in below:
            given[f.name] = below[""]
        elif below:
            default = f.default if f.default is not MISSING else f.default_factory()  # type: ignore[misc]
            assert is_dataclass(default)
            given[f.name] = with_values(default, below)
    return cls(**given)


def flag_namer(names: Mapping[str, str]) -> Callable[[str], str]:
    """Path of an option -> how a front door prints it, from its flags by path; another path is printed as it is."""

    def name(path: str) -> str:
        plain = path.rstrip("0123456789").rstrip(".")  # "optim.betas.0" is an item of a flag
        return names.get(path) or names.get(plain) or plain_flag(plain)

    return name


def changed_options(options: Any) -> dict[str, Any]:
    """Returns name -> value of the fields of a dataclass that differ from their default, in their order."""
    values = {field.name: (getattr(options, field.name), field.default) for field in fields(options)}
    return {name: value for name, (value, default) in values.items() if value != default}


def command_line(verb: str, options: Any) -> str:
    """Returns the command line that sets a verb's options, those of a flat dataclass; defaults are omitted."""
    words = ["t2i-adapter", verb]
    for name, value in changed_options(options).items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            first, *more = map(str, value if isinstance(value, tuple) else (value,))
            words += [f"--{name}={first}"] if first.startswith("-") else [f"--{name}", first]
            words += more
    return show_command(*words)


def _check_sources(config: Config, *, needs_data: bool) -> None:
    """A run has a base and a dataset."""
    if not config.base.name:
        raise UserError("is required: a hub id, a folder, a file or `nano`", option="base.name")
    if needs_data and not config.data.location:
        raise UserError("is required: a folder, a file, shards or a hub id", option="data.location")
