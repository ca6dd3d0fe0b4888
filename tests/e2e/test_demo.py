"""A small demo: every part runs, and the results are where the README says."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import T2IAdapter
from support.processes import finish

WORDS = ("demo", "--num_train", "16", "--num_test", "2", "--steps", "2")


def test_the_demo_writes_its_results_and_can_be_repeated(tmp_path: Path):
    first = finish(tmp_path, *WORDS)
    out = tmp_path / "runs" / "demo"
    result = json.loads((out / "evaluation.json").read_text())
    assert result["num"] == 2
    mean = result["metrics"]["iou"]["adapter"]["mean"]
    assert f"IoU of the objects is {mean:.2f}" in first
    for name in ("sheet.png", "report.html"):
        assert (out / name).stat().st_size > 1000 and str(Path("runs/demo") / name) in first
    assert len(list((out / "pictures").glob("*.png"))) == 2
    T2IAdapter.from_pretrained(out / "adapter", local_files_only=True)
    finish(tmp_path, *WORDS)
    assert json.loads((out / "evaluation.json").read_text())["metrics"] == result["metrics"], "same seed, same numbers"
