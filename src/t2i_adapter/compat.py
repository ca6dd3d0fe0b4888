"""The diffusers script's command line on our option tree: one row per flag. Importing this module loads no torch.

`train_t2i_adapter_sdxl.py` means what that script means: its flags, types, choices and defaults, checked before
anything heavy is imported. Every option of `t2i-adapter train` may stand beside them (`--optim.warmup_steps 20`).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args, get_origin

from t2i_adapter.config import Config
from t2i_adapter.flags import LineParser, TrainFlags, parse_train
from t2i_adapter.load import describe, nearest, option_types, with_values

PROG = "train_t2i_adapter_sdxl.py"


@dataclass(frozen=True)
class Row:
    """One flag of the diffusers script.

    Attributes:
        flag: its name without dashes.
        place: dotted path of the option it sets ("optim.betas.0" is a tuple's first item), several apart by a space;
            empty: accepted, without effect.
        type: what its value is; None: a switch without a value.
        default: as in the script.
        note: what it does here.
        nargs, choices, required: as in the script.
        given: what a switch puts in its place when it is given.
    """

    flag: str
    place: str
    type: type[str] | type[int] | type[float] | None
    default: Any
    note: str
    nargs: str | None = None
    choices: tuple[str, ...] | None = None
    required: bool = False
    given: Any = True

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(self.place.split())

    def values(self, value: Any) -> dict[str, Any]:
        """What the flag's value, as argparse gives it, sets in the tree."""
        if self.nargs == "+":
            value = tuple(value or ())
        return dict.fromkeys(self.paths, value)


def _switch(flag: str, place: str, note: str, *, given: Any = True) -> Row:
    return Row(flag, place, None, False, note, given=given)


ROWS = (
    Row("pretrained_model_name_or_path", "base.name", str, None, "SDXL: hub id, folder or one .safetensors file; "
        "`nano` is the base that comes with the package.", required=True),
    Row("pretrained_vae_model_name_or_path", "base.vae", str, None, "Another VAE: hub id or folder."),
    Row("adapter_model_name_or_path", "adapter.init_from", str, None, "Adapter to continue from."),
    Row("revision", "base.revision", str, None, "Hub revision of the base."),
    Row("variant", "base.variant", str, None, "Weight file variant of the base, such as fp16."),
    Row("tokenizer_name", "", str, None, "The script never reads it; tokenizers come with the base."),
    Row("output_dir", "output_dir", str, "t2iadapter-model", "Folder of everything the run writes."),
    Row("cache_dir", "base.cache_dir data.cache_dir", str, None, "Folder for downloads of base and data."),
    Row("seed", "train.seed", int, None, "One seed for every choice; drawn and printed where it is not given."),
    Row("resolution", "data.resolution", int, 1024, "Side of the training crop; a multiple of 16 for a new adapter."),
    Row("detection_resolution", "", int, None, "The script never reads it; condition pictures come from the data."),
    Row("crops_coords_top_left_h", "data.crops_coords_top_left_h", int, 0,
        "Added to the top coordinate of each picture's own crop, which the script leaves out."),
    Row("crops_coords_top_left_w", "data.crops_coords_top_left_w", int, 0,
        "Added to the left coordinate of each picture's own crop, which the script leaves out."),
    Row("train_batch_size", "train.batch_size", int, 4, "Samples a device and micro-step."),
    Row("num_train_epochs", "train.epochs", int, 1, "Passes over the data; --max_train_steps wins."),
    Row("max_train_steps", "train.max_steps", int, None, "Updates in all."),
    Row("checkpointing_steps", "checkpoint.every", int, 500, "Updates between checkpoints."),
    Row("checkpoints_total_limit", "checkpoint.keep", int, 3, "Checkpoints to keep; the oldest goes last."),
    Row("resume_from_checkpoint", "checkpoint.resume", str, None,
        "`auto`, `latest` or a checkpoint's folder; goes on where it stopped (the script crashes)."),
    Row("gradient_accumulation_steps", "train.gradient_accumulation_steps", int, 1, "Micro-steps an update."),
    _switch("gradient_checkpointing", "train.gradient_checkpointing", "Less memory, more time."),
    Row("learning_rate", "optim.lr", float, 5e-6, "Peak learning rate; our own default is higher."),
    _switch("scale_lr", "optim.scale_lr", "Multiply the learning rate by the global batch."),
    Row("lr_scheduler", "optim.schedule", str, "constant",
        "Any schedule of diffusers; counted in updates for any number of processes."),
    Row("lr_warmup_steps", "optim.warmup_steps", int, 500, "For schedules with a warm-up; `constant` has none."),
    Row("lr_num_cycles", "optim.num_cycles", int, 1, "Hard restarts of cosine_with_restarts."),
    Row("lr_power", "optim.power", float, 1.0, "Power of the polynomial schedule."),
    _switch("use_8bit_adam", "optim.name", "AdamW with 8-bit states; needs bitsandbytes.", given="adamw8bit"),
    Row("dataloader_num_workers", "data.num_workers", int, None, "Processes that build batches; 1, or 0 on a CPU."),
    Row("adam_beta1", "optim.betas.0", float, 0.9, "Decay of Adam's first moment."),
    Row("adam_beta2", "optim.betas.1", float, 0.999, "Decay of Adam's second moment."),
    Row("adam_weight_decay", "optim.weight_decay", float, 1e-2, "Decoupled weight decay."),
    Row("adam_epsilon", "optim.eps", float, 1e-8, "Added to Adam's denominator."),
    Row("max_grad_norm", "optim.max_grad_norm", float, 1.0, "Gradients are scaled down to this norm."),
    _switch("push_to_hub", "hub.push", "Upload adapter, card and pictures at the end, and nothing else."),
    Row("hub_token", "hub.token", str, None, "Access token; written nowhere."),
    Row("hub_model_id", "hub.model_id", str, None, "Repository; the output folder's name by default."),
    Row("logging_dir", "tracking.logging_dir", str, "logs", "Folder of the tracker's files, in the output folder."),
    _switch("allow_tf32", "train.allow_tf32", "TF32 matrix products on Ampere and newer."),
    Row("report_to", "tracking.report_to", str, "tensorboard", "A tracker of accelerate, `all` or `none`."),
    Row("mixed_precision", "train.mixed_precision", str, None, "accelerate's setting by default.",
        choices=("no", "fp16", "bf16")),
    _switch("enable_xformers_memory_efficient_attention", "train.xformers", "xFormers' attention; SDPA otherwise."),
    _switch("set_grads_to_none", "", "Always so here."),
    Row("dataset_name", "data.dataset_name", str, None, "Hub id or folder of a data set; or --train_data_dir."),
    Row("dataset_config_name", "data.dataset_config_name", str, None, "Configuration of the data set."),
    Row("train_data_dir", "data.train_data_dir", str, None, "Folder of pairs; or --dataset_name."),
    Row("image_column", "data.image_column", str, "image", "Column of the target picture."),
    Row("conditioning_image_column", "data.conditioning_image_column", str, "conditioning_image",
        "Column of the condition picture."),
    Row("caption_column", "data.caption_column", str, "text", "Column of the caption, or of a list of captions."),
    Row("max_train_samples", "data.max_train_samples", int, None, "Use only this many rows."),
    Row("proportion_empty_prompts", "data.proportion_empty_prompts", float, 0,
        "Share of empty captions, drawn anew whenever a batch is built (once for all in the script)."),
    Row("validation_prompt", "validation.prompts", str, None, "One or more prompts.", nargs="+"),
    Row("validation_image", "validation.images", str, None, "As many condition pictures, or one.", nargs="+"),
    Row("num_validation_images", "validation.num_images", int, 4, "Pictures a prompt."),
    Row("validation_steps", "validation.every", int, 100, "Updates between validations."),
    Row("tracker_project_name", "tracking.project", str, "sd_xl_train_t2iadapter", "Project's name in the tracker."),
)  # fmt: skip

SCRIPT_WAYS = {
    "adapter.in_channels": 3,
    "adapter.num_res_blocks": 2,
    "adapter.init": "default",
    "objective.timesteps": "cubic",
    "objective.min_snr_gamma": None,
    "objective.noise_offset": 0.0,
    "objective.stratify": False,
    "optim.name": "adamw",
    "train.ema_decay": 0.0,
    "train.noise_draws": 1,
}
"""What the script does without a flag for it: kept, wherever our own defaults have moved on."""


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
    from t2i_adapter.cli import guarded

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
    from t2i_adapter.cli import resolve

    return resolve("t2i_adapter.training.run:run")(flags.config, dry_run=flags.dry_run)


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
