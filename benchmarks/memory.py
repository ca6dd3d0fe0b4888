"""Measures what each way to save memory saves, and how it changes the adapter's gradient.

    python benchmarks/memory.py [--base nano|FOLDER] [--parts gradients curves layers counted] [--torchao]

Parts:
  gradients  cosine between the adapter's gradient on the quantised base and on the plain base; least of four random
             batches
  curves     losses of 200 updates of `t2i-adapter train` in bf16 on circles, with equal batches on the plain and on the
             quantised bases; distance between their means over 20 updates, relative to the plain base's
  counted    bytes that `plan` counts for SDXL's true configs at 1024 px in bf16, batch 1 (training/memory.py, with meta
             tensors); not measured on a device
  layers     bytes that one linear layer saves for its backward pass; --torchao adds that package's layers

The result file keeps the parts that are not measured this time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import make_parser, measured, read_earlier, write_result
from sdxl import UNET

from t2i_adapter.batches.example import example_batch
from t2i_adapter.config.tree import (
    AdapterOptions,
    BaseOptions,
    Config,
    DataOptions,
    OptimOptions,
    TrackingOptions,
    TrainOptions,
)
from t2i_adapter.data.shapes import write_dataset
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.base import Base
from t2i_adapter.models.open import open_base
from t2i_adapter.models.quantize import FORMATS, QuantizedLinear
from t2i_adapter.training.frozen_model import load_frozen_model
from t2i_adapter.training.memory import Shapes
from t2i_adapter.training.step import batch_losses
from t2i_adapter.verbs.train import run

MIB = 2**20
BATCHES, UPDATES = 4, 200


class Published:
    """SDXL's configs, as much of a base as shapes need. The noise schedule is nano's; it does not change shapes."""

    def __init__(self, nano: Base) -> None:
        self.unet_config = {"in_channels": 4, "out_channels": 4, "layers_per_block": 2, **UNET}
        self.scheduler, self.latent_scale = nano.scheduler, nano.latent_scale


def gradients(kind: str, name: str) -> list[torch.Tensor]:
    base = open_base(BaseOptions(name=name, quantize=kind))  # pyright: ignore[reportArgumentType]
    frozen = load_frozen_model(replace(Config(), base=base.options), base, torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    adapter = build_adapter(AdapterOptions(), base.unet_config)
    found = []
    for seed in range(BATCHES):
        torch.manual_seed(seed)
        batch = example_batch(base.unet_config, 4, height=128, width=128)
        loss = batch_losses(adapter, frozen, batch).mean()
        found.append(torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, list(adapter.parameters()))]))
    return found


def cosines(name: str) -> dict[str, Any]:
    plain = gradients("none", name)
    found = {}
    for kind in FORMATS:
        pairs = zip(plain, gradients(kind, name), strict=True)
        found[kind] = min(torch.cosine_similarity(a, b, dim=0).item() for a, b in pairs)
    return {"base": name, "batches": BATCHES, **found}


def curves(name: str) -> dict[str, Any]:
    """Precision or quantisation -> relative distance of its losses to the plain base's in bf16."""
    losses = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_dataset(folder / "data", num=400, split="train", seed=0, size=128, condition="outline")
        for kind in ("none", *FORMATS, "float32"):
            losses[kind] = _losses(kind, name, folder)
            print(kind, sum(losses[kind]) / UPDATES, flush=True)
    plain = losses.pop("none")
    apart = {
        kind: {
            "mean_of_20_updates": max(abs(a / b - 1) for a, b in zip(_means(found), _means(plain), strict=True)),
            "mean_of_all": abs(sum(found) / sum(plain) - 1),
        }
        for kind, found in losses.items()
    }
    return {
        "base": name,
        "updates": UPDATES,
        "batch": 4,
        "first_and_last_20": _means(plain)[:: UPDATES // 20 - 1],
        **apart,
    }


def _losses(kind: str, name: str, folder: Path) -> list[float]:
    precise = kind == "float32"
    quantize: Any = "none" if precise else kind
    config = Config(
        output_dir=str(folder / kind),
        base=BaseOptions(name=name, quantize=quantize),
        data=DataOptions(location=str(folder / "data"), resolution=128, prepared_dir=str(folder / "prepared")),
        optim=OptimOptions(lr=1e-3),
        train=TrainOptions(batch_size=4, max_steps=UPDATES, seed=0, mixed_precision="no" if precise else "bf16"),
        tracking=TrackingOptions(report_to="none", log_every=1),
    )
    run(config)
    lines = (folder / kind / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def _means(losses: list[float]) -> list[float]:
    return [sum(losses[start : start + 20]) / 20 for start in range(0, UPDATES, 20)]


def counted(nano: Base) -> dict[str, Any]:
    """MiB of SDXL at 1024 px for batch 1, and for each further sample."""
    base: Any = Published(nano)
    adapter = build_adapter(AdapterOptions(), base.unet_config)
    found = {}
    for kind in ("none", *FORMATS):
        for blocks in ("none", "large", "all"):
            train = TrainOptions(gradient_checkpointing=blocks != "none", checkpoint_blocks=_of(blocks))
            options: Any = replace(BaseOptions(), quantize=kind)
            config = replace(Config(), base=options, train=train)
            shapes = Shapes(config, base, adapter, torch.bfloat16)
            one, two = (shapes.memory(size, height=1024, width=1024) for size in (1, 2))
            entry = {name: round(value / MIB) for name, value in vars(one).items()}
            entry |= {"total": round(one.total / MIB), "each_further_sample": round((two.step - one.step) / MIB)}
            found[f"{kind}, recompute {blocks}"] = entry
            print(kind, blocks, entry, flush=True)
    return found


def _of(blocks: str) -> Any:
    return "all" if blocks == "none" else blocks


def saved_by_layers(with_torchao: bool) -> dict[str, Any]:
    """Bytes that one linear layer, 1280 x 640 in bf16, saves for its backward pass."""
    makers: dict[str, Any] = {kind: partial(QuantizedLinear, format=kind, device="cpu") for kind in FORMATS}
    if with_torchao:
        torchao: Any = importlib.import_module("torchao.quantization")
        for name in ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig"):
            makers[f"torchao {name}"] = lambda layer, name=name: _with_torchao(torchao, name, layer)
    found = {}
    for name, make in makers.items():
        layer = make(torch.nn.Linear(640, 1280).to(torch.bfloat16).requires_grad_(False))
        saved: list[tuple[str, int]] = []
        x = torch.randn(64, 640, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append((str(t.dtype), t.nbytes)) or t, lambda t: t
        ):
            layer(x)
        found[name] = {"bytes": sum(size for _, size in saved), "types": [kind for kind, _ in saved]}
    return found


def _with_torchao(torchao: Any, name: str, layer: torch.nn.Module) -> torch.nn.Module:
    model = torch.nn.Sequential(layer)
    torchao.quantize_(model, getattr(torchao, name)())
    return model


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--base", default="nano")
    parser.add_argument("--torchao", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    options = parser.parse_args()
    content = read_earlier("memory", options.out)
    for part in options.parts:
        name, measure = PARTS[part]
        content[name] = {"measured": measured(), **measure(options)}
    write_result("memory", content, options.out)


PARTS: dict[str, tuple[str, Callable[[argparse.Namespace], dict[str, Any]]]] = {
    "gradients": ("least_cosine_of_the_adapters_gradient", lambda options: cosines(options.base)),
    "curves": ("loss_over_200_updates_against_bf16", lambda options: curves(options.base)),
    "layers": ("linear_layer_1280x640_bf16_keeps", lambda options: saved_by_layers(options.torchao)),
    "counted": ("sdxl_1024px_bf16_batch_1_mib_counted", lambda options: counted(open_base(BaseOptions()))),
}


if __name__ == "__main__":
    main()
