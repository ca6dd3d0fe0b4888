"""The command `t2i-adapter VERB ...`: a table of verbs, each imported when it is called.

`t2i-adapter --help` and every verb's `--help` load no torch. What a person can mend is one line on stderr and exit
code 2; an interrupt is 130; anything else is a mistake of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import re
import select
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from t2i_adapter import __version__
from t2i_adapter.errors import UserError

PROG = "t2i-adapter"
STDOUT = 1  # file descriptor


class Verb(NamedTuple):
    """One line about a verb, the dataclass of its options and the function that takes them ("module:name" each)."""

    summary: str
    options: str
    function: str


VERBS = {
    "demo": Verb(
        "Make data, train on the embedded base, generate, evaluate: in minutes.",
        "t2i_adapter.demo_options:DemoOptions",
        "t2i_adapter.demo:run",
    ),
    "make-data shapes": Verb(
        "Write a data set of drawn shapes, with their exact condition maps.",
        "t2i_adapter.sources.make_data:ShapesOptions",
        "t2i_adapter.sources.make_data:make_shapes",
    ),
    "make-data emoji": Verb(
        "Write a data set of Fluent Emoji, from their npm package.",
        "t2i_adapter.sources.make_data:EmojiOptions",
        "t2i_adapter.sources.make_data:make_emoji",
    ),
    "train": Verb(
        "Train an adapter, from flags or a recipe.", "t2i_adapter.config:Config", "t2i_adapter.training.run:run"
    ),
    "generate": Verb(
        "Draw pictures from prompts and condition pictures.",
        "t2i_adapter.generation.options:GenerateOptions",
        "t2i_adapter.generation.run:run",
    ),
    "evaluate": Verb(
        "Measure on held-out pairs how well an adapter controls.",
        "t2i_adapter.evaluation.options:EvaluateOptions",
        "t2i_adapter.evaluation.run:run",
    ),
    "push": Verb(
        "Publish a trained adapter on the hub.", "t2i_adapter.export.options:PushOptions", "t2i_adapter.export.run:push"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words:
        print(overview(), file=sys.stderr)
        return 2
    return guarded(lambda: _answer(words))


def guarded(action: Callable[[], None]) -> int:
    """Run `action`; turns what a person did, or can mend, into one line and an exit code."""
    try:
        action()
        sys.stdout.flush()
    except UserError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)  # what is still buffered goes nowhere
        return 141  # as a program that dies of SIGPIPE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _refuse(f"{error.filename or 'the output folder'}: {error.strerror}; make room, or write elsewhere")
    return 0


def resolve(reference: str) -> Any:
    """What "module:name" refers to."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def overview(group: str = "") -> str:
    """The verbs, or those of one group, each with its line."""
    verbs = {name: verb.summary for name, verb in VERBS.items() if name.startswith(group)}
    width = max(map(len, verbs))
    lines = [f"usage: {PROG} {group or 'VERB'} ... [flags]", ""]
    lines += [f"  {name:<{width}}  {summary}" for name, summary in verbs.items()]
    lines += ["", f"`{PROG} VERB --help` lists a verb's flags; `{PROG} --version` tells the version."]
    return "\n".join(lines)


def _answer(words: list[str]) -> None:
    if words[0] in ("-h", "--help"):
        return print(overview())
    if words[0] == "--version":
        return print(f"{PROG} {__version__}")
    if words[0] in _groups() and (len(words) == 1 or words[1] in ("-h", "--help")):
        return print(overview(words[0]))
    name, rest = _find_verb(words)
    if name == "train":
        return _train(rest)
    from t2i_adapter.flags import parse_flags

    options = parse_flags(resolve(VERBS[name].options), rest, prog=f"{PROG} {name}")
    return resolve(VERBS[name].function)(options)


def _train(argv: list[str]) -> None:
    """`train` has a recipe beside its flags, and knows the diffusers script's names for its options."""
    from t2i_adapter.compat import ROWS
    from t2i_adapter.flags import UnknownFlagError, parse_train

    renamed = {row.flag: row.paths[0] for row in ROWS if row.paths}
    try:
        flags = parse_train(argv, f"{PROG} train", names=renamed)
        resolve(VERBS["train"].function)(flags.config, dry_run=flags.dry_run)
    except UnknownFlagError:
        raise
    except UserError as error:  # checks name the script's flags; say them as they are called here
        raise UserError(re.sub(r"--(\w+)\b(?!\.)", lambda m: f"--{renamed.get(m[1], m[1])}", str(error))) from None


def _groups() -> set[str]:
    return {name.split()[0] for name in VERBS if " " in name}


def _find_verb(words: list[str]) -> tuple[str, list[str]]:
    """The verb that `words` begin with, and the rest."""
    length = 2 if words[0] in _groups() else 1
    name = " ".join(words[:length])
    if name in VERBS:
        return name, words[length:]
    known = [verb for verb in VERBS if verb.startswith(words[0])] if length == 2 else [*VERBS, *_groups()]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean `{close[0]}`?" if close else f"there are {', '.join(known)}"
    raise UserError(f"{name}: no such verb; {hint}")


def _refuse(message: str) -> int:
    sys.stdout.flush()
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _reader_is_gone() -> bool:
    """Whether it is standard output's reader that went away, and not a pipe of our own."""
    poll = select.poll()
    poll.register(STDOUT, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
