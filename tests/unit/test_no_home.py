"""A user of a container may have no entry in /etc/passwd and no HOME: one line names what helps."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from t2i_adapter.annotators import weights
from t2i_adapter.errors import UserError
from t2i_adapter.files import cache_root, user_path

UNKNOWN_USER = 54_321


def as_unknown_user(action: Callable[[], object]) -> str:
    """Runs `action` in a process of a user without an entry and without HOME; returns what it returns, or its error."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        for name in ("HOME", "T2I_ADAPTER_CACHE", "T2I_ADAPTER_WEIGHTS"):
            os.environ.pop(name, None)
        os.setuid(UNKNOWN_USER)
        try:
            answer = f"value: {action()}"
        except BaseException as fault:
            answer = f"{type(fault).__name__}: {fault}"
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as file:  # noqa: PTH123 - a descriptor
        answer = file.read()
    os.waitpid(child, 0)
    return answer


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    ("action", "words"),
    [
        (lambda: cache_root(None), ("UserError: --data.prepared_dir there is no home folder", "T2I_ADAPTER_CACHE")),
        (weights.folder, ("UserError: there is no home folder", "T2I_ADAPTER_WEIGHTS or HOME.")),
        (lambda: user_path("~/x"), ("UserError: ~/x: there is no home folder", "Set HOME, or write the folder")),
        (lambda: cache_root("named"), ("value: named",)),
    ],
    ids=["cache", "weights", "tilde", "named"],
)
def test_a_user_without_a_home_folder_gets_one_line(action: Callable[[], object], words: tuple[str, ...]):
    answer = as_unknown_user(action)
    assert all(some in answer for some in words), answer
    assert "\n" not in answer


def test_with_a_home_folder_the_cache_is_below_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("T2I_ADAPTER_CACHE")
    assert cache_root(None) == tmp_path / ".cache" / "t2i_adapter" / "prepared"


def test_another_users_home_that_does_not_exist_is_named():
    with pytest.raises(UserError, match="~nobody-of-this-name/x: .* an unknown user name"):
        user_path("~nobody-of-this-name/x")
