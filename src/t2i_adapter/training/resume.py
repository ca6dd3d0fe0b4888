"""What may change between a run and its going on, and what makes it another run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from t2i_adapter.config.tree import Config, to_dict
from t2i_adapter.errors import UserError

HARMLESS = {
    "output_dir": "where it is written",
    "base.cache_dir": "where downloads are kept",
    "data.cache_dir": "where downloads are kept",
    "data.prepared_dir": "where the cache is",
    "data.cache": "when pictures are encoded",
    "data.text_cache": "when captions are encoded",
    "data.num_workers": "who builds the batches",
    "data.on_bad_sample": "what happens to rows that cannot be read",
    "data.max_bad_share": "how many of them are too many",
    "train.batch_size": "how the global batch is cut up; its size is compared by itself",
    "train.gradient_accumulation_steps": "the same",
    "train.max_steps": "where it ends; the learning rate follows the new end",
    "train.epochs": "the same",
    "train.seed": "compared by itself, as it may have been drawn",
    "train.max_time": "when it pauses",
    "train.gradient_checkpointing": "the same gradients in less memory",
    "train.checkpoint_blocks": "the same",
    "train.xformers": "the same to rounding",
    "train.allow_tf32": "the same to rounding",
    "train.compile": "the same to rounding",
    "train.channels_last": "the same to rounding",
    "train.lanes": "the same to rounding",
    "train.profile": "looking on changes nothing",
    "train.on_nonfinite": "what happens to steps that are lost anyway",
    "train.max_nonfinite": "the same",
    "checkpoint": "saving changes nothing",
    "validation": "drawing changes nothing",
    "tracking": "logging changes nothing",
    "hub": "after the run",
}
"""Options, or whole groups of them, that may change freely, each with why. Any other makes another run."""

PLAN = {"seed": "train.seed", "global_batch": "the global batch", "samples": "the number of pairs"}
"""Parts of a plan that make another run, whatever they follow from."""


@dataclass(frozen=True)
class Change:
    """An option that differs, and whether the run is still the same."""

    name: str
    before: Any
    after: Any
    harmless: bool

    def __str__(self) -> str:
        return f"{self.name} {self.before} -> {self.after}"


def changes(state: Mapping[str, Any], config: Config, plan: Mapping[str, Any]) -> list[Change]:
    """What differs between a checkpoint's state and the run that is to go on from it."""
    before, after, initial = (flat(tree) for tree in (state["options"], to_dict(config), to_dict(Config())))
    found = [
        # An option that the checkpoint's version did not have was then as it is by default now.
        Change(name, before.get(name, initial[name]), value, is_harmless(name))
        for name, value in after.items()
        if before.get(name, initial[name]) != value and name not in ("checkpoint.resume", "train.seed")
    ]
    for name, words in PLAN.items():
        if state["plan"][name] and state["plan"][name] != plan[name]:
            found.append(Change(words, state["plan"][name], plan[name], False))
    return found


def check(found: list[Change], checkpoint: str, *, allowed: bool) -> None:
    """Raises UserError for changes that make another run, unless they are allowed."""
    breaking = ", ".join(str(change) for change in found if not change.harmless)
    if breaking and not allowed:
        raise UserError(
            f"--resume_from_checkpoint: {breaking}: this would not be the run of {checkpoint} any more. "
            "Set it back, name another --output_dir, or go on all the same with --checkpoint.allow_changed."
        )


def is_harmless(name: str) -> bool:
    """Whether an option, by its dotted path, may change freely."""
    return name in HARMLESS or name.partition(".")[0] in HARMLESS


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value of every option."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found
