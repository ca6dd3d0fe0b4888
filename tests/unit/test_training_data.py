"""Batches that are built ahead of the step: the same batches in the same order, and an error only at its place."""

from __future__ import annotations

from collections.abc import Iterator
from threading import get_ident
from typing import Any

import pytest

from t2i_adapter.errors import UserError
from t2i_adapter.training.cpu.feeding import BURST, in_bursts, one_ahead


def source(count: int, made: list[int], *, fails: bool = False) -> Iterator[Any]:
    for number in range(count):
        made.append(number)
        yield number
    if fails:
        raise UserError("row 17 is damaged")


@pytest.mark.parametrize("count", [0, 1, BURST - 1, BURST, 2 * BURST + 3])
def test_bursts_give_the_same_in_order(count: int) -> None:
    made: list[int] = []
    assert list(in_bursts(source(count, made))) == list(range(count)) == made


def test_a_burst_is_made_at_once_and_the_next_when_it_is_used_up() -> None:
    made: list[int] = []
    built = in_bursts(source(100, made))
    assert next(built) == 0 and len(made) == BURST
    assert [next(built) for _ in range(BURST - 1)][-1] == BURST - 1 and len(made) == BURST
    assert next(built) == BURST and len(made) == 2 * BURST


@pytest.mark.parametrize("count", [0, 3, BURST, BURST + 3])
def test_a_fault_comes_after_what_was_made_before_it(count: int) -> None:
    got: list[int] = []
    with pytest.raises(UserError, match="row 17"):
        for partial in one_ahead(in_bursts(source(count, [], fails=True))):
            got += [partial]
    assert got == list(range(count))


def test_another_thread_makes_them() -> None:
    threads = set(one_ahead(get_ident() for _ in range(3)))
    assert len(threads) == 1 and get_ident() not in threads
