"""What each means of saving memory saves, and what it does to the adapter's gradient.

    python benchmarks/memory.py [--base nano|FOLDER] [--torchao]

On nano: cosine of the adapter's gradient on the quantised base to that on the plain one, the least of four random
batches. On SDXL's true configs at 1024 px in bf16, batch 1: the bytes that `plan` counts (training/estimate.py, tensors
that have shapes and no content), none of it measured on a device. --torchao adds what a linear layer of torchao keeps
for its backward pass, where that package is installed. Result file: benchmarks/memory.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from real_size import UNET

from t2i_adapter.config import AdapterOptions, BaseOptions, Config, TrainOptions
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.base import Base, open_base
from t2i_adapter.models.quantize import KINDS, NarrowLinear
from t2i_adapter.training.estimate import Shapes, example_batch
from t2i_adapter.training.frozen import load_frozen
from t2i_adapter.training.run import versions
from t2i_adapter.training.step import batch_losses

OUT = Path(__file__).with_suffix(".json")
MIB = 2**20
BATCHES = 4


class Published:
    """SDXL as far as shapes go: its configs, and nano's schedule, which has no part in them."""

    def __init__(self, nano: Base) -> None:
        self.unet_config = {"in_channels": 4, "out_channels": 4, "layers_per_block": 2, **UNET}
        self.scheduler, self.latent_scale = nano.scheduler, nano.latent_scale


def gradients(kind: str, name: str) -> list[torch.Tensor]:
    base = open_base(BaseOptions(name=name, quantize=kind))  # pyright: ignore[reportArgumentType]
    frozen = load_frozen(replace(Config(), base=base.options), base, torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    adapter = build_adapter(AdapterOptions(), base.unet_config)
    found = []
    for seed in range(BATCHES):
        torch.manual_seed(seed)
        batch = example_batch(base.unet_config, 4, height=128, width=128)
        loss = batch_losses(adapter, frozen, batch).mean()
        found.append(torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, list(adapter.parameters()))]))
    return found


def foretold(nano: Base) -> dict[str, Any]:
    """MiB of SDXL at 1024 px, batch 1 and each further sample."""
    base: Any = Published(nano)
    adapter = build_adapter(AdapterOptions(), base.unet_config)
    found = {}
    for kind in ("none", *KINDS):
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


def kept_by_layers(with_torchao: bool) -> dict[str, Any]:
    """Bytes that one linear layer, 1280 x 640 in bf16, keeps for its backward pass."""
    makers: dict[str, Any] = {kind: lambda layer, kind=kind: NarrowLinear(layer, kind, "cpu") for kind in KINDS}
    if with_torchao:
        torchao: Any = importlib.import_module("torchao.quantization")
        for name in ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig"):
            makers[f"torchao {name}"] = lambda layer, name=name: _with_torchao(torchao, name, layer)
    found = {}
    for name, make in makers.items():
        layer = make(torch.nn.Linear(640, 1280).to(torch.bfloat16).requires_grad_(False))
        kept: list[tuple[str, int]] = []
        x = torch.randn(64, 640, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append((str(t.dtype), t.nbytes)) or t, lambda t: t
        ):
            layer(x)
        found[name] = {"bytes": sum(size for _, size in kept), "types": [kind for kind, _ in kept]}
    return found


def _with_torchao(torchao: Any, name: str, layer: torch.nn.Module) -> torch.nn.Module:
    model = torch.nn.Sequential(layer)
    torchao.quantize_(model, getattr(torchao, name)())
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="nano")
    parser.add_argument("--torchao", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    plain = gradients("none", options.base)
    cosines = {}
    for kind in KINDS:
        pairs = zip(plain, gradients(kind, options.base), strict=True)
        cosines[kind] = min(torch.cosine_similarity(a, b, dim=0).item() for a, b in pairs)
    print(cosines, flush=True)
    content = {
        "date": date.today().isoformat(),
        "versions": versions(),
        "least_cosine_of_the_adapters_gradient": {"base": options.base, "batches": BATCHES, **cosines},
        "linear_layer_1280x640_bf16_keeps": kept_by_layers(options.torchao),
        "sdxl_1024px_bf16_batch_1_mib_counted": foretold(open_base(BaseOptions())),
    }
    options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
