"""benchmarks/gpu.py: it runs from end to end with small networks, loses little when killed, says why it cannot run."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu
import gpu_tables
import psutil
import pytest
import torch
from children import last_line, run_child
from common import ROOT, newest

PROGRAM = ROOT / "benchmarks" / "gpu.py"
PATIENCE = 580.0  # seconds


def start(*words: object, python: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    line = [sys.executable, *python, str(PROGRAM), *map(str, words)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd="/")


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


# From end to end -----------------------------------------------------------------------------------------------------


def rows_of(parts: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Part -> its rows, after a run of these parts with small networks that ended well."""
    out = folder / "result.json"
    code, printed, errors = finish(start("--tiny", "--minutes", 30, "--parts", parts, "--out", out))
    result = json.loads(out.read_text(encoding="utf-8"))
    rows = {part: found["rows"] for part, found in result["parts"].items()}
    failed = {name: row for found in rows.values() for name, row in found.items() if "failed" in row}
    assert (code, failed) == (0, {}), errors
    assert result["complete"] and list(rows) == parts.split(",")
    assert result["card"]["step_tflop"] > 0 and result["measured"]["hardware"].endswith("cpu")
    assert gpu_tables.tables(result) in printed and str(out) in printed
    return rows


def test_training_parts_run_with_small_networks(tmp_path: Path) -> None:
    rows = rows_of("speed,memory,recipes,script", tmp_path)
    assert rows["speed"]["bf16-4"]["finite"] and rows["speed"]["bf16-4"]["samples_per_s"] > 0
    assert rows["memory"]["all-16"]["plan_mib"] > 0
    assert rows["recipes"]["8gib"] == {"skipped": "a memory limit needs a CUDA device"}
    assert rows["script"]["script"]["skipped"].startswith("name the diffusers script")


def test_the_other_parts_run_with_small_networks(tmp_path: Path) -> None:
    rows = rows_of("inference,train,quantised", tmp_path)
    assert rows["inference"]["picture-controlnet"]["seconds"] > 0
    assert rows["train"]["train"]["samples_per_s"] > 0
    assert rows["quantised"]["cosine"]["int8"] > 0.99
    assert len(rows["quantised"]["8gib-curve"]["losses"]) == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs these tests itself")
def test_each_test_of_the_gpu_is_a_row(tmp_path: Path) -> None:
    rows = rows_of("tests", tmp_path)["tests"]
    assert rows["all"]["passed_tests"] == 0 and rows["all"]["skipped_tests"] == len(rows) - 1 > 20


def test_a_killed_program_leaves_what_it_measured_and_no_process(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    process = start("--tiny", "--parts", "speed", "--out", out)
    until = time.monotonic() + PATIENCE
    while "samples_per_s" not in (out.read_text(encoding="utf-8") if out.exists() else ""):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["complete"] is False
    assert result["parts"]["speed"]["rows"]["bf16-1"]["samples_per_s"] > 0
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


# Rows that cannot be measured ----------------------------------------------------------------------------------------


@pytest.fixture
def session(tmp_path: Path) -> gpu.Session:
    options = argparse.Namespace(tiny=True, minutes=5, parts=["speed"], out=tmp_path / "result.json", script=None)
    return gpu.Session(options, tmp_path)


def test_a_row_that_fails_costs_this_row_only(session: gpu.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [gpu.step("good", 1, ""), gpu.step("broken", 1, "", quantize="int7"), gpu.step("after", 1, "")]
    monkeypatch.setitem(gpu.ROWS, "speed", tuple(rows))
    found = dict(session.rows("speed", session.until))
    assert found["good"]["finite"] and found["after"]["finite"]
    assert set(found["broken"]) == {"failed"} and "int7" in found["broken"]["failed"]


def test_a_process_that_dies_costs_its_row_only(session: gpu.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Any] = [gpu.step("good", 1, ""), gpu.step("killed", 1, ""), gpu.step("after", 1, "")]
    monkeypatch.setitem(gpu.ROWS, "speed", tuple(rows))
    read, killed = Path.read_text, []

    def kill_at_its_row(path: Path, *args: Any, **kwargs: Any) -> str:
        text = read(path, *args, **kwargs)
        if path.suffix == ".rows" and '"begin": "killed"' in text and not killed:
            for child in psutil.Process().children():
                killed.append(child.pid)
                child.kill()
        return text

    monkeypatch.setattr(Path, "read_text", kill_at_its_row)
    found = dict(session.rows("speed", session.until))
    assert killed and found["good"]["finite"] and found["after"]["finite"]
    assert found["killed"]["failed"].startswith("the process ended with code -9")


def test_rows_without_time_are_skipped_with_a_reason(session: gpu.Session) -> None:
    found = dict(session.rows("memory", time.monotonic() - 1))
    assert set(found) == {row["name"] for row in gpu.ROWS["memory"]}
    assert all(row == {"skipped": gpu.NO_TIME} for row in found.values())


def test_a_command_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = "import subprocess, sys; print(1, flush=True); subprocess.run(['sleep', '60'])"
    began = time.monotonic()
    assert run_child([sys.executable, "-c", script], log, until=began + 2) is None
    assert time.monotonic() - began < 30 and last_line(log) == "1"
    assert not [child for child in psutil.Process().children(recursive=True) if child.name() == "sleep"]


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--parts", "sped"], "--parts sped: allowed are tests, speed, memory"),
        (["--minutes", "0"], "--minutes 0.0: allowed is a number above 0"),
        (["--script", "nowhere.py"], "--script nowhere.py: no such file"),
        ([], "no CUDA device found; --tiny tries this program on a CPU"),
        (["--tiny", "--minutes", "0.001", "--out", os.devnull], "no time left"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_exit_code_2(words: list[str], said: str) -> None:
    code, _, errors = finish(start(*words))
    assert code == 2 and said in errors.splitlines()[-1]


def test_without_the_package_s_libraries_it_says_how_to_install_them() -> None:
    code, _, errors = finish(start("--tiny", python=("-S",)))
    assert code == 2
    assert errors.startswith("gpu.py: missing packages: torch, ") and "`pip install -e .`" in errors


# Tables --------------------------------------------------------------------------------------------------------------


def test_the_page_shows_the_tables_of_the_newest_result() -> None:
    file = newest("gpu")
    result = json.loads(file.read_text(encoding="utf-8")) if file else {}
    assert gpu_tables.tables(result) in (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")


def test_every_line_of_the_tables_is_a_row_that_is_measured() -> None:
    for part, lines in gpu_tables.LINES.items():
        if part in gpu.ROWS:
            names = {row["name"] for row in gpu.ROWS[part]} | {"best"}
            assert {name for name, _, _ in lines} <= names


def test_figures_become_cells() -> None:
    speed = {"samples_per_s": 4.0, "least_samples_per_s": 3.9, "most_samples_per_s": 4.1, "batch": 8}
    slow = {**speed, "samples_per_s": 2.0, "batch": 4}
    rows = {"bf16-4": slow, "bf16-8": speed, "bf16-16": {"out_of_memory": True, "batch": 16}}
    rows["graphs"] = {"failed": "RuntimeError: no"}
    memory = {"peak_allocated_mib": 1100.0, "peak_reserved_mib": 1200.0, "plan_mib": 1089.0, "plan_over_peak": 0.99}
    result = {"parts": {"speed": {"rows": rows}, "memory": {"rows": {"plain-1": memory}}}}
    found = gpu_tables.tables(result)
    assert gpu_tables.best_batch(result) == 8
    assert "| bf16, the fastest batch size | 4 samples/s (3.9 to 4.1) at batch 8 |" in found
    assert "| bf16, batch 16 | does not fit |" in found
    assert "| bf16, compiled, CUDA graphs | not measured (failed: RuntimeError: no) |" in found
    assert "| bf16, batch 1 | 1,100 MiB (1,200 held by the allocator); plan 1,089, -1.0% |" in found
