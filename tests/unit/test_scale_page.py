"""docs/scale.md holds the tables that benchmarks/scale.py prints, and the calculator follows its assumptions."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import scale_paper
from common import ROOT
from scale_paper import PAGE, Assumptions, tables, time_table, update_page


def marked(text: str) -> dict[str, str]:
    """Mark -> what stands between it and the end mark."""
    return dict(re.findall(r"<!-- scale\.py: (\w+) -->\n(.*?)<!-- end -->", text, flags=re.DOTALL))


def test_the_page_holds_the_tables_that_the_program_prints() -> None:
    page, printed = marked(PAGE.read_text(encoding="utf-8")), marked(tables(Assumptions()))
    assert len(printed) == 7
    assert page == printed, "python benchmarks/scale.py --write_page puts them in"


def test_new_tables_replace_the_old_ones_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "scale.md"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    update_page(page, tables(Assumptions(price=5.0)))
    changed = marked(page.read_text(encoding="utf-8"))
    assert {name for name, text in marked(PAGE.read_text()).items() if changed[name] != text} == {"assumptions", "time"}
    update_page(page, tables(Assumptions()))
    assert page.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")


def test_time_and_money_follow_from_operations_rate_and_price() -> None:
    given = Assumptions(card_tflops=1000.0, vae_tflops=500.0, efficiency=0.5, price=2.0, cards=10)
    flops = {"vae_encoder": 5.0, "text_encoders": 0.1, "step": 15.0}
    rows = {row.split(" | ")[0].strip("| "): row for row in time_table(given, flops).splitlines()}
    # 3 M pairs x 15 TFLOP / 500 TFLOP/s = 90,000 s = 25 card-hours, 2.5 hours on 10 cards, 50 dollars.
    assert "| 25 | 2 h | 50 $ |" in rows["train"]
    # 3 M x 5 / 250 = 60,000 s = 16.7 card-hours.
    assert "| 17 | 100 min | 33 $ |" in rows["encode by the VAE"]
    assert time_table(replace(given, epochs=2.0), flops) != time_table(given, flops)


def test_the_frozen_minimum_of_a_step_is_that_of_sdxl() -> None:
    flops = scale_paper.newest_result()["flops"]
    assert flops["step"] == pytest.approx(14.79, abs=0.01)
    assert 0 < flops["text_encoders"] < 0.01 * flops["step"], "the page says so"


def test_the_flags_of_the_program_are_the_assumptions() -> None:
    line = [sys.executable, str(ROOT / "benchmarks" / "scale.py"), "--paper", "--price", "3", "--efficiency", "0.3"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == tables(Assumptions(price=3.0, efficiency=0.3))
