"""Chooses the pairs that a run measures control on: of a split for tests, or left out of the training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from t2i_adapter.config.tree import Config, DataOptions
from t2i_adapter.data.generated import SHAPES_FORM
from t2i_adapter.data.source import Source, open_source
from t2i_adapter.errors import UserError, flag

SPLITS = ("validation", "val", "valid", "test")
"""Folders of a dataset that hold held-out pairs, in the order of preference."""
FEWEST = 8
"""Fewer held-out pairs are not enough for a statement."""
LEFT_OUT_SHARE = 0.1
"""Most of a dataset's pairs that are left out of training."""
_SEED = 0  # not the run's, so that all runs on a dataset measure the same pairs and can be compared


@dataclass(frozen=True)
class HeldOut:
    """What a run trains on and what it measures.

    Attributes:
        training: the pairs to train on.
        measured: the pairs to measure control on.
        origin: "held-out" if the run does not train on `measured`, else "training".
        seen: pairs of the training, as many as `measured` at most: a run that remembers its pairs instead of learning
            gains on these alone. None if `measured` are such pairs.
        line: what was chosen, for the plan.
    """

    training: Source
    measured: Source
    origin: Literal["held-out", "training"]
    seen: Source | None
    line: str


def choose_held_out(config: Config, source: Source) -> HeldOut:
    """Chooses the pairs to measure, which do not depend on the run's seed, length or budget.

    Raises UserError if `validation.split` names a split that cannot be read.
    """
    count, split = config.validation.held_out, config.validation.split
    if split not in (None, "none"):
        return _of_split(config, source, _open(config, source, split), split)
    found = None if split == "none" else _own_split(config, source)
    if found:
        return _of_split(config, source, found[0], found[1])
    left_out = min(count, int(len(source) * LEFT_OUT_SHARE))
    if split == "none" or left_out < FEWEST:
        why = "as asked" if split == "none" else f"too few to leave {FEWEST} out"
        some = _choose(len(source), count)
        line = f"{len(some)} pairs of the training ({why}); {flag('validation.split')} names others"
        return HeldOut(source, source.subset(some), "training", None, line)
    chosen = _choose(len(source), left_out)
    is_left = np.ones(len(source), bool)
    is_left[chosen] = False
    rest = source.subset(np.flatnonzero(is_left).astype(np.int32))
    line = f"{left_out} pairs, which are left out of training; {flag('validation.split')} none trains on them too"
    return HeldOut(rest, source.subset(chosen), "held-out", rest.subset(_choose(len(rest), left_out)), line)


def _of_split(config: Config, source: Source, measured: Source, split: str) -> HeldOut:
    seen = source.subset(_choose(len(source), len(measured)))
    origin = "training" if split == config.data.split else "held-out"
    return HeldOut(source, measured, origin, seen, f"{len(measured)} pairs of the split {split}")


def _open(config: Config, source: Source, split: str) -> Source:
    """The pairs of another split of `source`, as many as are measured."""
    options = replace(_data(config, config.validation.held_out), split=split)
    return open_source(options, _SEED, source.parts)


def _own_split(config: Config, source: Source) -> tuple[Source, str] | None:
    """The pairs of the dataset's own split for tests, and its name; None if it is not local or has none that can be
    read."""
    location = config.data.location or ""
    is_generated = SHAPES_FORM.fullmatch(location) or config.data.kind == "emoji"
    for split in SPLITS:
        if split == config.data.split or not (is_generated or (location and (Path(location) / split).is_dir())):
            continue
        try:
            found = _open(config, source, split)
        except UserError:  # a folder of this name that holds something else
            continue
        if len(found) >= FEWEST:
            return found, split
    return None


def _data(config: Config, count: int) -> DataOptions:
    return replace(config.data, max_train_samples=count, skip=None)


def some_of(source: Source, count: int) -> Source:
    """`count` pairs of a source, or all if it has fewer."""
    return source.subset(_choose(len(source), count))


def _choose(total: int, count: int) -> np.ndarray:
    """`count` of `total` numbers, or all, ascending."""
    count = min(count, total)
    return np.sort(np.random.default_rng(_SEED).choice(total, count, replace=False))
