"""What measurements of control say about a run: is the condition read, is gain left, does the adapter overfit, which
checkpoint is the best.

A look is one measurement at fixed pairs and fixed noise. The `Advisor` receives the looks of a run in their order and
returns statements, each at most once. Each kind of statement is wrong with probability ALPHA at most over all looks of
a run; docs/control.md derives the rules, benchmarks/stop_rule.py simulates them.

Letters: N held-out pairs, M pairs of the training, T noise bands, P generated pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Look:
    """One measurement of losses and scores, at pairs and noise that are the same in all looks of a run."""

    step: int
    """Updates made so far."""
    right: np.ndarray
    """(N,T) loss of each pair in each noise band, with the pair's own condition."""
    other: np.ndarray
    """(N,T) loss with the condition of another pair."""
    none: np.ndarray
    """(N,T) loss of the base without the adapter, above 0; the same in all looks of a run."""
    training: np.ndarray | None = None
    """(M,2,T) losses of M fixed pairs of the training: with the own condition, and without the adapter."""
    score: np.ndarray | None = None
    """(P,) score of each generated picture, higher is better; None if this look has no score."""
    score_ceiling: float | None = None
    """Mean score of the target pictures."""


@dataclass(frozen=True)
class Advice:
    """A statement about the run that its looks prove."""

    kind: str
    """`read`, `not_read`, `plateau`, `plateau_over` (gain came back) or `overfitting`."""
    step: int
    text: str
    """One line for people."""
    numbers: dict[str, float] = field(default_factory=dict)
    """The numbers behind the text."""

    def to_json(self) -> dict[str, Any]:
        """Returns {"kind", "text", "numbers"}."""
        return {"kind": self.kind, "text": self.text, "numbers": self.numbers}


def use_by_band(look: Look) -> np.ndarray:
    """(N,T) use of each pair in each noise band: L(other) - L(right), in units of the band's mean L(none)."""
    return (look.other - look.right) / look.none.mean(0)


def use(look: Look) -> np.ndarray:
    """(N,) use of each pair, mean over the bands. The mean over the pairs is the mean of the bands' uses."""
    return use_by_band(look).mean(1)


def benefit_by_band(look: Look) -> np.ndarray:
    """(N,T) benefit of each pair in each noise band. Its mean over the pairs is B = 1 - mean L(right) / mean L(none).

    The values are those of the linearised ratio (delta method): with y = L(none) / mean L(none) and
    x = L(right) / mean L(none), a pair has y - x + B (1 - y). So Student's interval of the values is that of B.
    """
    return _benefit(look.right, look.none)


def benefit(look: Look) -> np.ndarray:
    """(N,) benefit of each pair, mean over the bands. The mean over the pairs is the mean of the bands' benefits."""
    return benefit_by_band(look).mean(1)


def training_benefit(look: Look) -> np.ndarray | None:
    """(M,) benefit on the pairs of the training, as `benefit`; None if it was not measured."""
    return None if look.training is None else _benefit(look.training[:, 0], look.training[:, 1]).mean(1)


def _benefit(right: np.ndarray, none: np.ndarray) -> np.ndarray:
    unit = none.mean(0)
    means = 1 - right.mean(0) / unit
    return (none - right) / unit + means * (1 - none / unit)


class Advisor:
    """Makes statements from the looks of a run. Its state is a function of the looks alone: an advisor that receives
    the same looks again makes the same statements."""

    def __init__(self, *, steps: int, held_out: bool) -> None:
        """steps: updates that the run plans. held_out: False if the N pairs are pairs of the training."""
        self.steps, self.held_out = steps, held_out
        self.looks: list[Look] = []

    def add(self, look: Look, causes: Sequence[str] = ()) -> list[Advice]:
        """Takes the next look and returns the statements that it adds.

        causes: sentences that `not_read` appends, such as "The learning rate is 1e-7.".

        Raises ValueError if the look is not later than the last one, or if its shapes differ from the first one's.
        """
        self.looks.append(look)
        return []

    @property
    def is_plateau(self) -> bool:
        """True if `plateau` was said and no `plateau_over` after it."""
        return False

    def best(self) -> int | None:
        """The step of the earliest look whose benefit is not worse than the maximum's; None before the first look."""
        return max((look.step for look in self.looks), default=None)

    def candidates(self) -> list[int]:
        """Steps, ascending, whose checkpoints may still become the best. A step that is missing never comes back."""
        return [look.step for look in self.looks]

    def to_json(self) -> dict[str, Any]:
        """The looks so far as JSON values, in float32 precision."""
        return {"looks": []}

    @classmethod
    def from_json(cls, values: dict[str, Any], *, steps: int, held_out: bool, until: int | None = None) -> Advisor:
        """Builds the advisor from what `to_json` returned.

        until: looks after this step are discarded, because a run that resumes from it measures them again.
        """
        return cls(steps=steps, held_out=held_out)
