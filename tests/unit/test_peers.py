"""The processes of a run among each other: shared decisions, errors of one, and a lost one. They are real, by fork."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from support.processes import Forked, ranks, until

from t2i_adapter.errors import UserError
from t2i_adapter.training.peers import Peers, is_loss

WORLD = 2


pytestmark = pytest.mark.usefixtures("nothing_is_left_running")


def start(folder: Path, member: Callable[[int], None]) -> list[Forked]:
    """Both processes of a run, which call `member` with their rank."""

    def action(env: dict[str, str], rank: int) -> None:
        os.environ.update(env)
        member(rank)

    return [Forked(folder, partial(action, env, rank)) for rank, env in enumerate(ranks(WORLD))]


def run_in_both(folder: Path, action: Callable[[Peers, int], object], patience: float = 60) -> list[Any]:
    """What `action` returns, or the UserError's text, in each of two processes."""
    results = [folder / f"{rank}.json" for rank in range(WORLD)]

    def member(rank: int) -> None:
        peers = Peers(Accelerator(cpu=True), timedelta(seconds=patience))
        try:
            with peers.naming_losses(), peers:
                result = action(peers, rank)
        except UserError as fault:
            result = f"error: {fault}"
        results[rank].write_text(json.dumps(result))

    for process in start(folder, member):
        assert process.wait(60) == 0, process.said()
    return [json.loads(result.read_text()) if result.is_file() else None for result in results]


def test_the_main_process_decides(tmp_path: Path):
    found = run_in_both(tmp_path, lambda peers, rank: peers.from_main(lambda: [f"made by {rank}", None]))
    assert found == [["made by 0", None]] * 2


def test_work_that_takes_longer_on_one_process_than_the_patience_is_no_loss(tmp_path: Path):
    def work(peers: Peers, rank: int) -> list[int]:
        def slow() -> int:
            time.sleep(5 if rank else 0)
            return rank

        return [peers.all_work(slow), *peers.gather(rank)]

    assert run_in_both(tmp_path, work, patience=2) == [[0, 0, 1], [1, 0, 1]]


def test_an_error_while_all_work_ends_the_others(tmp_path: Path):
    def fail(peers: Peers, rank: int) -> None:
        def work() -> None:
            if rank:
                raise UserError("no room here")

        peers.all_work(work)

    first, second = run_in_both(tmp_path, fail)
    assert second == "error: no room here"
    assert first.startswith("error: process 1 on ") and "fails" in first


def test_an_error_of_one_is_an_error_of_all(tmp_path: Path):
    def fail_in_second(peers: Peers, rank: int) -> str:
        def action() -> str:
            if rank == 1:
                raise UserError("no room here")
            return "fine"

        return peers.together(action)

    first, second = run_in_both(tmp_path, fail_in_second)
    assert second == "error: no room here"
    assert first.startswith("error: process 1 on ") and first.endswith(" fails: no room here")


def test_an_error_of_the_main_process_ends_the_others(tmp_path: Path):
    def fail(peers: Peers, rank: int) -> None:
        def work() -> None:
            raise UserError("full")

        peers.main_works(work)

    first, second = run_in_both(tmp_path, fail)
    assert first == "error: full"
    assert second.startswith("error: process 0 on ") and second.endswith("its own message says why.")


def test_what_differs_is_named_with_both_values(tmp_path: Path):
    def compare(peers: Peers, rank: int) -> None:
        peers.compare({"alike": "x"}, "Never said.")
        peers.compare({"optim.lr": str(rank), "zebras": "1"}, "Make them equal.")

    for said in run_in_both(tmp_path, compare):
        assert said.startswith("error: --optim.lr is not the same on all processes: process 0 on ")
        assert said.endswith(" 1. Make them equal.")


def test_the_others_wait_longer_than_their_patience_for_a_main_process_that_works(tmp_path: Path):
    def work(peers: Peers, rank: int) -> object:
        return [peers.main_works(lambda: time.sleep(5) or "slept"), peers.from_main(lambda: "next")]

    assert run_in_both(tmp_path, work, patience=2) == [["slept", "next"], [None, "next"]]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "silent"])
def test_the_others_notice_a_main_process_that_is_lost(tmp_path: Path, number: signal.Signals):
    """A process that is stopped answers nothing and closes nothing, as one behind a cut network."""
    result, began = tmp_path / "said", tmp_path / "began"

    def member(rank: int) -> None:
        peers = Peers(Accelerator(cpu=True), timedelta(seconds=3))
        try:
            with peers.naming_losses():
                peers.main_works(lambda: began.touch() or time.sleep(60))
        except UserError as fault:
            result.write_text(f"{fault.kind}: {fault}")
            os._exit(3)

    main, other = start(tmp_path, member)
    until(began.exists, 60)
    main.send(number)
    asked = time.monotonic()
    assert other.wait(60) == 3, other.said()
    assert time.monotonic() - asked < 20
    assert result.read_text().startswith("process_ended: process 1 of 2 on ")
    assert "lost its connection to process 0 on " in result.read_text()


def test_another_runtime_error_is_no_loss():
    assert is_loss(RuntimeError("[x/gloo/transport/tcp/pair.cc:525] Read error: Connection reset by peer"))
    assert is_loss(RuntimeError("Application timeout caused pair closure"))
    assert not is_loss(RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"))
    assert not is_loss(ValueError("Connection reset by peer"))
