"""Measures what control costs at inference: base UNet, T2I-Adapter and ControlNet, with random weights.

    python benchmarks/inference_cost.py            FLOPs of SDXL at 1024 px; times on this machine (GPU if there is one)
    python benchmarks/inference_cost.py --flops    FLOPs and parameters only, in seconds

Rows of the result file:

    flops    SDXL at 1024 px: parameters and FLOPs of one forward pass of one sample, counted without weights in memory
    sdxl     one forward pass of each network at SDXL's true size: seconds, MiB of its weights, most MiB in use; on a
             CPU at 256 px, fp32 (12 GiB of memory), each network in its own process; on a GPU at 1024 px, fp16
    picture  the denoising of one picture by each arm, with guidance: base alone, with the adapter, with a ControlNet;
             on a CPU by `nano` at 128 px, on a GPU by SDXL at 1024 px

An adapter runs once a picture. A ControlNet runs at every step, as the UNet does.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from common import make_parser, write_result
from diffusers import ControlNetModel, T2IAdapter, UNet2DConditionModel
from sdxl import UNET, materialise
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from t2i_adapter.config.tree import AdapterOptions, BaseOptions
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.open import open_base

MIB, TERA = 2**20, 1e12
STEPS = 30
"""Denoising steps of a picture. With guidance each takes two passes."""
ROUNDS = 3
"""Repetitions of a measurement; the median counts, and a first one is not counted."""
TOKENS = 77
UNET_ONLY = ("out_channels", "sample_size", "up_block_types")
"""Keys that SDXL's UNet has and its ControlNets (diffusers/controlnet-canny-sdxl-1.0) do not."""
NETWORKS = ("unet", "adapter", "controlnet")
ARMS = {"base": (), "adapter": ("adapter",), "controlnet": ("controlnet",)}


def build(name: str, config: dict[str, Any] = UNET) -> nn.Module:
    """Builds a network for a UNet of this config, SDXL's by default, float32 on the current default device."""
    if name == "adapter":
        return build_adapter(AdapterOptions(), config)
    if name == "unet":
        return UNet2DConditionModel(**config)
    return ControlNetModel(**{key: value for key, value in config.items() if key not in UNET_ONLY})


def make(name: str, device: str, dtype: torch.dtype, config: dict[str, Any] = UNET) -> nn.Module:
    """Returns the network with random weights on a device."""
    return materialise(lambda: build(name, config), device, dtype).eval().requires_grad_(False)


def inputs(config: Any, latent: int, batch: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the arguments that UNet and ControlNet share."""

    def rand(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    added = {"text_embeds": rand(batch, pooled), "time_ids": rand(batch, 6)}
    return {
        "sample": rand(batch, 4, latent, latent),
        "timestep": torch.full((batch,), 500, device=device),
        "encoder_hidden_states": rand(batch, TOKENS, config["cross_attention_dim"]),
        "added_cond_kwargs": added,
    }


def forward(name: str, network: Any, latent: int, batch: int, device: str, dtype: torch.dtype) -> Callable[[], Any]:
    """Returns a call of one forward pass."""
    condition = torch.zeros(batch, 3, 8 * latent, 8 * latent, device=device, dtype=dtype)
    if name == "adapter":
        return lambda: network(condition)
    arguments = inputs(network.config, latent, batch, device, dtype)
    if name == "controlnet":
        arguments["controlnet_cond"] = condition
    return lambda: network(**arguments)


def count_flops() -> dict[str, Any]:
    """Counts on the meta device at 1024 px, batch 1."""
    rows = {}
    for name in NETWORKS:
        with torch.device("meta"):
            network = build(name).eval()
        run = forward(name, network, 128, 1, "meta", torch.float32)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        parameters = sum(parameter.numel() for parameter in network.parameters())
        rows[name] = {"parameters_m": parameters / 1e6, "tflop": counter.get_total_flops() / TERA}
    passes = 2 * STEPS
    base = passes * rows["unet"]["tflop"]
    added = {"adapter": rows["adapter"]["tflop"], "controlnet": passes * rows["controlnet"]["tflop"]}
    return {
        **rows,
        "picture": {"steps": STEPS, "passes": passes, "base_tflop": base, "added_tflop": added},
        "added_percent": {name: 100 * value / base for name, value in added.items()},
    }


def time_network(name: str, device: str, latent: int, config: dict[str, Any] = UNET) -> dict[str, float]:
    """Measures one forward pass of one sample."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    with torch.inference_mode():
        network = make(name, device, dtype, config)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        weights = sum(each.numel() * each.element_size() for each in network.parameters()) / MIB
        run = forward(name, network, latent, 1, device, dtype)
        seconds = _median_seconds(run, device)
        return {"seconds": seconds, "weights_mib": weights, "peak_mib": _peak_memory(device)}


def time_picture(arm: str, device: str, config: dict[str, Any] = UNET, steps: int = STEPS) -> dict[str, float]:
    """Measures the denoising of one picture, without text encoders and VAE, with guidance (batch 2).

    config: of the UNet on a GPU; on a CPU it is nano's.
    """
    dtype = torch.float16 if device == "cuda" else torch.float32
    with torch.inference_mode():
        networks, latent = _networks(arm, device, dtype, config)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run = _denoising(networks, latent, device, dtype, steps)
        return {"seconds": _median_seconds(run, device), "peak_mib": _peak_memory(device)}


def _networks(arm: str, device: str, dtype: torch.dtype, config: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Returns the networks of an arm, of this config on a GPU, else nano's, and the side of the latents."""
    if device == "cuda":
        return {name: make(name, device, dtype, config) for name in ("unet", *ARMS[arm])}, config["sample_size"]
    base = open_base(BaseOptions(name="nano"))
    adapter = build_adapter(AdapterOptions(), base.unet_config).eval()
    unet: Any = base.pipeline(adapter, "cpu", torch.float32).unet
    networks = {"unet": unet, **({"adapter": adapter} if arm == "adapter" else {})}
    if arm == "controlnet":
        networks["controlnet"] = ControlNetModel.from_unet(unet).eval()
    return networks, 16


def _denoising(networks: dict[str, Any], latent: int, device: str, dtype: torch.dtype, steps: int) -> Callable[[], Any]:
    unet, adapter, controlnet = (networks.get(name) for name in NETWORKS)
    assert unet is not None
    arguments = inputs(unet.config, latent, 2, device, dtype)
    condition = torch.zeros(2, 3, 8 * latent, 8 * latent, device=device, dtype=dtype)

    def picture() -> None:
        features = [torch.cat([f, f]) for f in adapter(condition[:1])] if isinstance(adapter, T2IAdapter) else None
        for _ in range(steps):
            extra: dict[str, Any] = {}
            if features is not None:
                extra["down_intrablock_additional_residuals"] = [feature.clone() for feature in features]
            if controlnet is not None:
                down, middle = controlnet(**arguments, controlnet_cond=condition, return_dict=False)
                extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            unet(**arguments, **extra)

    return picture


def _median_seconds(run: Callable[[], Any], device: str) -> float:
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _peak_memory(device: str) -> float:
    """Returns MiB: the most that was allocated on the GPU; on a CPU the most resident memory of the process, in which
    Python and torch take about 0.4 GiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _in_process(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """Runs a measurement in a process of its own, so that peaks of memory are its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return {key: float(f"{value:.4g}") for key, value in pool.submit(function, *arguments).result().items()}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--flops", action="store_true", help="count only, measure no time")
    parser.add_argument("--only", choices=("sdxl", "picture"), help="of the times, only these rows")
    options: argparse.Namespace = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device, latent = ("cuda", 128) if on_gpu else ("cpu", 32)
    rows: dict[str, Any]
    result: dict[str, Any] = {"settings": {"steps": STEPS, "device": device}, "flops": count_flops()}
    print(result["flops"], flush=True)
    if not options.flops and options.only != "picture":
        rows = {"pixels": 8 * latent, "dtype": "float16" if on_gpu else "float32"}
        for name in NETWORKS:
            rows[name] = _in_process(time_network, name, device, latent)
            print(name, rows[name], flush=True)
        result["sdxl"] = rows
    if not options.flops and options.only != "sdxl":
        rows = {"base_model": "SDXL, 1024 px" if on_gpu else "nano, 128 px"}
        for arm in ARMS:
            rows[arm] = _in_process(time_picture, arm, device)
            print(arm, rows[arm], flush=True)
        result["picture"] = rows
    write_result("inference_cost", result, options.out, on_gpu=on_gpu, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
