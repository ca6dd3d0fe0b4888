"""The command `t2i-adapter VERB ...`: a table of verbs, each imported when it is called.

`t2i-adapter --help` and every verb's `--help` load no torch. What a person can mend is one line on stderr and exit
code 2; an interrupt is 130; anything else is a mistake of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

from t2i_adapter import __version__
from t2i_adapter.errors import UserError
from t2i_adapter.exits import guarded
from t2i_adapter.imports import resolve

PROG = "t2i-adapter"


class Verb(NamedTuple):
    """One line about a verb, the dataclass of its options and the function that takes them ("module:name" each)."""

    summary: str
    options: str
    function: str


VERBS = {
    "demo": Verb(
        "Make data, train on the embedded base, generate, evaluate: in minutes.",
        "t2i_adapter.verbs.demo_options:DemoOptions",
        "t2i_adapter.verbs.demo:run",
    ),
    "make-data shapes": Verb(
        "Write a data set of drawn shapes, with their exact condition maps.",
        "t2i_adapter.verbs.make_data:ShapesOptions",
        "t2i_adapter.verbs.make_data:make_shapes",
    ),
    "make-data emoji": Verb(
        "Write a data set of Fluent Emoji, from their npm package.",
        "t2i_adapter.verbs.make_data:EmojiOptions",
        "t2i_adapter.verbs.make_data:make_emoji",
    ),
    "doctor": Verb(
        "Look a data set over before training: what is wrong, row by row.",
        "t2i_adapter.verbs.doctor_options:DoctorOptions",
        "t2i_adapter.verbs.doctor:run",
    ),
    "conditions": Verb(
        "List the kinds of condition maps, or draw a sheet of them.",
        "t2i_adapter.verbs.annotate_options:ConditionsOptions",
        "t2i_adapter.verbs.conditions:run",
    ),
    "annotate": Verb(
        "Make the condition map of a picture, or of a whole data set.",
        "t2i_adapter.verbs.annotate_options:AnnotateOptions",
        "t2i_adapter.verbs.annotate:run",
    ),
    "plan": Verb(
        "Tell what a run will need: memory, disk, hours, the largest batch.",
        "t2i_adapter.verbs.plan_options:PlanOptions",
        "t2i_adapter.verbs.plan:run",
    ),
    "prepare": Verb(
        "Encode what a training run would need, and stop.",
        "t2i_adapter.config.tree:Config",
        "t2i_adapter.verbs.train:prepare",
    ),
    "train": Verb(
        "Train an adapter, from flags or a recipe.", "t2i_adapter.config.tree:Config", "t2i_adapter.verbs.train:run"
    ),
    "verify-resume": Verb(
        "Show that a run stopped and resumed is the run left alone.",
        "t2i_adapter.verbs.verify_resume_options:VerifyOptions",
        "t2i_adapter.verbs.verify_resume:run",
    ),
    "generate": Verb(
        "Draw pictures from prompts and condition pictures.",
        "t2i_adapter.generation.options:GenerateOptions",
        "t2i_adapter.verbs.generate:run",
    ),
    "evaluate": Verb(
        "Measure on held-out pairs how well an adapter controls.",
        "t2i_adapter.verbs.evaluate_options:EvaluateOptions",
        "t2i_adapter.verbs.evaluate:run",
    ),
    "cache ls": Verb(
        "List what is prepared: records, bytes, when it was last used.",
        "t2i_adapter.verbs.cache_options:CacheOptions",
        "t2i_adapter.verbs.cache:ls",
    ),
    "cache verify": Verb(
        "Read every prepared record and name the damaged files.",
        "t2i_adapter.verbs.cache_options:CacheOptions",
        "t2i_adapter.verbs.cache:verify",
    ),
    "cache rm": Verb(
        "Remove prepared records: some, those not used for long, or all.",
        "t2i_adapter.verbs.cache_options:RemoveOptions",
        "t2i_adapter.verbs.cache:rm",
    ),
    "push": Verb(
        "Publish a trained adapter on the hub.",
        "t2i_adapter.verbs.push_options:PushOptions",
        "t2i_adapter.verbs.push:push",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words:
        print(overview(), file=sys.stderr)
        return 2
    return guarded(lambda: _answer(words))


def overview(group: str = "") -> str:
    """The verbs, or those of one group, each with its line."""
    verbs = {name: verb.summary for name, verb in VERBS.items() if name.startswith(group)}
    width = max(map(len, verbs))
    lines = [f"usage: {PROG} {group or 'VERB'} ... [flags]", ""]
    lines += [f"  {name:<{width}}  {summary}" for name, summary in verbs.items()]
    lines += ["", f"`{PROG} VERB --help` lists a verb's flags; `{PROG} --version` tells the version."]
    return "\n".join(lines)


def _answer(words: list[str]) -> None:
    """Tell what is asked for, or run the verb that `words` begin with."""
    if words[0] in ("-h", "--help"):
        return print(overview())
    if words[0] == "--version":
        return print(f"{PROG} {__version__}")
    if words[0] in _groups() and (len(words) == 1 or words[1] in ("-h", "--help")):
        return print(overview(words[0]))
    name, rest = _find_verb(words)
    from t2i_adapter.flags import UnknownFlagError

    try:
        _call(name, rest)
    except UnknownFlagError:
        raise
    except UserError as error:
        raise UserError(_in_flags_of(name, str(error))) from None


def _call(verb: str, argv: list[str]) -> None:
    """Parse a verb's flags and run it; what takes a run's options has a recipe and a dry run beside them."""
    from t2i_adapter.flags import parse_flags, parse_train
    from t2i_adapter.script_flags import ROWS

    prog, function = f"{PROG} {verb}", VERBS[verb].function
    names = {row.flag: row.paths[0] for row in ROWS if row.paths}
    if VERBS[verb].options == VERBS["train"].options:
        flags = parse_train(argv, prog, names=names)
        resolve(function)(flags.config, dry_run=flags.dry_run)
    elif "config" in (cls := resolve(VERBS[verb].options)).__dataclass_fields__:
        resolve(function)(parse_train(argv, prog, names=names, cls=cls))
    else:
        options = parse_flags(cls, argv, prog)
        resolve(function)(options)


def _in_flags_of(verb: str, message: str) -> str:
    """`message` with each flag as `verb` calls it: the checks of shared parts name the diffusers script's flags."""
    from t2i_adapter.config.read import option_types
    from t2i_adapter.script_flags import ROWS

    ours = {path.removeprefix("config.") for path in option_types(resolve(VERBS[verb].options))}
    called: dict[str, str] = {}
    for row in ROWS:
        for path in row.paths[:1]:
            short = _SHORT.get(path, path.replace(".", "_"))
            name = next((name for name in (row.flag, path, short) if name in ours), row.flag)
            called[row.flag] = name if row.given is True else f"{name} {row.given}"
    return re.sub(r"--(\w+)\b(?!\.)", lambda found: f"--{called.get(found[1], found[1])}", message)


_SHORT = {"base.name": "base", "data.train_data_dir": "data", "data.dataset_name": "data"}
"""Options of `train` whose name in other verbs is not just their path with underscores."""


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
