"""Stops a run early on a signal or a time limit, at the same step on every rank.

`train.stop_signals` names the signals. The run finishes the step, saves, and exits by `train.stop_code`, or else with

    128 + the number   SIGTERM, SIGINT and SIGHUP, as a shell reports them: somebody wants the run to end
    75                 the other signals and max_time: the scheduler's limit is near, and it starts the job again

75 is EX_TEMPFAIL of sysexits.h. It is not 0, because a Kubernetes Job, SkyPilot and Ray take 0 for a finished run, and
not one that a fault has. A second SIGINT exits at once, and `nohup` keeps SIGHUP ignored. Before training begins there
is nothing to save, and a signal ends the run at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from t2i_adapter.config.tree import TrainOptions
from t2i_adapter.errors import Stopped
from t2i_adapter.exits import discard_lost_output

T = TypeVar("T")


RETRY_CODE = 75
"""EX_TEMPFAIL: the same command, started again, resumes the run."""


class Reason(IntEnum):
    """Why a run stops. If ranks have different reasons, the largest number is the run's reason."""

    SIGHUP = int(signal.SIGHUP)
    SIGINT = int(signal.SIGINT)
    STEP_REACHED = 3
    PLATEAU = 4
    CALLED_OFF = 5
    SIGUSR1 = int(signal.SIGUSR1)
    SIGUSR2 = int(signal.SIGUSR2)
    TIME_IS_UP = 14
    SIGTERM = int(signal.SIGTERM)
    SIGXCPU = int(signal.SIGXCPU)

    def exit_code(self, stop_code: int | None = None) -> int:
        """The exit code. stop_code: `train.stop_code`, for all but what the calling program asked for, which is 0."""
        if self in (Reason.STEP_REACHED, Reason.PLATEAU, Reason.CALLED_OFF):
            return 0
        own = 128 + self if self in (Reason.SIGTERM, Reason.SIGINT, Reason.SIGHUP) else RETRY_CODE
        return int(own) if stop_code is None else stop_code

    @property
    def text(self) -> str:
        texts = {Reason.TIME_IS_UP: "--train.max_time is reached", Reason.STEP_REACHED: "stop_after is reached"}
        texts |= {Reason.PLATEAU: "no gain is left", Reason.CALLED_OFF: "a callback asked for it"}
        return texts.get(self, self.name)


ONE_KEYSTROKE = 1.0
"""Seconds within which SIGINT counts once: under torchrun a process receives Ctrl-C from terminal and launcher."""


class _ActionStopped(BaseException):
    """Leaves the action of `unless_stopped`."""


class Stopper:
    """A context that handles the signals. Call `begin_training` before the steps, and `stop_reason` after each."""

    def __init__(
        self,
        max_time: float | None = None,
        stop_after: int | None = None,
        signals: Sequence[str] = TrainOptions.stop_signals,
        stop_code: int | None = None,
    ) -> None:
        """max_time: seconds from now. stop_after: a step after which to stop in any case. signals: those that stop it,
        as in `train.stop_signals`. stop_code: `train.stop_code`."""
        self._numbers = [signal.Signals[f"SIG{name}"] for name in signals]
        self._stop_code = stop_code
        self._deadline = None if max_time is None else time.monotonic() + max_time
        self._stop_after = stop_after
        self._signal: Reason | None = None
        self._signal_time = 0.0
        self._request: Reason | None = None
        self._in_training = self._in_action = False
        self._pid = os.getpid()
        self._old_handlers: dict[int, Any] = {}
        self._group: Any = None
        self._exchange: tuple[Any, torch.Tensor] | None = None

    def __enter__(self) -> Stopper:
        if threading.current_thread() is threading.main_thread():  # Python allows signal handlers only there
            for number in self._numbers:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._old_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:  # after an exception other ranks may no longer answer
            self.end_training()
        self._exchange = self._group = None
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)

    def begin_training(self, group: Any = None) -> None:
        """From here on a signal waits for the end of the step. group: a gloo group of the run's ranks, which no other
        thread uses; None if there is one rank."""
        self._group = group
        self._in_training = True

    def end_training(self) -> None:
        """From here on a signal ends the run at once again."""
        if self._exchange is not None:
            self._receive()
        self._in_training = False

    def stop_reason(self, step: int) -> Reason | None:
        """Why the run stops after this step, equal on every rank; None to continue.

        Several ranks exchange their reasons asynchronously: each step starts an exchange and reads the one of the step
        before. So no rank waits, and all stop one step after the first of them has a reason.
        """
        own = self._own_reason(step)
        if self._group is None:
            return own
        reason = self._receive() if self._exchange is not None else None
        number = torch.tensor([own or 0])
        self._exchange = dist.all_reduce(number, dist.ReduceOp.MAX, self._group, async_op=True), number
        return reason

    def request(self, reason: Reason) -> None:
        """Asks the run to stop for `reason` when no signal or limit stops it; one rank is enough."""
        self._request = reason

    def exit_code(self, reason: Reason) -> int:
        """The exit code of a run that stops for `reason`."""
        return reason.exit_code(self._stop_code)

    def unless_stopped(self, action: Callable[[], T]) -> T | None:
        """Runs `action` and returns its result; returns None if a signal arrives before or during it.

        A scheduler that sends a signal half a minute before it kills the job leaves no time to generate pictures.
        """
        self._in_action = True
        try:
            return None if self._signal else action()
        except _ActionStopped:
            return None
        finally:
            self._in_action = False

    def _own_reason(self, step: int) -> Reason | None:
        if self._signal:
            return self._signal
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return Reason.TIME_IS_UP
        return Reason.STEP_REACHED if step == self._stop_after else self._request

    def _receive(self) -> Reason | None:
        assert self._exchange is not None
        (work, number), self._exchange = self._exchange, None
        work.wait()
        return Reason(int(number.item())) if number.item() else None

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a loader worker, which the trainer ends
            return
        now = time.monotonic()
        if self._signal and number == signal.SIGINT and now - self._signal_time > ONE_KEYSTROKE:
            os.write(sys.stderr.fileno(), b"interrupted again: exits at once\n")
            os._exit(130)
        if not self._signal:
            self._signal, self._signal_time = Reason(number), now
            discard_lost_output()
            if not self._in_training:
                text = f"stopped by {self._signal.text}; nothing was trained yet, and the cache keeps what was encoded."
                raise Stopped(text, self.exit_code(self._signal))
            if self._in_action:
                raise _ActionStopped
