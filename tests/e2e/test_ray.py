"""deploy/ray_train.py on two workers of a Ray that this machine starts. Skipped where Ray is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import losses

pytest.importorskip("ray.train", reason='Ray is not installed: pip install "sdxl-t2i-adapter[ray]"')
ROOT = Path(__file__).parents[2]


def test_two_workers_of_ray_train_an_adapter(tmp_path: Path, tiny_base: Path, tiny_data: Path):
    recipe = tmp_path / "run.yaml"
    recipe.write_text(f"""
output_dir: {tmp_path}/out
base: {{name: {tiny_base}}}
data: {{location: {tiny_data}, resolution: 64, num_workers: 0, prepared_dir: {tmp_path}/cache}}
train: {{global_batch: 4, batch_size: 2, max_steps: 4, seed: 5}}
tracking: {{log_every: 1}}
validation: {{budget: 0}}
""")
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        ROOT / "deploy" / "ray_train.py",
        recipe,
        "--storage",
        tmp_path / "ray",
        "checkpoint.every=2",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True, timeout=560, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"Done: the adapter is in {tmp_path}/out." in done.stdout
    assert "4 = 2 x 1 accumulated x 2 processes" in done.stdout + done.stderr
    assert len(losses(tmp_path / "out")) == 4
    assert (tmp_path / "out" / "diffusion_pytorch_model.safetensors").is_file()


def test_a_wrong_option_is_one_line_before_ray_starts(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("output_dir: out\n")
    command = [sys.executable, str(ROOT / "deploy" / "ray_train.py"), "run.yaml", "optim.lr=fast"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True, timeout=120, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: --optim.lr 'fast'"), done.stderr
