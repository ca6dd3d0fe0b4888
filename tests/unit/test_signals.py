"""When a run stops on a signal or a limit. The signals are real ones, sent to this process."""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta

import pytest

from t2i_adapter.errors import Stopped
from t2i_adapter.training.signals import HANDLED, Reason, Stopper

HOUR = timedelta(hours=1)
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0, signal.SIGHUP: 129}


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # the handler runs between two lines of Python


@pytest.mark.parametrize(("number", "code"), CODES.items())
def test_before_training_a_signal_ends_the_run_where_it_stands(number: signal.Signals, code: int):
    with pytest.raises(Stopped, match=f"stopped by {number.name}; nothing was trained") as stop, Stopper():
        send(number)
    assert stop.value.code == code


@pytest.mark.parametrize("number", HANDLED)
def test_in_training_it_waits_for_the_end_of_the_step(number: signal.Signals):
    with Stopper() as stopper:
        stopper.begin_training(HOUR)
        assert stopper.stop_reason(1) is None
        send(number)
        assert stopper.stop_reason(2) == number


def test_an_action_is_cut_short_by_a_signal():
    began = time.monotonic()
    with Stopper() as stopper:
        stopper.begin_training(HOUR)
        assert stopper.unless_stopped(lambda: "done") == "done"
        threading.Timer(0.05, send, (signal.SIGTERM,)).start()
        assert stopper.unless_stopped(lambda: time.sleep(30)) is None
        assert stopper.unless_stopped(lambda: pytest.fail("started although a signal had arrived")) is None
    assert time.monotonic() - began < 20


def test_after_the_run_signals_mean_what_they_meant_before():
    before = [signal.getsignal(number) for number in HANDLED]
    with Stopper():
        assert [signal.getsignal(number) for number in HANDLED] != before
    assert [signal.getsignal(number) for number in HANDLED] == before


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stopper() as stopper:
            stopper.begin_training(HOUR)
            send(signal.SIGHUP)
            assert stopper.stop_reason(1) is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_child_process_does_not_take_the_signal_for_its_own():
    with Stopper() as stopper:
        child = os.fork()
        if child == 0:
            send(signal.SIGTERM)
            os._exit(7 if stopper.stop_reason(1) is None else 8)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_time_and_a_step_are_reasons_too():
    with Stopper(max_time=0.05) as stopper:
        assert stopper.stop_reason(1) is None
        time.sleep(0.06)
        assert stopper.stop_reason(2) == Reason.TIME_IS_UP
    with Stopper(stop_after=3) as stopper:
        assert [stopper.stop_reason(step) for step in (2, 3, 4)] == [None, Reason.STEP_REACHED, None]
    assert Reason.TIME_IS_UP.exit_code == Reason.STEP_REACHED.exit_code == 0
