"""Measures training steps and `t2i-adapter train` on SDXL at its true size, with random weights.

    python benchmarks/real_size.py --folder SCRATCH                     rows for a CPU (7 GB of files, 13 GiB of memory)
    python benchmarks/real_size.py --folder SCRATCH --rows gpu          rows for a CUDA device
    python benchmarks/real_size.py --folder SCRATCH --rows frozen,8gib  these rows

It writes the base to SCRATCH/base once, in bf16: SDXL's published configs, with normal weights times 1/sqrt(inputs).
Each row runs in its own process. The result file holds the settings and figures of each row, and when and where it was
measured. Rows that are not run this time are copied from the newest file of this hardware.

    s_per_step     median over the steps after the first, with the adapter's AdamW
    samples_per_s  batch / s_per_step
    peak_rss_mib   peak resident memory of the process (of the command in the rows `command` and `gpu-command`)
    peak_gpu_mib   peak device memory of torch's allocator
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from common import make_parser, measured, read_earlier, write_result
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from t2i_adapter.batches.example import example_batch
from t2i_adapter.config.tree import AdapterOptions, BaseOptions, Config, TrainOptions
from t2i_adapter.data.shapes import write_dataset
from t2i_adapter.models import nano
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.open import open_base
from t2i_adapter.training.accumulate import is_out_of_memory
from t2i_adapter.training.frozen_model import load_frozen_model
from t2i_adapter.training.step import batch_losses

MIB = 2**20

UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
TEXT = {
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
    },
    "text_encoder_2": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    },
}

ROWS: dict[str, dict[str, Any]] = {
    # A CPU
    "frozen": {"latent": 32, "batch": 1, "steps": 3},
    "unfrozen": {"latent": 32, "batch": 1, "steps": 3, "unfrozen": True},
    "frozen-compiled": {"latent": 32, "batch": 1, "steps": 3, "compile": "on"},
    "frozen-recompute": {"latent": 32, "batch": 1, "steps": 3, "recompute": "all"},
    "frozen-int8": {"latent": 32, "batch": 1, "steps": 3, "quantize": "int8"},
    "command": {"command": True, "resolution": 256, "steps": 2},
    # A CUDA device
    "gpu": {"latent": 128, "batch": "best", "steps": 20, "compile": "on"},
    "gpu-graphs": {"latent": 128, "batch": "best", "steps": 20, "compile": "graphs"},
    "gpu-float8": {"latent": 128, "batch": "best", "steps": 20, "compile": "on", "quantize": "float8"},
    "gpu-float8-cosine": {"latent": 128, "batch": 1, "cosine": "float8"},
    "gpu-unfrozen": {"latent": 128, "batch": "best", "steps": 20, "unfrozen": True},
    "8gib": {"latent": 128, "batch": 1, "steps": 5, "quantize": "int8", "recompute": "all", "limit_gib": 8},
    "8gib-curve": {"latent": 128, "batch": 1, "curve": 200, "quantize": "int8", "recompute": "all"},
    "24gib": {"latent": 128, "batch": "best", "steps": 10, "recompute": "large", "limit_gib": 24},
    "24gib-float8": {
        "latent": 128, "batch": "best", "steps": 10, "recompute": "large", "limit_gib": 24, "quantize": "float8",
    },
    "gpu-command": {"command": True, "resolution": 1024, "steps": 20},
}  # fmt: skip
HERE = ("unfrozen", "frozen", "command")
GPU = tuple(name for name in ROWS if name.startswith("gpu") or "gib" in name)


# The base ------------------------------------------------------------------------------------------------------------


def write_base(folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes SDXL in diffusers layout with random weights, if `folder` does not hold it yet."""
    if (folder / "model_index.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("scheduler", "tokenizer", "tokenizer_2"):
        shutil.copytree(nano.path() / part, folder / part, dirs_exist_ok=True)
    _write(folder / "unet", lambda: UNet2DConditionModel(**UNET), dtype)
    _write(folder / "vae", lambda: AutoencoderKL(**VAE), dtype)
    for part, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        small = json.loads((nano.path() / part / "config.json").read_text())
        special = {name: small[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, **special, **TEXT[part])
        _write(folder / part, lambda kind=kind, config=config: kind(config), dtype)
    shutil.copy(nano.path() / "model_index.json", folder)  # last: marks the folder as complete


def _write(folder: Path, make: Any, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        model = make().to(dtype)
    fill(model.to_empty(device="cpu")).save_pretrained(folder)


@torch.no_grad()
def fill(model: nn.Module) -> Any:
    """Sets weights that preserve the scale of activations: a repeated block of normals times 1/sqrt(inputs).

    Norm weights are 1, biases 0.
    """
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    for name, buffer in model.named_buffers():
        buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer)) if "position" in name else buffer.zero_()
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(float(name.endswith("weight")))
            continue
        flat = parameter.view(-1)
        for start in range(0, flat.numel(), block.numel()):
            piece = flat[start : start + block.numel()]
            piece.copy_(block[: piece.numel()] * parameter[0].numel() ** -0.5)
    return model


# A row, in its own process -------------------------------------------------------------------------------------------


class Bench:
    """An adapter on a base of true size, and its training step without the training loop."""

    def __init__(self, base_folder: Path, row: dict[str, Any], device: torch.device) -> None:
        self.row, self.device = row, device
        base = open_base(BaseOptions(name=str(base_folder), quantize=row.get("quantize", "none")))
        train = TrainOptions(
            gradient_checkpointing="recompute" in row,
            checkpoint_blocks=row.get("recompute", "all"),
            compile=row.get("compile", "off"),
        )
        config = replace(Config(), base=base.options, train=train)
        self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16")
        self.frozen = load_frozen_model(config, base, device, torch.bfloat16)
        self.frozen.unet.requires_grad_("unfrozen" in row)
        self.unet_config = base.unet_config
        torch.manual_seed(0)
        adapter = build_adapter(AdapterOptions(), base.unet_config).to(device)
        self.adapter = self.accelerator.prepare(adapter)
        self.optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-5)

    def batch(self, size: int, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        side = 8 * self.row["latent"]
        return example_batch(self.unet_config, size, height=side, width=side, device=self.device)

    def gradients(self, batch: Any) -> torch.Tensor:
        """Adds the adapter's gradients; returns the loss ()."""
        loss = batch_losses(self.adapter, self.frozen, batch).mean()
        self.accelerator.backward(loss)
        return loss.detach()

    def step(self, batch: Any) -> torch.Tensor:
        loss = self.gradients(batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def timed(self, size: int, steps: int) -> dict[str, Any]:
        batch, seconds = self.batch(size), []
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        for _ in range(steps + 1):
            began = time.perf_counter()
            loss = self.step(batch)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        median = statistics.median(seconds[1:])
        return {
            "batch": size,
            "first_step_s": seconds[0],
            "s_per_step": median,
            "samples_per_s": size / median,
            "finite": bool(torch.isfinite(loss)),
            **self.peaks(),
        }

    def best(self, steps: int) -> dict[str, Any]:
        """Figures of the batch size with the most samples a second, of 1, 2, 4, ... until memory runs out."""
        found: list[dict[str, Any]] = []
        for size in (2**power for power in range(8)):
            try:
                found.append(self.timed(size, steps))
            except RuntimeError as fault:
                if not is_out_of_memory(fault):
                    raise
                break
        best = max(found, key=lambda entry: entry["samples_per_s"])
        return {**best, "largest_batch": found[-1]["batch"]}

    def peaks(self) -> dict[str, int]:
        peaks = {"peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
        if self.device.type == "cuda":
            peaks["peak_gpu_mib"] = torch.cuda.max_memory_reserved() // MIB
        return peaks


def measure(base: Path, row: dict[str, Any]) -> dict[str, Any]:
    """The figures of one row."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if row["latent"] > 64 and device.type == "cpu":
        raise SystemExit("Rows of 1024 px need a CUDA device; no CUDA device found.")
    if "limit_gib" in row:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, row["limit_gib"] * 2**30 / total))
    if "cosine" in row:
        return cosine(base, row, device)
    if "curve" in row:
        return curves(base, row, device)
    bench = Bench(base, row, device)
    return bench.best(row["steps"]) if row["batch"] == "best" else bench.timed(row["batch"], row["steps"])


def cosine(base: Path, row: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Cosine between the adapter's gradients on the quantised and on the plain base."""
    found = []
    for kind in ("none", row["cosine"]):
        bench = Bench(base, {**row, "quantize": kind}, device)
        bench.gradients(bench.batch(row["batch"]))
        found.append(torch.cat([p.grad.flatten().float() for p in bench.adapter.parameters() if p.grad is not None]))
        del bench
    return {"cosine": torch.cosine_similarity(*found, dim=0).item()}


def curves(base: Path, row: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Losses over equal batches on the plain base in bf16 and on the row's base."""
    plain = {"latent": row["latent"], "recompute": "all"}
    losses = []
    for settings in (plain, row):
        bench = Bench(base, settings, device)
        losses.append([bench.step(bench.batch(row["batch"], seed)).item() for seed in range(row["curve"])])
        del bench
    apart = max(abs(a - b) / a for a, b in zip(*losses, strict=True))
    return {"largest_relative_difference": apart, "bf16": losses[0], "quantized": losses[1]}


def run_command(folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    """Runs `t2i-adapter train` as a user does, from pictures to the adapter's folder."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        data = Path(scratch) / "data"
        write_dataset(data, num=2, split="train", size=row["resolution"])
        options = {
            "base.name": folder / "base",
            "data.location": data,
            "data.resolution": row["resolution"],
            "data.num_workers": 0,
            "data.prepared_dir": Path(scratch) / "prepared",
            "train.batch_size": 1,
            "train.max_steps": row["steps"],
            "train.mixed_precision": "bf16",
            "train.seed": 0,
            "tracking.report_to": "none",
            "tracking.log_every": 1,
            "output_dir": Path(scratch) / "run",
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "t2i_adapter", "train", *words], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        lines = (Path(scratch) / "run" / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        return {
            "wall_s": time.perf_counter() - began,
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
            "losses": [entry["loss"] for entry in steps],
            "s_per_step": 1 / steps[-1]["samples_per_s"],
            "adapter_mib": (Path(scratch) / "run/diffusion_pytorch_model.safetensors").stat().st_size / MIB,
        }


# Rows and the result file --------------------------------------------------------------------------------------------


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder for the base, 7 GB")
    parser.add_argument("--rows", default="here", help=f"here, gpu, or rows with commas between: {', '.join(ROWS)}")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(measure(options.folder / "base", ROWS[options.child])))
        return
    write_base(options.folder / "base")
    for name in {"here": HERE, "gpu": GPU}.get(options.rows) or options.rows.split(","):
        row = ROWS[name]
        print(name, flush=True)
        found = run_command(options.folder, row) if "command" in row else _in_child(name, options)
        _record(options, name, {"settings": {**row, "dtype": "bf16"}, **found})


def _in_child(name: str, options: argparse.Namespace) -> dict[str, Any]:
    line = [sys.executable, __file__, "--folder", str(options.folder), "--threads", str(options.threads)]
    done = subprocess.run([*line, "--child", name], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed")
    return json.loads(done.stdout.splitlines()[-1])


def _record(options: argparse.Namespace, name: str, found: dict[str, Any]) -> None:
    on_gpu = torch.cuda.is_available()
    rows = read_earlier("real_size", options.out, on_gpu=on_gpu).get("rows", {})
    rows[name] = {"measured": measured(on_gpu=on_gpu, threads=options.threads), **found}
    options.out = write_result("real_size", {"rows": rows}, options.out, on_gpu=on_gpu, threads=options.threads)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
