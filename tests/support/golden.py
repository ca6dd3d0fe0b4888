"""Records the golden loss curve: tests/assets/losses/nano_cpu.jsonl, written by `make golden`.

It is the loss curve of the demo's recipe on 64 fixed pairs, in float32, on one thread, with all digits. A change that
must not alter a number (a refactoring, a faster path) is compared with it to the last digit by
tests/e2e/test_golden_losses.py. A change that must alter numbers records the curve again, and its commit says why.

Line 1 holds what the numbers depend on besides this code. Every other line is one update of one arm, or the end of an
arm with the digest of the saved adapter's weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "assets" / "losses" / "nano_cpu.jsonl"
ARMS: dict[str, list[str]] = {
    "plain": ["--train.cpu_threads", "1", "--train.ema_decay", "0"],
    "accumulate": [
        *("--train.batch_size", "8", "--train.gradient_accumulation_steps", "2"),
        *("--train.cpu_threads", "1", "--train.ema_decay", "0"),
    ],
    "ema": ["--train.cpu_threads", "2", "--train.ema_decay", "0.9"],
}
"""Arm -> its flags beside the recipe. EMA changes no loss, so the arm `ema` is also the loss curve of two threads."""
STEPS = 24
"""Updates of an arm. From step 16 on, the CPU path replays a trace."""
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "numpy", "Pillow", "opencv-python-headless")
RECIPE = Path(__file__).parents[2] / "recipes" / "nano-shapes.yaml"


def environment() -> dict[str, Any]:
    """What the last digits depend on: versions of libraries and the CPU's instructions."""
    import torch

    cpu = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            cpu.setdefault(name.strip(), value.strip())
    return {
        "versions": {name: version(name) for name in LIBRARIES},
        "machine": platform.machine(),
        "vendor": cpu.get("vendor_id", ""),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "flags": hashlib.sha256(" ".join(sorted(cpu.get("flags", "").split())).encode()).hexdigest()[:16],
    }


def record(arm: str, folder: Path) -> list[dict[str, Any]]:
    """Trains one arm in `folder`, on one thread, and returns its lines."""
    import torch
    from safetensors.torch import load_file

    from t2i_adapter.cli import main

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data, out = folder / "data", folder / arm
    shapes = ["--num", "64", "--kinds", "circle", "--max_shapes", "1", "--patterns", "plain", "--size", "128"]
    steps = str(STEPS)
    run = ["--recipe", str(RECIPE), "--data", str(data), "--output_dir", str(out), *ARMS[arm]]
    run += ["--train.max_steps", steps, "--checkpoint.every", steps, "--tracking.log_every", "1"]
    run += ["--tracking.report_to", "none", "--data.num_workers", "0", "--data.prepared_dir", str(folder / "prepared")]
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            assert data.exists() or main(["make-data", "shapes", "--out", str(data), *shapes]) == 0, output.getvalue()
            assert main(["train", *run]) == 0, output.getvalue()
    finally:
        torch.set_num_threads(threads)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines: list[dict[str, Any]] = [
        {"arm": arm, "step": row["step"]} | {name: float(row[name]).hex() for name in ("loss", "grad_norm", "lr")}
        for row in rows
    ]
    weights = load_file(out / "diffusion_pytorch_model.safetensors")
    digest = hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()
    return [*lines, {"arm": arm, "end": STEPS, "sha256": digest}]


def read() -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Returns the recorded environment, and each arm's lines."""
    head, *lines = [json.loads(line) for line in FILE.read_text().splitlines()]
    return head, {arm: [line for line in lines if line["arm"] == arm] for arm in ARMS}


def write() -> None:
    """Records every arm again."""
    FILE.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        lines = [environment(), *(line for arm in ARMS for line in record(arm, Path(folder)))]
    FILE.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"{FILE}: {len(lines) - 1} lines of {len(ARMS)} arms")


if __name__ == "__main__":
    write()
