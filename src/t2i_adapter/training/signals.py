"""Stopping early: signals and a time limit, heard by one process and obeyed by all at the same step.

    SIGTERM             finish the step, save, exit 143
    SIGINT              the same, 130; a second one leaves at once
    SIGUSR1, max_time   the same, 0: the scheduler's limit is near, and the job will be started again

Before the training there is nothing to save, and a signal ends the run where it stands.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from t2i_adapter.errors import Stopped

T = TypeVar("T")

TIME_IS_UP, STEP_REACHED = int(signal.SIGALRM), int(signal.SIGHUP)
"""Reasons beside the signals' own numbers, named by the numbers of two that are not listened to."""
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0, TIME_IS_UP: 0, STEP_REACHED: 0}
"""Reason -> exit code."""
WORDS = {TIME_IS_UP: "--train.max_time is reached", STEP_REACHED: "the step it was to stop after is reached"}
ONE_KEYSTROKE = 1.0
"""Seconds within which interrupts are one: a terminal sends it to every process, and torchrun passes it on again."""


class _CutShort(BaseException):
    """Leaves what a signal makes idle."""


class Stopper:
    """A context in which the signals are heard. Use `training` once the steps begin, and `asked` after each."""

    def __init__(self, max_time: float | None = None, stop_after: int | None = None) -> None:
        """max_time: seconds from now. stop_after: a step after which to stop in any case."""
        self._deadline = None if max_time is None else time.monotonic() + max_time
        self._stop_after = stop_after
        self._heard, self._heard_at = 0, 0.0
        self._training = self._cut = False
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}
        self._group: Any = None
        self._question: tuple[Any, torch.Tensor] | None = None

    def __enter__(self) -> Stopper:
        if threading.current_thread() is threading.main_thread():  # Python allows no other to listen
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:  # after a fault the others may no longer answer
            self.end_training()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def begin_training(self, patience: timedelta) -> None:
        """From here on a signal waits for the step's end. Every process of the run must call it."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # On the hosts, whatever the gradients go over: no device waits for an answer.
            self._group = dist.new_group(backend="gloo", timeout=patience)
        self._training = True

    def end_training(self) -> None:
        """From here on a signal ends the run where it stands again."""
        if self._question is not None:
            self._answer()
        self._training = False

    def asked(self, step: int) -> int:
        """Why the run is to stop after this step, as all its processes agree; 0 for going on.

        With several processes each step asks, and reads the answer to the step before, which has come meanwhile: so
        nobody waits, and all stop one step after the first of them has heard.
        """
        if self._group is None:
            return self._wish(step)
        answer = self._answer() if self._question is not None else 0
        told = torch.tensor([self._wish(step)])
        self._question = dist.all_reduce(told, dist.ReduceOp.MAX, self._group, async_op=True), told
        return answer

    def unless_heard(self, action: Callable[[], T]) -> T | None:
        """What `action` gives, or None where a signal has been heard or is heard meanwhile: a scheduler that leaves a
        run half a minute would not wait for pictures to be drawn."""
        self._cut = True
        try:
            return None if self._heard else action()
        except _CutShort:
            return None
        finally:
            self._cut = False

    def _wish(self, step: int) -> int:
        if self._heard:
            return self._heard
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return TIME_IS_UP
        return STEP_REACHED if step == self._stop_after else 0

    def _answer(self) -> int:
        assert self._question is not None
        (work, told), self._question = self._question, None
        work.wait()
        return int(told.item())

    def _hear(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a loader's process, which the trainer ends
            return
        now = time.monotonic()
        if self._heard and number == signal.SIGINT and now - self._heard_at > ONE_KEYSTROKE:
            os.write(sys.stderr.fileno(), b"interrupted again: left at once\n")
            os._exit(130)
        if not self._heard:
            self._heard, self._heard_at = number, now
            if not self._training:
                raise Stopped(f"stopped by {reason(number)}; nothing was trained yet, and what is prepared is kept.",
                              CODES[number])  # fmt: skip
            if self._cut:
                raise _CutShort


def reason(number: int) -> str:
    """A reason in words."""
    return WORDS.get(number) or signal.Signals(number).name
