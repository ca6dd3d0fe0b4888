"""The profile of a run: its parts add up, the trace can be read, and the run's numbers do not change."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from t2i_adapter.config.tree import CheckpointOptions, Config, DataOptions, TrackingOptions, TrainOptions
from t2i_adapter.training import profile
from t2i_adapter.verbs.train import run


@pytest.fixture
def config(tiny_data: Path, tmp_path: Path) -> Config:
    return Config(
        output_dir=str(tmp_path / "run"),
        data=DataOptions(location=str(tiny_data), resolution=64, num_workers=0),
        train=TrainOptions(
            batch_size=2, max_steps=profile.SKIP + profile.STEPS + 1, seed=5, cpu_threads=1, profile=True
        ),
        checkpoint=CheckpointOptions(every=100),
        tracking=TrackingOptions(report_to="none"),
    )


def shares(page: str) -> dict[str, float]:
    return {part: float(share) for part, share in re.findall(r"^\| (.+) \| [\d.]+ \| (-?[\d.]+)% \|$", page, re.M)}


def test_the_parts_of_a_step_add_up_and_the_trace_has_them(config: Config):
    run(config)
    folder = Path(config.output_dir) / profile.FOLDER
    found = shares((folder / "summary.md").read_text())
    assert list(found) == [*profile.PARTS, profile.REST]
    assert sum(found.values()) == pytest.approx(100, abs=0.5)
    assert found[profile.BACKWARD] > 5 and found[profile.UNET] > 5 and all(share > -0.1 for share in found.values())
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    for part in profile.PARTS:
        assert sum(event["name"] == part and event.get("cat") == "user_annotation" for event in events) == profile.STEPS


def test_looking_changes_nothing_and_short_runs_have_a_profile_too(config: Config, tmp_path: Path):
    weights = []
    for name, looked_at in (("plain", False), ("profiled", True)):
        train = replace(config.train, max_steps=2, profile=looked_at)
        run(replace(config, output_dir=str(tmp_path / name), train=train))
        weights.append((tmp_path / name / "diffusion_pytorch_model.safetensors").read_bytes())
        assert (tmp_path / name / profile.FOLDER / "summary.md").is_file() == looked_at
    assert weights[0] == weights[1]
