"""The diffusers script's command line on our option tree: one row per flag. Importing this module loads no torch.

`train_t2i_adapter_sdxl.py` means what that script means: its flags, types, choices and defaults, checked before
anything heavy is imported. Every option of `t2i-adapter train` may stand beside them (`--optim.warmup_steps 20`).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args, get_origin

from t2i_adapter.config.read import describe, nearest, option_types, with_values
from t2i_adapter.config.tree import Config
from t2i_adapter.flags import LineParser, TrainFlags, parse_train
from t2i_adapter.script_flags import ROWS, SCRIPT_WAYS, Row

PROG = "train_t2i_adapter_sdxl.py"


def script_defaults() -> Config:
    """The option tree as the diffusers script starts from; `base.name` is empty, as it has no default there."""
    values = {path: value for row in ROWS if row.type for path, value in row.values(row.default).items()}
    return with_values(Config(), {**values, "base.name": "", **SCRIPT_WAYS})


def parse(argv: Sequence[str]) -> TrainFlags:
    """The script's flags and our own, over the script's defaults. Raises UserError for what does not parse or fit."""
    given, ours = _parser().parse_known_args(list(argv))
    values = {path: value for row in ROWS for path, value in row.values(getattr(given, row.flag, None)).items()
              if hasattr(given, row.flag)}  # fmt: skip
    names = {row.flag: row.flag for row in ROWS}
    return parse_train(ours, PROG, script_defaults(), values, names)


def main(argv: Sequence[str] | None = None) -> int:
    """The drop-in script; returns the exit code."""
    from t2i_adapter.exits import guarded

    return guarded(partial(_train, sys.argv[1:] if argv is None else list(argv)))


def flag_table() -> str:
    """The rows as a Markdown table: what `docs/diffusers-script.md` shows."""
    lines = ["| flag | value | default | here | note |", "|---|---|---|---|---|"]
    for row in ROWS:
        value = "switch" if row.type is None else " \\| ".join(row.choices or (row.type.__name__,))
        value += " ..." if row.nargs else ""
        default = "" if _has_no_default(row) else f"`{row.default}`"
        places = ", ".join(f"`{path}`" for path in row.paths) or "accepted, no effect"
        lines.append(f"| `--{row.flag}` | {value} | {default} | {places} | {row.note} |")
    return "\n".join(lines) + "\n"


def _train(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        return print(_parser().format_help())
    flags = parse(argv)
    _tell_idle(argv)
    from t2i_adapter.imports import resolve

    return resolve("t2i_adapter.verbs.train:run")(flags.config, dry_run=flags.dry_run)


def _tell_idle(argv: list[str]) -> None:
    """One line, from the main process, about given flags that have no effect."""
    given = {word.partition("=")[0] for word in argv}
    idle = [f"--{row.flag}" for row in ROWS if not row.place and f"--{row.flag}" in given]
    if idle and os.environ.get("RANK", "0") == "0":
        print(f"accepted, no effect: {', '.join(idle)}", file=sys.stderr)


def _parser() -> LineParser:
    """argparse for the rows; what it does not know (our own flags, and mistakes) is left over."""
    parser = LineParser(
        prog=PROG,
        usage=f"{PROG} --pretrained_model_name_or_path BASE (--dataset_name ID | --train_data_dir DIR) [flags]",
        description="Train a T2I-Adapter for SDXL: the flags of the diffusers script of this name.",
        epilog="Every flag of `t2i-adapter train --help` may stand beside them, such as --optim.warmup_steps 20.",
    )
    kinds = option_types(Config)
    for row in ROWS:
        options: dict[str, Any] = {"help": _help(row)}
        if row.type is None:
            options |= {"action": "store_const", "const": row.given}
        else:
            options |= {
                "type": _reader(row, kinds.get(row.place)),
                "nargs": row.nargs,
                "choices": row.choices,
                "metavar": _metavar(row),
            }
        parser.add_argument(f"--{row.flag}", **options)
    return parser


def _help(row: Row) -> str:
    default = "required" if row.required else "" if _has_no_default(row) else f"default: {row.default}"
    return row.note.replace("%", "%%") + (f" ({default})" if default else "")


def _has_no_default(row: Row) -> bool:
    return row.default is None or row.type is None


def _metavar(row: Row) -> str | None:
    return None if row.choices or row.type is None else row.type.__name__.upper()


def _reader(row: Row, kind: Any) -> Callable[[str], Any]:
    """Reads the flag's text; what is allowed is told by the type of the flag, or by the list its option allows.

    kind: that option's type.
    """
    allowed = get_args(kind) if get_origin(kind) is Literal and row.choices is None else ()

    def read(text: str) -> Any:
        assert row.type is not None
        try:
            value = row.type(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {text!r}, allowed is {describe(row.type)}") from None
        if allowed and value not in allowed:
            close = nearest(text, list(allowed))
            hint = f"; did you mean {close[0]}?" if close else ""
            raise argparse.ArgumentTypeError(f"got {text!r}, allowed is {describe(kind)}{hint}")
        return value

    return read
