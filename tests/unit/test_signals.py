"""When a run stops on a signal or a limit. The signals are real ones, sent to this process."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from t2i_adapter.config.tree import TrainOptions
from t2i_adapter.errors import Stopped, UserError
from t2i_adapter.training.signals import RETRY_CODE, Reason, Stopper

CODES = {
    signal.SIGTERM: 143,
    signal.SIGINT: 130,
    signal.SIGHUP: 129,
    signal.SIGUSR1: RETRY_CODE,
    signal.SIGUSR2: RETRY_CODE,
}


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # the handler runs between two lines of Python


@pytest.mark.parametrize(("number", "code"), CODES.items())
def test_before_training_a_signal_ends_the_run_where_it_stands(number: signal.Signals, code: int):
    with pytest.raises(Stopped, match=f"stopped by {number.name}; nothing was trained") as stop, Stopper():
        send(number)
    assert stop.value.code == code


@pytest.mark.parametrize("number", CODES)
def test_in_training_it_waits_for_the_end_of_the_step(number: signal.Signals):
    with Stopper() as stopper:
        stopper.begin_training()
        assert stopper.stop_reason(1) is None
        send(number)
        assert stopper.stop_reason(2) == number


def test_an_action_is_cut_short_by_a_signal():
    began = time.monotonic()
    with Stopper() as stopper:
        stopper.begin_training()
        assert stopper.unless_stopped(lambda: "done") == "done"
        threading.Timer(0.05, send, (signal.SIGTERM,)).start()
        assert stopper.unless_stopped(lambda: time.sleep(30)) is None
        assert stopper.unless_stopped(lambda: pytest.fail("started although a signal had arrived")) is None
    assert time.monotonic() - began < 20


def test_after_the_run_signals_mean_what_they_meant_before():
    before = [signal.getsignal(number) for number in CODES]
    with Stopper():
        assert [signal.getsignal(number) for number in CODES] != before
    assert [signal.getsignal(number) for number in CODES] == before


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stopper() as stopper:
            stopper.begin_training()
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


def test_only_the_signals_that_are_named_stop_a_run():
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        with Stopper(signals=["USR1", "XCPU"]) as stopper:
            stopper.begin_training()
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
            send(signal.SIGUSR2)
            assert stopper.stop_reason(1) is None
            send(signal.SIGXCPU)
            assert stopper.stop_reason(2) == Reason.SIGXCPU
        assert signal.getsignal(signal.SIGXCPU) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_an_unfinished_run_has_a_code_of_its_own_and_an_option_changes_it():
    assert RETRY_CODE not in (0, 1, 2, *range(128, 160))
    assert Stopper().exit_code(Reason.TIME_IS_UP) == Reason.SIGXCPU.exit_code() == RETRY_CODE
    for reason in (Reason.SIGTERM, Reason.SIGINT, Reason.SIGUSR1, Reason.TIME_IS_UP):
        assert Stopper(stop_code=9).exit_code(reason) == 9
    for reason in (Reason.STEP_REACHED, Reason.CALLED_OFF):  # the calling program stopped it
        assert Stopper(stop_code=9).exit_code(reason) == 0


@pytest.mark.parametrize(("name", "value"), [("stop_code", 256), ("stop_code", -1), ("patience", "soon")])
def test_a_wrong_option_is_refused(name: str, value: object):
    with pytest.raises(UserError, match=f"train.{name} .*{value}"):
        TrainOptions(**{name: value})  # pyright: ignore[reportArgumentType]
