"""The drop-in script: the command line of diffusers' `train_t2i_adapter_sdxl.py` on our option tree. Loads no torch.

Its flags, types, choices and defaults mean what they mean in that script; they are checked before anything heavy is
imported. Every flag of `t2i-adapter train` may stand beside them (`--optim.warmup_steps 20`).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_origin

from t2i_adapter.config.read import option_types, with_values, without_none
from t2i_adapter.config.tree import Config
from t2i_adapter.exits import guarded
from t2i_adapter.flags import Flag, TrainFlags, flag_namer, is_help, parse_train
from t2i_adapter.imports import resolve
from t2i_adapter.script_flags import ROWS, SCRIPT_WAYS, Row

PROG = "train_t2i_adapter_sdxl.py"


def script_defaults() -> Config:
    """The option tree with the script's defaults; `base.name` is empty, as it has no default there."""
    values = {path: value for row in ROWS if row.type for path, value in row.values(row.default).items()}
    return with_values(Config(), {**values, "base.name": "", **SCRIPT_WAYS})


def parse(argv: Sequence[str]) -> TrainFlags:
    """The script's flags and ours, over the script's defaults. Raises UserError."""
    kinds = option_types(Config)
    flags = {row.flag: Flag(row.paths, _kind(row, kinds), row.given if row.type is None else None) for row in ROWS}
    given = parse_train(argv, PROG, defaults=script_defaults(), more=flags, meant={row.flag: row.flag for row in ROWS})
    if given.config.train.mixed_precision is None and "ACCELERATE_MIXED_PRECISION" not in os.environ:
        # Without accelerate's configuration the script computes in fp32; our own default is bf16 on a GPU that has it.
        return replace(given, config=with_values(given.config, {"train.mixed_precision": "no"}))
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the drop-in script; returns the exit code."""
    names = {path: f"--{row.flag}" for row in reversed(ROWS) if row.given is True for path in row.paths}
    names["data.location"] = "--train_data_dir or --dataset_name"
    return guarded(partial(_train, sys.argv[1:] if argv is None else list(argv)), flag_namer(names))


def flag_table() -> str:
    """The rows as a Markdown table, which `docs/diffusers-script.md` shows."""
    lines = ["| flag | value | default | here | note |", "|---|---|---|---|---|"]
    for row in ROWS:
        value = "switch" if row.type is None else " \\| ".join(row.choices or (row.type.__name__,))
        value += " ..." if row.nargs else ""
        default = "" if _has_no_default(row) else f"`{row.default}`"
        places = ", ".join(f"`{path}`" for path in row.paths) or "accepted, no effect"
        lines.append(f"| `--{row.flag}` | {value} | {default} | {places} | {row.note} |")
    return "\n".join(lines) + "\n"


def _train(argv: list[str]) -> None:
    if is_help(argv):
        return print(_help())
    flags = parse(argv)
    _warn_of_idle_flags(argv)
    return resolve("t2i_adapter.verbs.train:run")(flags.config, dry_run=flags.dry_run)


def _warn_of_idle_flags(argv: list[str]) -> None:
    """Prints one line, on the main process, about given flags that have no effect."""
    given = {word.partition("=")[0] for word in argv}
    idle = [f"--{row.flag}" for row in ROWS if not row.place and f"--{row.flag}" in given]
    if idle and os.environ.get("RANK", "0") == "0":
        print(f"accepted, no effect: {', '.join(idle)}", file=sys.stderr)


def _kind(row: Row, kinds: dict[str, Any]) -> Any:
    """The type by which a flag is read: the script's, or the option's if that is a list of choices."""
    if row.choices:
        return Literal[row.choices]
    if row.nargs:
        return tuple[row.type, ...]  # type: ignore[valid-type]
    own = without_none(kinds.get(row.place))
    return own if get_origin(own) is Literal else row.type


def _help() -> str:
    parser = argparse.ArgumentParser(
        prog=PROG,
        usage=f"{PROG} --pretrained_model_name_or_path BASE (--dataset_name ID | --train_data_dir DIR) [flags]",
        description="Train a T2I-Adapter for SDXL, or for Stable Diffusion 1.5 or 2.1, with the flags of the diffusers "
        "script of this name.",
        epilog="Every flag of `t2i-adapter train --help` may stand beside them, such as --optim.warmup_steps 20.",
        add_help=False,
    )
    for row in ROWS:
        default = "required" if row.required else "" if _has_no_default(row) else f"default: {row.default}"
        text = row.note.replace("%", "%%") + (f" ({default})" if default else "")
        if row.type is None:
            parser.add_argument(f"--{row.flag}", action="store_true", help=text)
        else:
            metavar = None if row.choices else row.type.__name__.upper()
            parser.add_argument(f"--{row.flag}", nargs=row.nargs, choices=row.choices, metavar=metavar, help=text)
    return parser.format_help()


def _has_no_default(row: Row) -> bool:
    return row.default is None or row.type is None
