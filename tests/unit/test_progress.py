"""Progress in a log file: a line now and then, with what is done and the time that is left."""

from __future__ import annotations

import pytest

from t2i_adapter.evaluation import progress
from t2i_adapter.evaluation.progress import Progress


def test_a_log_file_gets_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Progress(6, "generating") as shown:
        shown.advance(2)
    assert capsys.readouterr().err == "", "not before EVERY seconds"
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with Progress(6, "generating") as shown, Progress(6, "reading", is_shown=False) as hidden:
        shown.advance(2)
        hidden.advance(2)
    assert capsys.readouterr().err == "generating: 2 of 6 pictures, about 0 s left\n"


@pytest.mark.parametrize(
    ("seconds", "left"), [(20, "40 s"), (60, "2 min"), (3600, "2 h 0 min"), (0, "0 s")], ids=lambda value: str(value)
)
def test_the_time_that_is_left_follows_the_pace(seconds: float, left: str) -> None:
    with Progress(6, "generating", "pair") as shown:
        assert shown.line(seconds).endswith("0 of 6 pairs, no estimate yet")
        shown.advance(2)
        assert shown.line(seconds).endswith(f"2 of 6 pairs, about {left} left")
