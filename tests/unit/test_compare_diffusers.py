"""benchmarks/compare_diffusers.py and torchvision_stand_in.py: reading logs, computing figures, measuring memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import compare_diffusers as compare
import numpy as np
import pytest
import torch
import torchvision_stand_in as stand_in
from PIL import Image

PEAKS = {"rss_mib": 600.0, "tree_rss_mib": 1000.0}


def entries(walls: list[float]) -> list:
    return [compare.Entry(step, wall, loss=float(step)) for step, wall in enumerate(walls, 1)]


def test_entries_are_read_from_event_files_in_the_order_of_steps(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    for folder, steps in (("logs/b", (1, 2)), ("logs/a", (3,))):
        with SummaryWriter(str(tmp_path / folder)) as writer:
            for step in steps:
                writer.add_scalar("loss", step / 4, step, walltime=100.0 + step)
                writer.add_scalar("lr", 9.0, step, walltime=0.0)
    with SummaryWriter(str(tmp_path / "logs/options")) as writer:
        writer.add_text("options", "a file without losses")
    assert compare.read_entries(tmp_path) == [
        compare.Entry(1, 101.0, 0.25),
        compare.Entry(2, 102.0, 0.5),
        compare.Entry(3, 103.0, 0.75),
    ]


def test_all_steps_are_read_though_tensorboard_samples_by_default(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    count = 10_050  # TensorBoard keeps 10,000 by default
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(1, count + 1):
            writer.add_scalar("loss", 1.0, step)
    assert len(compare.read_entries(tmp_path)) == count


def test_warm_up_is_skipped() -> None:
    walls = np.cumsum([0, 9, 9, 9, 9, 9, *[0.5] * 20]).tolist()
    assert compare.intervals(entries(walls)) == pytest.approx([0.5] * 20)
    assert compare.intervals(entries([0, 9, 10, 11, 12])) == pytest.approx([1, 1, 1]), "a short run: its first quarter"
    assert compare.intervals(entries([0, 1, 3])) == pytest.approx([1, 2])


@pytest.mark.parametrize("steps", [(), (1, 2), (1, 2, 4), (1, 2, 2, 3), (0, 1, 2)])
def test_steps_that_were_not_all_logged_once_are_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(compare.BenchmarkError, match=re.escape(str(list(steps)))):
        compare.intervals([compare.Entry(step, float(place), 1.0) for place, step in enumerate(steps)])


def test_figures_of_a_run() -> None:
    logged = entries([112.0, 112.5, 113.0, 113.5])
    found = compare.figures(logged, started=100.0, finished=120.0, batch=4, peaks=PEAKS)
    assert found == {"samples_per_s": 8.0, **PEAKS, "first_step_s": 12.0, "wall_s": 20.0, "mean_loss": 2.5}


def test_summary_and_table() -> None:
    script, ours = (4.0, 5.0, 2.0), (8.0, 15.0, 2.0)
    rounds = [{"script": {"samples_per_s": a}, "ours": {"samples_per_s": b}} for a, b in zip(script, ours, strict=True)]
    summary = compare.summarise(rounds)
    assert summary == {
        "samples_per_s": {
            "script": {"median": 4.0, "min": 2.0, "max": 5.0},
            "ours": {"median": 8.0, "min": 2.0, "max": 15.0},
            "ratio": {"of_medians": 2.0, "min": 1.0, "max": 3.0},
        }
    }
    row = compare.table(summary).splitlines()[-1]
    assert row == ("| samples/s in steady state | 4.00 (2.00 to 5.00) | 8.00 (2.00 to 15.0) | 2.00 (1.00 to 3.00) |")


def test_every_figure_has_its_label() -> None:
    found = compare.figures(entries([1, 2, 3]), started=0, finished=4, batch=1, peaks=compare.memory(os.getpid()))
    assert set(compare.LABELS) >= set(found)


def test_memory_counts_a_process_and_its_children() -> None:
    held, child = 200, 100  # MiB; written to, so that they are resident
    grow = "x = bytearray(b'1') * ({} * 2**20)"
    code = (
        f"import subprocess, sys; {grow.format(held)};"
        f"p = subprocess.Popen([sys.executable, '-c', \"{grow.format(child)}; print(1, flush=True); input()\"],"
        "stdin=subprocess.PIPE); p.wait()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()  # parent and child have written their memory now
        found = compare.memory(process.pid)
    finally:
        process.kill()
        process.wait()
    interpreter = 50  # MiB at most, for each
    assert held <= found["rss_mib"] <= held + interpreter
    assert held + child <= found["tree_rss_mib"] <= held + child + 2 * interpreter
    assert compare.memory(process.pid)["rss_mib"] == 0, "a process that has ended uses no memory"


def test_a_run_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "LIMIT_S", 0.5)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    begun = time.monotonic()
    with pytest.raises(compare.BenchmarkError, match="was ended"):
        compare.watch(process)
    assert process.returncode is not None
    assert time.monotonic() - begun < 30


def test_both_sides_get_the_same_threads_and_caches_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", "elsewhere")
    found = compare.environment(tmp_path, 3)
    assert found["OMP_NUM_THREADS"] == "3"
    assert "HF_DATASETS_CACHE" not in found
    assert found["HF_HOME"].startswith(str(tmp_path))
    assert found["T2I_ADAPTER_CACHE"].startswith(str(tmp_path))


def test_stand_in_crops_and_scales_as_torchvision_does() -> None:
    size = 8
    tall = Image.new("RGB", (10, 25), (255, 0, 51))
    resized = stand_in.Resize(size)(tall)
    assert resized.size == (8, 20)
    assert stand_in.Resize(size)(resized) is resized, "nothing to do"
    ramp = Image.fromarray(np.arange(20, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(3, 2))
    cropped = stand_in.CenterCrop(size)(ramp)
    assert np.asarray(cropped)[:, 0, 0].tolist() == list(range(6, 14))
    whole = stand_in.Compose(
        [stand_in.Resize(size), stand_in.CenterCrop(size), stand_in.ToTensor(), stand_in.Normalize([0.5], [0.5])]
    )
    picture = whole(tall)
    assert picture.shape == (3, size, size)
    torch.testing.assert_close(picture[:, 0, 0], torch.tensor([1.0, -1.0, -0.6]))
