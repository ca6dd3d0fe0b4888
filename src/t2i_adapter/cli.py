"""The command `t2i-adapter VERB ...`: a table of verbs, each imported when it is called.

`t2i-adapter --help` and every verb's `--help` load no torch. `exits.py` lists the exit codes.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from t2i_adapter import __version__
from t2i_adapter.errors import UserError
from t2i_adapter.exits import guarded
from t2i_adapter.imports import resolve

PROG = "t2i-adapter"


class Verb(NamedTuple):
    """A verb's summary, the dataclass of its options and the function that takes them ("module:name" each)."""

    summary: str
    options: str
    function: str


VERBS = {
    "demo": Verb(
        "Make data, train on the embedded base, generate and evaluate, in minutes.",
        "t2i_adapter.verbs.demo:DemoOptions",
        "t2i_adapter.verbs.demo:run",
    ),
    "make-data shapes": Verb(
        "Write a dataset of drawn shapes with their exact condition maps.",
        "t2i_adapter.verbs.make_data:ShapesOptions",
        "t2i_adapter.verbs.make_data:make_shapes",
    ),
    "make-data emoji": Verb(
        "Write a dataset of Fluent Emoji from their npm package.",
        "t2i_adapter.verbs.make_data:EmojiOptions",
        "t2i_adapter.verbs.make_data:make_emoji",
    ),
    "init": Verb(
        "Look at a dataset and write a recipe that trains on it.",
        "t2i_adapter.verbs.init:InitOptions",
        "t2i_adapter.verbs.init:run",
    ),
    "doctor": Verb(
        "Check a dataset before training and list what is wrong, row by row.",
        "t2i_adapter.verbs.doctor:DoctorOptions",
        "t2i_adapter.verbs.doctor:run",
    ),
    "conditions": Verb(
        "List the condition kinds, or write a sheet of them.",
        "t2i_adapter.verbs.conditions:ConditionsOptions",
        "t2i_adapter.verbs.conditions:run",
    ),
    "annotate": Verb(
        "Make the condition map of a picture, or of a whole dataset.",
        "t2i_adapter.verbs.annotate:AnnotateOptions",
        "t2i_adapter.verbs.annotate:run",
    ),
    "plan": Verb(
        "Predict what a run needs: memory, disk, hours, the largest batch.",
        "t2i_adapter.verbs.plan:PlanOptions",
        "t2i_adapter.verbs.plan:run",
    ),
    "prepare": Verb(
        "Encode the dataset of a run into the cache, and stop.",
        "t2i_adapter.config.tree:Config",
        "t2i_adapter.verbs.prepare:run",
    ),
    "train": Verb(
        "Train an adapter from flags or a recipe.", "t2i_adapter.config.tree:Config", "t2i_adapter.verbs.train:run"
    ),
    "verify-resume": Verb(
        "Check that a stopped and resumed run equals an uninterrupted one.",
        "t2i_adapter.verbs.verify_resume:VerifyOptions",
        "t2i_adapter.verbs.verify_resume:run",
    ),
    "generate": Verb(
        "Generate pictures from prompts and condition pictures.",
        "t2i_adapter.verbs.generate:GenerateOptions",
        "t2i_adapter.verbs.generate:run",
    ),
    "evaluate": Verb(
        "Measure on held-out pairs how well an adapter controls.",
        "t2i_adapter.verbs.evaluate:EvaluateOptions",
        "t2i_adapter.verbs.evaluate:run",
    ),
    "cache ls": Verb(
        "List the cached records: number, bytes, last use.",
        "t2i_adapter.verbs.cache:CacheOptions",
        "t2i_adapter.verbs.cache:ls",
    ),
    "cache verify": Verb(
        "Read every cached record and list the damaged files.",
        "t2i_adapter.verbs.cache:CacheOptions",
        "t2i_adapter.verbs.cache:verify",
    ),
    "cache rm": Verb(
        "Remove cached records: some, those unused for long, or all.",
        "t2i_adapter.verbs.cache:RemoveOptions",
        "t2i_adapter.verbs.cache:rm",
    ),
    "runs ls": Verb(
        "List runs: state, step, loss, control gain, score, advice.",
        "t2i_adapter.verbs.runs:ListOptions",
        "t2i_adapter.verbs.runs:ls",
    ),
    "runs compare": Verb(
        "Compare runs: options that differ, loss, control gain, score; with a page.",
        "t2i_adapter.verbs.runs:CompareOptions",
        "t2i_adapter.verbs.runs:compare",
    ),
    "runs report": Verb(
        "Write the page of a run again, report.html in its folder.",
        "t2i_adapter.verbs.runs:ReportOptions",
        "t2i_adapter.verbs.runs:report",
    ),
    "studio": Verb(
        "Look at data, start and watch runs, try adapters in a browser.",
        "t2i_adapter.studio.options:StudioOptions",
        "t2i_adapter.studio.run:run",
    ),
    "export": Verb(
        "Write an adapter for ComfyUI, A1111, InvokeAI, CivitAI or a Space.",
        "t2i_adapter.verbs.export:ExportOptions",
        "t2i_adapter.verbs.export:run",
    ),
    "import": Verb(
        "Make an adapter's folder from the file of another program.",
        "t2i_adapter.verbs.import_adapter:ImportOptions",
        "t2i_adapter.verbs.import_adapter:run",
    ),
    "push": Verb(
        "Publish a trained adapter on the hub.",
        "t2i_adapter.verbs.push:PushOptions",
        "t2i_adapter.verbs.push:run",
    ),
    "pull": Verb(
        "Download an adapter from the hub and check it.",
        "t2i_adapter.verbs.pull:PullOptions",
        "t2i_adapter.verbs.pull:run",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words:
        print(overview(), file=sys.stderr)
        return 2
    return guarded(partial(run_words, words), partial(flag_name, words))


def overview(group: str = "") -> str:
    """The verbs, or those of one group, each with its summary."""
    verbs = {name: verb.summary for name, verb in VERBS.items() if name.startswith(group)}
    width = max(map(len, verbs))
    lines = [f"usage: {PROG} {group or 'VERB'} ... [flags]", ""]
    lines += [f"  {name:<{width}}  {summary}" for name, summary in verbs.items()]
    lines += ["", f"`{PROG} VERB --help` lists a verb's flags; `{PROG} --version` prints the version."]
    return "\n".join(lines)


def run_words(words: list[str]) -> None:
    """Prints what is asked for, or runs the verb that `words` begin with."""
    if words[0] in ("-h", "--help"):
        return print(overview())
    if words[0] == "--version":
        return print(f"{PROG} {__version__}")
    if words[0] in _groups() and (len(words) == 1 or words[1] in ("-h", "--help")):
        return print(overview(words[0]))
    name, rest = _find_verb(words)
    return _call(name, rest)


def _call(verb: str, argv: list[str]) -> None:
    """Parses a verb's flags and runs it. A verb that takes a run's options has --recipe and --dry_run beside them."""
    from t2i_adapter.flags import parse_flags, parse_train
    from t2i_adapter.script_flags import ROWS

    prog, function = f"{PROG} {verb}", VERBS[verb].function
    meant = {row.flag: row.paths[0] for row in ROWS if row.paths}
    cls = resolve(VERBS[verb].options)
    if VERBS[verb].options == VERBS["train"].options:
        flags = parse_train(argv, prog, meant=meant)
        resolve(function)(flags.config, dry_run=flags.dry_run)
    elif "config" in cls.__dataclass_fields__:
        resolve(function)(parse_train(argv, prog, cls=cls, meant=meant))
    else:
        options = parse_flags(cls, argv, prog)
        resolve(function)(options)


_ELSEWHERE = {"base.name": "base", "data.kind": "layout"}
"""Options of a run -> how verbs that have no such option call it."""


def flag_name(words: list[str], path: str) -> str:
    """How the verb that `words` begin with calls the option at `path` of a run's tree."""
    from t2i_adapter.flags import flag_namer, flags_of

    flags = flags_of(resolve(VERBS[_find_verb(words)[0]].options))
    last = path.rpartition(".")[2]
    for name in (path, _ELSEWHERE.get(path, ""), path.replace(".", "_"), last):
        if name in flags and path != "data.location":
            return flags[name].label or f"--{name}"
    return flag_namer({})(path)


def _groups() -> set[str]:
    return {name.split()[0] for name in VERBS if " " in name}


def _find_verb(words: list[str]) -> tuple[str, list[str]]:
    """The verb that `words` begin with, and the rest. Raises UserError."""
    length = 2 if words[0] in _groups() else 1
    name = " ".join(words[:length])
    if name in VERBS:
        return name, words[length:]
    known = [verb for verb in VERBS if verb.startswith(words[0])] if length == 2 else [*VERBS, *_groups()]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean `{close[0]}`?" if close else f"there are {', '.join(known)}"
    raise UserError(f"{name}: no such verb; {hint}")
