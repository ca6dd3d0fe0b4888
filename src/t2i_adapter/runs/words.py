"""A run in words: its state, whether its condition is read, numbers with their intervals. For pages and terminals."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal

from t2i_adapter.files import show_seconds
from t2i_adapter.runs.metrics import Note
from t2i_adapter.runs.read import Run
from t2i_adapter.statistics import Interval

ADVICE = {
    "read": "the condition is read",
    "not_read": "the condition is not read",
    "plateau": "no gain left",
    "plateau_over": "gain came back",
    "overfitting": "overfitting",
    "harm": "it does harm",
}
"""Kind of advice -> its short form."""


@dataclass(frozen=True)
class Verdict:
    """What a run's page says at its top. look: the CSS class; sentence: state and control; more: further sentences."""

    look: Literal["good", "bad", "warn", "open"]
    sentence: str
    more: tuple[str, ...]


def verdict(run: Run) -> Verdict:
    """The state of the run and what its advice says about control."""
    control, look = _control(run)
    if run.state == "failed":
        look = "bad"
    elif run.state in ("killed", "unfinished") and look == "good":
        look = "warn"
    more = [_benefit(run), _score(run), reason(run)]
    return Verdict(look, f"{state(run)}: {control}.", tuple(filter(None, more)))


def state(run: Run) -> str:
    """The run's state and its step: "Running, step 1,200 of 5,000"."""
    at = f"step {run.step:,}" + (f" of {run.steps:,}" if run.steps and run.steps != run.step else "")
    if run.state == "running":
        if not run.step and not run.metrics.last_look:
            return "Running, before its first update"
        left = run.seconds_left
        return f"Running, {at}" + (f", about {show_seconds(left)} left" if left is not None else "")
    if run.state == "finished":
        of = f" of {run.steps:,}" if run.steps and run.step < run.steps else ""
        return f"Finished after {run.step:,}{of} updates" if run.step else "Finished"
    if run.state == "adapter":
        return f"An adapter of {run.step:,} updates" if run.step else "An adapter"
    words = {"stopped": "Stopped", "failed": "Failed", "killed": "Killed", "unfinished": "Unfinished"}
    return f"{words[run.state]} at {at}"


def reason(run: Run) -> str:
    """Why the run is not going on, and the command that resumes it; "" while it runs and at its end."""
    if run.state == "killed":
        text = "Its process has ended without writing why, as after a kill, a power cut or too little memory."
    elif run.state in ("stopped", "failed"):
        text = run.reason
    else:
        return ""
    return text if not text or text.endswith(".") else f"{text}."


def _control(run: Run) -> tuple[str, Literal["good", "bad", "warn", "open"]]:
    advice = run.metrics.advice
    read, not_read = first(advice, "read"), last(advice, "not_read")
    if read:
        later = [(plateau(advice), "no gain is left since step {:,}")]
        later += [(first(advice, "overfitting"), "it overfits since step {:,}")]
        later += [(first(advice, "harm"), "it does harm on held-out pairs since step {:,}")]
        parts = [words.format(note.step) for note, words in later if note]
        look = "bad" if first(advice, "harm") else "warn" if first(advice, "overfitting") else "good"
        return "; ".join([f"the condition is read since step {read.step:,}", *parts]), look
    if not_read:
        return f"the condition is not read after {not_read.step:,} updates", "bad"
    if run.metrics.looks:
        count = len(run.metrics.looks)
        return f"not yet decided, after {count} look{'s' * (count > 1)}, whether the condition is read", "open"
    if run.state == "running":
        return "control was not measured yet", "open"
    return "control was not measured", "open"


def first(notes: list[Note], kind: str) -> Note | None:
    """The first note of a kind."""
    return next((note for note in notes if note.kind == kind), None)


def plateau(notes: list[Note]) -> Note | None:
    """The note that no gain is left; None without one, or if gain came back after it."""
    over = last(notes, "plateau_over")
    return first([note for note in notes if over is None or note.step > over.step], "plateau")


def last(notes: list[Note], kind: str) -> Note | None:
    """The last note of a kind."""
    return first(notes[::-1], kind)


def _benefit(run: Run) -> str:
    look = run.metrics.last_look
    if not look or not look.benefit:
        return ""
    pairs = f"{look.pairs} {look.on} pairs" if look.pairs else f"{look.on} pairs"
    b = look.benefit
    if b.low <= 0 <= b.high:
        return f"At step {look.step:,} the condition is not shown to change the loss on {pairs}: benefit {percent(b)}."
    change = "lowers" if b.mean >= 0 else "raises"
    size = b if b.mean >= 0 else Interval(-b.mean, -b.high, -b.low)
    return f"At step {look.step:,} the condition {change} the loss on {pairs} by {percent(size)}."


def _score(run: Run) -> str:
    score = run.metrics.last_score
    if not score:
        return ""
    floor = score.columns.get("other_condition")
    other = f"; with another pair's condition they have {value(floor)}" if floor else ""
    return f"The pictures of step {score.step:,} have {score.metric} {value(score.columns['adapter'])}{other}."


def last_score(run: Run, digits: int = 3) -> str:
    """The adapter's last score, or that of the last validation pictures, which has no interval; "" without one."""
    score, control = run.metrics.last_score, run.metrics.numbers("control", last=1)
    if score:
        return value(score.columns["adapter"], digits)
    return f"{control[0][1]:.{digits}f}" if control else ""


def percent(found: Interval | None) -> str:
    """An interval of shares: "34 % (31 to 37 %)"."""
    if found is None:
        return ""
    return f"{_share(found.mean)} %" + _bounds(found, _share, " %")


def value(found: Interval | None, digits: int = 3) -> str:
    """An interval of other numbers: "0.620 (0.580 to 0.660)"."""
    if found is None:
        return ""
    return f"{found.mean:.{digits}f}" + _bounds(found, lambda bound: f"{bound:.{digits}f}", "")


def _share(share: float) -> str:
    """A share in percent, with a decimal if it is small."""
    text = f"{100 * share:.0f}" if abs(share) >= 0.0995 else f"{100 * share:.1f}"
    return text.removeprefix("-") if float(text) == 0 else text


def _bounds(found: Interval, show: object, unit: str) -> str:
    assert callable(show)
    if not math.isfinite(found.low) or not math.isfinite(found.high):
        return ""
    return f" ({show(found.low)} to {show(found.high)}{unit})"


def moment(at: float | None) -> str:
    """A time of this machine's clock: "2026-11-29 13:40"; "" for None."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(at)) if at is not None else ""
    except (OverflowError, ValueError, OSError):
        return ""
