"""The verbs `runs ls`, `runs compare` and `runs report`: options on top, the verbs below. They import no torch."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from t2i_adapter.errors import UserError, redact
from t2i_adapter.files import output_folder, show_path, show_seconds, user_path, write_atomic

if TYPE_CHECKING:
    from t2i_adapter.runs.read import Run

PLACES = ("runs", ".")
"""Where runs are looked for if no folder is given."""
_COLOURS = {"running": "36", "finished": "32", "stopped": "33", "unfinished": "33", "killed": "31", "failed": "31"}
"""State -> ANSI colour."""


@dataclass(frozen=True)
class ListOptions:
    """Which runs to list."""

    folders: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Folders of runs, or folders that hold some, up to 3 levels deep; none: `runs` and the present folder."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True)
class CompareOptions:
    """Which runs to compare."""

    folders: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of 2 to 8 runs; the others are compared with the first."""
    out: str = "."
    """Folder for compare.html."""


@dataclass(frozen=True)
class ReportOptions:
    """Which run to write the page of."""

    folder: Annotated[str, tyro.conf.Positional]
    """Folder of the run."""


def ls(options: ListOptions) -> None:
    """Prints a line for each run, the one that began last at the end. Raises UserError for a missing folder."""
    from t2i_adapter.runs.find import DEPTH, find_runs
    from t2i_adapter.runs.read import read_run

    given = [user_path(folder) for folder in options.folders]
    for folder in given:
        _check_folder(folder)
    places = given or [Path(place) for place in PLACES]
    found = {os.path.realpath(run): run for place in places for run in find_runs(place)}
    runs = sorted((read_run(run) for run in found.values()), key=lambda run: (run.started, str(run.folder)))
    if options.json:
        print(json.dumps([run.to_json() for run in runs], indent=1))
        return
    if not runs:
        names = " and ".join(show_path(place) for place in places)
        print(f"No run was found in {names}, up to {DEPTH} folders deep.")
        return
    headings = ["run", "state", "step", "loss", "benefit", "score", "samples/s", "time", "advice"]
    rows = [_row(run) for run in runs]
    _print_table(headings, rows, [_COLOURS.get(run.state, "0") for run in runs])


def compare(options: CompareOptions) -> None:
    """Prints a table of the runs and their differences, and writes compare.html. Raises UserError."""
    from t2i_adapter.runs.compare import differences, differing_options, names_of
    from t2i_adapter.runs.compare_page import FILE, MOST_RUNS, UNPAIRED, make_comparison, overview, sentence

    if not 2 <= len(options.folders) <= MOST_RUNS:
        raise UserError(f"{len(options.folders)} runs are given; allowed are 2 to {MOST_RUNS}.", option="folders")
    runs = [_read(folder) for folder in options.folders]
    names = names_of(runs)
    headings, rows = overview(runs)
    _print_table(headings, rows)
    found = [(name, one) for name, run in zip(names[1:], runs[1:], strict=True) for one in differences(runs[0], run)]
    print()
    for name, one in found:
        print(redact(sentence(one, names[0], name)))
    if not all(one.paired for _, one in found):
        print(UNPAIRED)
    changed = differing_options(runs)
    if changed:
        print()
        _print_table(["option", *names], [[option, *map(_shown, values)] for option, values in changed.items()])
    file = output_folder(options.out) / FILE
    write_atomic(file, [make_comparison(runs).encode()])
    print(f"\nThe page is {show_path(file)}")


def report(options: ReportOptions) -> None:
    """Writes report.html of a run again, and prints its state. Raises UserError."""
    from t2i_adapter.runs.page import write_page
    from t2i_adapter.runs.words import verdict

    run = _read(options.folder)
    print(redact(verdict(run).sentence))
    print(f"The page is {show_path(write_page(run.folder))}")


def _read(name: str) -> Run:
    """The run in a folder. Raises UserError if there is none."""
    from t2i_adapter.runs.find import is_run
    from t2i_adapter.runs.read import read_run

    folder = user_path(name)
    _check_folder(folder)
    if not is_run(folder, {entry.name for entry in folder.iterdir()}):
        raise UserError(f"{name}: no run was found in this folder; name a folder that `train` has written.")
    return read_run(folder)


def _check_folder(folder: Path) -> None:
    try:
        os.scandir(folder).close()
    except (OSError, ValueError) as fault:
        reason = getattr(fault, "strerror", None) or fault
        raise UserError(f"{folder}: {reason}; name a folder of runs, or one that holds some.") from None


def _row(run: Run) -> list[str]:
    from t2i_adapter.runs.words import ADVICE, last_score, moment, percent

    look, advice = run.metrics.last_look, run.metrics.advice[-1:]
    left = run.seconds_left
    time = f"{show_seconds(left)} left" if left is not None else moment(run.ended or run.started)
    steps = f"{run.step:,}" + (f"/{run.steps:,}" if run.steps and run.steps != run.step else "")
    said = f"{ADVICE.get(advice[0].kind, advice[0].kind)}, step {advice[0].step:,}" if advice else ""
    return [
        show_path(run.folder),
        run.state,
        steps if run.step or run.steps else "",
        "" if run.loss is None else f"{run.loss:.4f}",
        percent(look.benefit) if look else "",
        last_score(run, 2),
        "" if run.samples_per_s is None else f"{run.samples_per_s:.3g}",
        time,
        said,
    ]


def _shown(value: object) -> str:
    return "none" if value is None else str(value)


def _print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], colours: Sequence[str] = ()) -> None:
    """Prints aligned columns without the empty ones. On a terminal lines end at its edge, and states have colours."""
    is_terminal = _is_terminal()
    cells = [[redact(cell).replace("\n", " ") for cell in row] for row in (headings, *rows)]
    used = [place for place in range(len(headings)) if any(row[place] for row in cells[1:])]
    widths = {place: max(len(row[place]) for row in cells) for place in used}
    width = shutil.get_terminal_size().columns if is_terminal else None
    for number, row in enumerate(cells):
        line = "  ".join(row[place].ljust(widths[place]) for place in used).rstrip()[:width]
        if is_terminal and "NO_COLOR" not in os.environ:
            line = _coloured(line, number, row, colours)
        print(line)


def _is_terminal() -> bool:
    return sys.stdout.isatty()


def _coloured(line: str, number: int, row: Sequence[str], colours: Sequence[str]) -> str:
    if number == 0:
        return f"\033[1m{line}\033[0m"
    if not colours:
        return line
    head, state, rest = line.partition(f"  {row[1]}")
    return f"{head}\033[{colours[number - 1]}m{state}\033[0m{rest}" if state else line
