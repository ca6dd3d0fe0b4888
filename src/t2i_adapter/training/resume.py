"""What may change between a run and its resume, and what makes it another run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from typing import Any

from t2i_adapter.config.recipe import RENAMED
from t2i_adapter.config.tree import RES_BLOCKS, Config, OptimOptions, flat, to_dict
from t2i_adapter.errors import UserError, flag
from t2i_adapter.training.optim import lr_schedule
from t2i_adapter.training.plan import Plan

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "datasets", "sdxl-t2i-adapter")
"""Libraries that a run's numbers depend on."""

HARMLESS = {
    "output_dir": "where the run is written",
    "base.cache_dir": "where downloads are stored",
    "data.cache_dir": "where downloads are stored",
    "data.prepared_dir": "where the cache is",
    "data.local_gb": "how much of the cache is copied",
    "data.part": "prepare alone has it",
    "data.on_missing": "whether missing records are encoded",
    "data.cache": "when pictures are encoded",
    "data.text_cache": "when captions are encoded",
    "data.num_workers": "which processes build the batches",
    "data.on_bad_sample": "what happens to rows that cannot be read",
    "data.max_bad_share": "how many bad rows are too many",
    "train.batch_size": "how the global batch is split; PLAN compares the global batch",
    "train.gradient_accumulation_steps": "how the global batch is split; PLAN compares the global batch",
    "train.global_batch": "how the global batch is split; PLAN compares the global batch",
    "train.max_steps": "where the run ends; the learning rate follows the new end",
    "train.epochs": "where the run ends; the learning rate follows the new end",
    "train.seed": "PLAN compares the seed in use, which may have been random",
    "train.mixed_precision": "PLAN compares the precision in use, which may follow from the device",
    "train.max_time": "when the run stops",
    "train.device": "equal to rounding",
    "train.deterministic": "equal to rounding",
    "train.stop_signals": "when the run stops",
    "train.stop_code": "what the run exits with",
    "train.patience": "how long a lost process is waited for",
    "train.gradient_checkpointing": "equal gradients in less memory",
    "train.checkpoint_blocks": "equal gradients in less memory",
    "train.xformers": "equal to rounding",
    "train.allow_tf32": "equal to rounding",
    "train.compile": "equal to rounding",
    "train.channels_last": "equal to rounding",
    "train.cpu_threads": "equal to rounding",
    "train.profile": "equal to rounding",
    "train.on_nonfinite": "what happens after NaN or inf",
    "train.max_nonfinite": "what happens after NaN or inf",
    "checkpoint": "saving changes no number",
    "validation": "validation changes no number",
    "tracking": "logging changes no number",
    "hub": "after the run",
}
"""Options, or whole groups of them, that may change, each with the reason. Any other makes another run."""

PLAN = {
    "seed": "train.seed",
    "global_batch": "the global batch",
    "samples": "the number of pairs",
    "precision": "train.mixed_precision",
}
"""Parts of a plan that make another run if they change, and their names in a message."""


@dataclass(frozen=True)
class Change:
    """An option that differs, and whether the run is still the same one."""

    name: str
    before: Any
    after: Any
    is_harmless: bool

    def __str__(self) -> str:
        return f"{self.name} {self.before} -> {self.after}"


def check_same_run(state: Mapping[str, Any], config: Config, plan: Mapping[str, Any], checkpoint: str) -> list[str]:
    """A line for each option and library that changed since a checkpoint with that state.json.

    Raises UserError if a change makes another run, unless `checkpoint.allow_changed` is set.
    """
    found = changes(state, config, plan)
    check(found, checkpoint, allowed=config.checkpoint.allow_changed)
    lines = [f"Changed since {checkpoint}: {change}" for change in found]
    for name, now in versions().items():
        before = state.get("versions", {}).get(name, now)
        if before != now:
            lines.append(f"Changed since {checkpoint}: {name} {before} -> {now}; last bits may differ")
    return lines


def rate_change(state: Mapping[str, Any], config: Config, plan: Plan) -> list[str]:
    """A line if the next step gets another learning rate than the checkpoint's options would give it."""
    step, saved = state["step"], state["options"]["optim"]
    known = {name: value for name, value in saved.items() if name in OptimOptions.__dataclass_fields__}
    try:
        old_plan = replace(plan, steps=state["plan"]["steps"], lr=state["plan"]["lr"])
        old, new = lr_schedule(OptimOptions(**known), old_plan), lr_schedule(config.optim, plan)
        would_be, now, last = old(step), new(step), old(step - 1)
    except (UserError, KeyError, TypeError, ValueError, ArithmeticError):  # options of another version
        return []
    if step >= plan.steps or math.isclose(would_be, now, rel_tol=1e-9):
        return []
    return [
        f"Learning rate: step {step + 1} gets {now:.4g}, {now / plan.lr:.2g} of the peak rate; "
        f"step {step} had {last:.4g}, {last / old_plan.lr:.2g} of it."
    ]


def changes(state: Mapping[str, Any], config: Config, plan: Mapping[str, Any]) -> list[Change]:
    """What differs between a checkpoint's state.json and the run that resumes from it."""
    before, after, initial = (flat(tree) for tree in (state["options"], to_dict(config), to_dict(Config())))
    for former, name in RENAMED.items():  # an older version wrote the checkpoint
        if before.get(former) is not None:
            before.setdefault(name, before[former])
    for tree in (before, after, initial):  # a number, whether it was written or None stood for it
        kind = tree.get("adapter.type") or ""
        tree["adapter.num_res_blocks"] = tree.get("adapter.num_res_blocks") or RES_BLOCKS.get(kind, 2)
    found = [
        # An option that the checkpoint's version did not have counts as its default value.
        Change(name, before.get(name, initial[name]), value, is_harmless(name))
        for name, value in after.items()
        if before.get(name, initial[name]) != value
        and name not in ("checkpoint.resume", "train.seed", "train.mixed_precision")
    ]
    for name, words in PLAN.items():
        before_that = state["plan"].get(name, plan[name])
        if before_that != plan[name]:
            found.append(Change(words, before_that, plan[name], False))
    return found


def check(found: list[Change], checkpoint: str, *, allowed: bool) -> None:
    """Raises UserError for changes that make another run, unless they are allowed."""
    breaking = ", ".join(str(change) for change in found if not change.is_harmless)
    if breaking and not allowed:
        raise UserError(
            f"would mix two runs: {breaking} since {checkpoint}. Set it back, name another {flag('output_dir')}, "
            f"or resume in spite of it with {flag('checkpoint.allow_changed')}.",
            option="checkpoint.resume",
        )


def is_harmless(name: str) -> bool:
    """Whether an option, by its dotted path, may change on a resume."""
    return name in HARMLESS or name.partition(".")[0] in HARMLESS


def versions() -> dict[str, str]:
    """Library -> version, for those that a run's numbers depend on."""
    return {name: _version(name) for name in LIBRARIES}


@cache
def _version(library: str) -> str:
    """The version of an installed library; the first call parses its whole description."""
    return version(library)
