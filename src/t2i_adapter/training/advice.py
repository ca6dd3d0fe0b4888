"""What measurements of control say about a run: is the condition read, is gain left, does the adapter overfit, which
checkpoint is the best.

A look is one measurement at fixed pairs and fixed noise. The `Advisor` receives the looks of a run in their order and
returns statements. Each kind of statement is wrong with probability ALPHA at most over all looks of a run.
docs/control.md gives the reasons for the rules, benchmarks/stop_rule.py simulates them.

Letters: N pairs that the looks measure, M pairs of the training, T noise bands, P generated pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from t2i_adapter.statistics import (
    ALPHA,
    Interval,
    difference_lower_bound,
    look_alpha,
    lower_bound,
    mean_interval,
    upper_bound,
)

LEAST_USE = 0.01
"""Use below which the condition counts as not read, as a share of the loss without the adapter."""
MARGIN = 0.02
"""Gain of a window below which no gain is left, and loss above which an adapter may overfit, as shares of the loss that
is left."""
WINDOW_SHARE = 0.2
"""Length of a window of `plateau`, as a share of the updates so far."""
WINDOW_LOOKS = 3
"""Looks that a window has at least."""
LEAST_HARM = 0.01
"""Loss above that without the adapter, as a share of it, from which on the condition does harm."""
LEAST_PAIRS = 16
"""Pairs below which neither `plateau` nor a harm is said: if a quarter of the pairs has all of the gain, eight pairs
have none of it in a tenth of the runs."""
SKEW = 4
"""Divides the error of `not_read`, `plateau` and `harm`: Student's bound of skewed values misses more often than it
should."""
KEPT = 4
"""Checkpoints that wait for the choice of the best one, at most."""
USUAL_CAUSES = (
    "Usual causes: a learning rate that is too low, conditions that belong to other pictures, conditions of the wrong"
    " polarity, captions that leave nothing for the condition."
)


@dataclass(frozen=True)
class Look:
    """One measurement of losses and scores, at pairs and noise that are the same in all looks of a run."""

    step: int
    """Updates made so far."""
    right: np.ndarray
    """(N,T) loss of each pair in each noise band, with the pair's own condition."""
    other: np.ndarray | None
    """(N,T) loss with the condition of another pair; None if this look did not measure it."""
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
    """`read`, `not_read`, `plateau`, `plateau_over` (gain came back), `harm` or `overfitting`."""
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
    assert look.other is not None
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


def remaining(look: Look) -> np.ndarray:
    """(N,) loss that is left: L(right) in units of the band's mean L(none), mean over the bands. Its mean is 1 - B."""
    return (look.right / look.none.mean(0)).mean(1)


class Advisor:
    """Makes statements from the looks of a run. Its state is a function of the looks and of the planned updates: an
    advisor that receives the same looks again makes the same statements."""

    def __init__(self, *, steps: int, held_out: bool) -> None:
        """steps: updates that the run plans. held_out: False if the N pairs are pairs of the training."""
        self.steps, self.held_out = steps, held_out
        self.looks: list[Look] = []
        """The looks so far, in float32 precision, without those that have a NaN or inf loss."""
        self._remaining: list[np.ndarray] = []  # (N,) of each look
        self._means: list[float] = []  # of `_remaining`
        self._said: dict[str, int] = {}  # statement -> its step
        self._tests: dict[str, int] = {}  # statement -> how often it was tested
        self._plateau: np.ndarray | None = None  # (N,) remaining loss of the window that showed a plateau
        self._kept: list[int] = []  # positions in `looks` that may still become the best, ascending

    def add(self, look: Look, find_causes: Callable[[], Sequence[str]] | None = None) -> list[Advice]:
        """Takes the next look and returns the statements that it adds. A look with a NaN or inf loss is discarded.

        find_causes: returns the sentences that `not_read` appends; without any, it appends the usual causes. It is
        called only if `not_read` is said.

        Raises ValueError if the look is not later than the last one, or if its shapes differ from the last one's.
        """
        look = _as_float32(look)
        if self.looks:
            last = self.looks[-1]
            if look.step <= last.step:
                raise ValueError(f"a look at step {look.step} after one at step {last.step}")
            if look.right.shape != last.right.shape:
                raise ValueError(f"a look of shape {look.right.shape} after one of {last.right.shape}")
        measured = (losses for losses in (look.right, look.other, look.none) if losses is not None)
        if not all(np.isfinite(losses).all() for losses in measured):
            return []
        self.looks.append(look)
        self._remaining.append(remaining(look))
        self._means.append(float(self._remaining[-1].mean()))
        self._keep()
        found = [self._read(), self._not_read(find_causes), self._harm(find_causes), self._plateau_over()]
        found += [self._no_gain(), self._overfitting()]
        return [advice for advice in found if advice is not None]

    @property
    def is_read(self) -> bool:
        """True if `read` was said."""
        return "read" in self._said

    @property
    def is_plateau(self) -> bool:
        """True if `plateau` was said and no `plateau_over` after it."""
        return self._plateau is not None

    def best(self) -> int | None:
        """The step of the earliest look whose benefit is not worse than the maximum's; None before the first look.

        A look is worse if the interval of its paired difference to the maximum, with error ALPHA, lies below 0. A look
        that was worse once stays out.
        """
        return self.looks[self._kept[0]].step if self._kept else None

    def candidates(self) -> list[int]:
        """Up to KEPT steps, ascending, whose checkpoints may still become the best. A step that is missing never comes
        back, so its checkpoint can be deleted."""
        return [self.looks[position].step for position in self._kept]

    def describe_best(self) -> str | None:
        """One line about the best checkpoint for people, or None before the first look."""
        if not self._kept:
            return None
        chosen, top = self.looks[self._kept[0]], self.looks[self._top()]
        of_top = "the maximum" if chosen is top else f"not worse than the maximum, which is at step {top.step}"
        return (
            f"The best checkpoint is step {chosen.step}: its benefit is {_percent(mean_interval(benefit(chosen)))}, "
            f"{of_top}. The same {self._pairs()} chose it, so measure it again on fresh pairs and seeds."
        )

    def to_json(self) -> dict[str, Any]:
        """The looks so far as JSON values, in float32 precision."""
        looks = [
            {
                "step": look.step,
                "right": _to_lists(look.right),
                "other": _to_lists(look.other),
                "training": _to_lists(look.training),
                "score": _to_lists(look.score),
                "score_ceiling": look.score_ceiling,
            }
            for look in self.looks
        ]
        return {"none": _to_lists(self.looks[-1].none) if self.looks else None, "looks": looks}

    @classmethod
    def from_json(cls, values: dict[str, Any], *, steps: int, held_out: bool, until: int | None = None) -> Advisor:
        """Builds the advisor from what `to_json` returned.

        until: looks after this step are discarded, because a run that resumes from it measures them again.
        """
        advisor = cls(steps=steps, held_out=held_out)
        for stored in values["looks"]:
            if until is None or stored["step"] <= until:
                arrays = {name: _to_array(stored[name]) for name in ("right", "other", "training", "score")}
                none = _to_array(values["none"])
                advisor.add(Look(stored["step"], none=none, score_ceiling=stored["score_ceiling"], **arrays))
        return advisor

    def _read(self) -> Advice | None:
        """The first look whose lower bound of the use is above 0. Half of the look's error goes to the mean over the
        bands, half is shared by the bands: an adapter that reads in one band only is seen in that band."""
        if self.is_read or self.looks[-1].other is None:
            return None
        error, by_band = self._spend("read"), use_by_band(self.looks[-1])
        pooled, bands = by_band.mean(1), by_band.shape[1]
        is_used = _is_above(pooled, error / 2)
        used = [band for band in range(bands) if _is_above(by_band[:, band], error / 2 / bands)]
        if not is_used and not used:
            return None
        interval = mean_interval(pooled)
        text = (
            f"The adapter reads the condition: on {self._pairs()} the loss with the right condition is lower than with"
            f" another pair's by {_percent(interval)} of the loss without the adapter."
        )
        if not is_used:
            strongest = max(used, key=lambda band: by_band[:, band].mean())
            shown = _percent(mean_interval(by_band[:, strongest]))
            text += f" This is certain in noise band {strongest + 1} of {bands} alone: {shown}."
        return self._say("read", text, use=interval)

    def _not_read(self, find_causes: Callable[[], Sequence[str]] | None) -> Advice | None:
        """After enough updates, the upper bound of the use is below LEAST_USE; or a use is not proven, and the
        condition does harm (`_does_harm`). Half of the look's error goes to each."""
        is_said = self.is_read or "not_read" in self._said
        if is_said or self._is_early or self.looks[-1].other is None:
            return None
        error, values, gained = self._spend("not_read") / 2 / SKEW, use(self.looks[-1]), benefit(self.looks[-1])
        interval, helped = mean_interval(values), mean_interval(gained)
        if upper_bound(values, error) >= LEAST_USE and not _does_harm(gained, error):
            return None
        found = find_causes() if find_causes else []
        causes = " ".join(found) or USUAL_CAUSES
        text = (
            f"The adapter does not read the condition after {self._step:,} updates: on {self._pairs()} the loss with"
            f" the right condition is lower than with another pair's by {_percent(interval)} of the loss without the"
            f" adapter{self._harm_words(helped)}. {causes}"
        )
        return self._say("not_read", text, use=interval, benefit=helped)

    def _harm_words(self, helped: Interval) -> str:
        if helped.high >= 0:
            return ""
        return f", and higher than without the adapter by {_percent(Interval(-helped.mean, -helped.high, -helped.low))}"

    def _harm(self, find_causes: Callable[[], Sequence[str]] | None) -> Advice | None:
        """The adapter reads the condition and lowers the loss of pairs of the training, and it does harm on held-out
        pairs: their conditions are made in another way. Each bound has half the error."""
        look = self.looks[-1]
        seen = training_benefit(look)
        if "harm" in self._said or self._is_early or not self.held_out or seen is None or not self.is_read:
            return None
        error, gained = self._spend("harm") / 2 / SKEW, benefit(look)
        if not _does_harm(gained, error) or lower_bound(seen, error) <= 0:
            return None
        helped, learnt = mean_interval(gained), mean_interval(seen)
        causes = " ".join(find_causes() if find_causes else [])
        text = (
            f"The adapter does harm on {self._pairs()}: their loss is higher with the right condition than without the"
            f" adapter by {_percent(Interval(-helped.mean, -helped.high, -helped.low))}, and that of {len(seen)} pairs"
            f" of the training is lower by {_percent(learnt)}. Conditions of another kind or polarity do this."
        )
        return self._say("harm", f"{text} {causes}".rstrip(), benefit=helped, training=learnt)

    @property
    def _is_early(self) -> bool:
        """Whether it is too early to say that something is absent."""
        return self._step < self.least_updates or len(self.looks) < WINDOW_LOOKS

    @property
    def least_updates(self) -> int:
        """Updates before which `not_read` is not said: a tenth of the run, 200 at least and 5,000 at most; in a run of
        less than 400 updates, half of it."""
        return min(max(self.steps // 10, min(200, self.steps // 2)), 5000)

    def _no_gain(self) -> Advice | None:
        """The gain from a window of looks to the next is below MARGIN of what was left: the lower bound of the pairs'
        remaining loss in the last window, minus 1 - MARGIN times that of the window before it, is above 0."""
        windows = self._windows()
        has_few_pairs = len(self.looks[-1].right) < LEAST_PAIRS
        if not self.is_read or self.is_plateau or windows is None or has_few_pairs:
            return None
        earlier, last = (np.mean([self._remaining[i] for i in window], axis=0) for window in windows)
        is_flat = lower_bound(last - (1 - MARGIN) * earlier, self._spend("plateau") / SKEW) > 0
        if not is_flat or self._score_rises(self.looks[windows[0][-1]].step):
            return None
        self._plateau = last
        ratio = last.mean() / earlier.mean()
        gain = mean_interval(1 - ratio - (last - ratio * earlier) / earlier.mean())
        updates = self._step - self.looks[windows[0][-1]].step
        now = mean_interval(benefit(self.looks[-1]))
        text = (
            f"No gain is left: in the last {updates:,} updates ({len(windows[1])} looks) the loss of {self._pairs()}"
            f" fell by {_percent(gain)} of what was left, less than {100 * MARGIN:.0f} %. The adapter removes"
            f" {_percent(now)} of the loss without it."
        )
        return self._say("plateau", text, gain=gain, benefit=now)

    def _windows(self) -> tuple[range, range] | None:
        """Positions of the looks in the window before the last one and in the last one, equally many; None if the run
        is too young. The last window is WINDOW_SHARE of the updates long and has WINDOW_LOOKS looks at least."""
        count, begin = len(self.looks), self._step * (1 - WINDOW_SHARE)
        length = max(WINDOW_LOOKS, sum(look.step > begin for look in self.looks))
        return None if 2 * length > count else (range(count - 2 * length, count - length), range(count - length, count))

    def _score_rises(self, since: int) -> bool:
        """Whether the score of the generated pictures is significantly higher than at step `since` or before, and
        still below that of the target pictures."""
        scored = [look for look in self.looks if look.score is not None]
        before = [look for look in scored if look.step <= since]
        if not before or scored[-1] is before[-1]:
            return False
        now, then, ceiling = scored[-1].score, before[-1].score, scored[-1].score_ceiling
        assert now is not None and then is not None
        is_below = ceiling is None or float(now.mean()) < ceiling
        return is_below and now.shape == then.shape and lower_bound(now - then, ALPHA) > 0

    def _plateau_over(self) -> Advice | None:
        """After `plateau`, the loss falls below that of its window by more than MARGIN."""
        if self._plateau is None:
            return None
        now, level = self._remaining[-1], self._plateau
        if lower_bound((1 - MARGIN) * level - now, self._spend("plateau_over")) <= 0:
            return None
        self._plateau = None
        gain = mean_interval((level - now) / level.mean())
        text = (
            f"Gain came back: the loss of {self._pairs()} is lower than at the plateau by {_percent(gain)} of what was"
            " left."
        )
        return self._say("plateau_over", text, gain=gain)

    def _overfitting(self) -> Advice | None:
        """The loss of held-out pairs is MARGIN or more above that of their best look, and it rose by more than the loss
        of pairs of the training. The data choose the best of n earlier looks, so the error is divided by n."""
        position = len(self.looks) - 1
        earlier = [i for i in range(position) if self.looks[i].training is not None]
        is_measured = self.held_out and self.looks[-1].training is not None
        if not self.is_read or "overfitting" in self._said or not is_measured or not earlier:
            return None
        error = self._spend("overfitting") / len(earlier)
        best = min(earlier, key=self._means.__getitem__)
        loss = self._remaining[position] - self._remaining[best]
        seen = _remaining_in_training(self.looks[position]) - _remaining_in_training(self.looks[best])
        is_small = float(loss.mean()) < MARGIN * self._means[best]
        if is_small or lower_bound(loss, error) <= 0 or difference_lower_bound(loss, seen, error) <= 0:
            return None
        of_held_out, of_training = mean_interval(loss), mean_interval(seen)
        change = "rose" if of_training.mean > 0 else "fell"
        text = (
            f"The adapter overfits: since step {self.looks[best].step} the loss of {self._pairs()} rose by"
            f" {_percent(of_held_out)} of the loss without the adapter, and that of {len(seen)} pairs of the training"
            f" {change} by {100 * abs(of_training.mean):.1f} %."
        )
        return self._say("overfitting", text, held_out=of_held_out, training=of_training)

    def _keep(self) -> None:
        """Updates `_kept` with the newest look: drops looks that are worse than the maximum, then the closest ones."""
        position, top = len(self.looks) - 1, self._top()
        compared = self._kept if position == top else [position]
        worse = {i for i in compared if lower_bound(self._remaining[i] - self._remaining[top], ALPHA / 2) > 0}
        self._kept = [i for i in (*self._kept, position) if i not in worse]
        while len(self._kept) > KEPT:
            steps = [self.looks[i].step for i in self._kept]
            inner = [k for k in range(1, len(steps) - 1) if self._kept[k] != top]
            del self._kept[min(inner, key=lambda k: steps[k + 1] - steps[k - 1])]

    def _top(self) -> int:
        """Position of the look with the highest benefit."""
        return int(np.argmin(self._means))

    @property
    def _step(self) -> int:
        return self.looks[-1].step

    def _pairs(self) -> str:
        count = len(self.looks[-1].right)
        return f"{count} held-out pairs" if self.held_out else f"{count} pairs of the training"

    def _spend(self, kind: str) -> float:
        """The error probability of the next test of a statement."""
        self._tests[kind] = self._tests.get(kind, 0) + 1
        return look_alpha(self._tests[kind])

    def _say(self, kind: str, text: str, **intervals: Interval) -> Advice:
        self._said[kind] = self._step
        numbers = {
            f"{name}{end}": value
            for name, interval in intervals.items()
            for end, value in (("", interval.mean), ("_low", interval.low), ("_high", interval.high))
        }
        return Advice(kind, self._step, text, {"pairs": len(self.looks[-1].right), **numbers})


def _is_above(values: np.ndarray, error: float) -> bool:
    """Whether the mean is above 0 for certain, and large enough to be called a use."""
    return float(values.mean()) >= LEAST_USE and lower_bound(values, error) > 0


def _does_harm(gained: np.ndarray, error: float) -> bool:
    """Whether the mean benefit (N,) is below -LEAST_HARM for certain."""
    return len(gained) >= LEAST_PAIRS and upper_bound(gained, error) < -LEAST_HARM


def _remaining_in_training(look: Look) -> np.ndarray:
    """(M,) as `remaining`, of the pairs of the training."""
    assert look.training is not None
    return (look.training[:, 0] / look.training[:, 1].mean(0)).mean(1)


def _as_float32(look: Look) -> Look:
    """The look as it is read from JSON; a training loss or score with NaN or inf is missing."""
    arrays = {name: _to_array(getattr(look, name)) for name in ("right", "other", "none", "training", "score")}
    for name in ("training", "score"):
        if arrays[name] is not None and not np.isfinite(arrays[name]).all():
            arrays[name] = None
    return replace(look, **arrays)


def _to_array(values: Any) -> Any:
    """float64 array of float32 precision, or None."""
    return None if values is None else np.asarray(values, np.float32).astype(np.float64)


def _to_lists(values: np.ndarray | None) -> Any:
    """Nested lists of the shortest decimals that float32 reads back exactly, or None."""
    if values is None:
        return None
    return values.astype(np.float32).astype(str).astype(np.float64).tolist()


def _percent(interval: Interval) -> str:
    """For example "4.1 % (3.0 to 5.2 %)"."""
    mean, low, high = (100 * value for value in (interval.mean, interval.low, interval.high))
    return f"{mean:.1f} % ({low:.1f} to {high:.1f} %)"
