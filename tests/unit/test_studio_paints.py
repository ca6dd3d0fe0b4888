"""Requests for pictures: the process that serves them may be killed, cancelled or ended for a run at any time."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from t2i_adapter.errors import UserError
from t2i_adapter.studio.faults import NotFoundError
from t2i_adapter.studio.files import REQUEST, RESULT
from t2i_adapter.studio.hub import Hub
from t2i_adapter.studio.paints import MOST_WAITING, Paints, upload_file
from t2i_adapter.studio.places import Places

BAD = {"values": {"adapter": ["a"], "prompt": ["x"], "image": ["a.png"], "steps": 0}}
"""A request that is refused before torch is loaded."""


@pytest.fixture
def paints(tmp_path: Path) -> Iterator[Paints]:
    found = Paints(Places(tmp_path, "runs"), Hub())
    yield found
    found.end()


def until(paints: Paints, name: str, seconds: float = 60) -> dict[str, Any]:
    """The result of a request."""
    deadline = time.monotonic() + seconds
    while (found := paints.read(name))["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def freeze(paints: Paints) -> int:
    """Stops the process where it is; returns its number."""
    assert paints._process is not None
    os.kill(paints._process.pid, signal.SIGSTOP)
    return paints._process.pid


def test_a_refused_request_has_its_sentence_and_the_next_is_served(paints: Paints):
    pids = set()
    for _ in range(2):
        found = until(paints, paints.add("paint", BAD))
        assert found["state"] == "failed"
        assert "steps" in found["error"]
        pids.add(paints._process and paints._process.pid)
    assert len(pids) == 1, "the process stays"
    assert len(paints.all()) == 2


def test_a_request_is_cancelled_before_the_process_has_begun_with_it(paints: Paints):
    """While Python loads, and while it waits behind another one."""
    first, second = paints.add("paint", BAD), paints.add("paint", BAD)
    paints.cancel(second)
    paints.cancel(first)
    assert until(paints, first)["state"] == "cancelled"
    assert until(paints, second)["state"] == "cancelled"
    assert until(paints, paints.add("paint", BAD))["state"] == "failed", "the process lives"
    paints.cancel(first)


def test_few_requests_wait(paints: Paints):
    paints.add("paint", BAD)
    freeze(paints)
    for _ in range(MOST_WAITING - 1):
        paints.add("paint", BAD)
    with pytest.raises(UserError) as refused:
        paints.add("paint", BAD)
    assert refused.value.kind == "conflict"


def test_a_run_that_needs_the_card_ends_the_requests_with_a_sentence(paints: Paints):
    names = [paints.add("paint", BAD)]
    pid = freeze(paints)
    names.append(paints.add("paint", BAD))
    paints.end()
    assert not Path(f"/proc/{pid}").exists()
    assert [paints.read(name)["error"] for name in names] == [
        "The card was needed for a run. Ask again when it has ended."
    ] * 2
    assert until(paints, paints.add("paint", BAD))["state"] == "failed"


def test_a_killed_process_is_told_and_another_one_begins(paints: Paints):
    name = paints.add("paint", BAD)
    os.kill(freeze(paints), signal.SIGKILL)
    found = until(paints, name)
    assert (found["state"], "(code -9)" in found["error"]) == ("failed", True)
    assert "steps" in until(paints, paints.add("paint", BAD))["error"]


def test_a_request_of_an_earlier_server_has_died(paints: Paints, tmp_path: Path):
    name = paints.add("paint", BAD)
    freeze(paints)
    assert Paints(Places(tmp_path, "runs"), Hub()).read(name)["state"] == "died"


def test_names_are_no_paths(paints: Paints, tmp_path: Path):
    folder = paints.folder / "20261129-205117-381624"
    folder.mkdir()
    (folder / REQUEST).write_text(json.dumps({"kind": "paint"}))
    (folder / RESULT).write_text(json.dumps({"state": "done"}))
    (folder / "00000.png").write_bytes(b"a picture")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    assert paints.picture(folder.name, "00000") == b"a picture"
    for picture in ("../../../secret", "link", "", "00000.png", "a" * 90, "x\0"):
        with pytest.raises(NotFoundError):
            paints.picture(folder.name, picture)
    for name in ("..", ".", "", f"../paint/{folder.name}", folder.name + "\n"):
        for call in (paints.read, paints.cancel, lambda one: upload_file(Places(tmp_path, "runs"), one)):
            with pytest.raises(NotFoundError):
                call(name)
