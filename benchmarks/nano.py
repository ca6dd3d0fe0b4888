"""Speed of the embedded base: sampling, and the pass that an adapter is trained by.

    python benchmarks/nano.py [--threads CORES] [--rounds 5] [--out benchmarks/nano.json]

Measured, as the median and the range over the rounds, after one round that is left out:
  pictures_per_s       20 steps, guidance 3, at batch 1 and 16, with decoding
  training_samples_per_s   UNet forward and backward to the adapter's features, UNet frozen, at batch 16 and 32
  load_s               StableDiffusionXLPipeline.from_pretrained
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, T2IAdapter

from t2i_adapter.models import nano

SIDE, STEPS, GUIDANCE = 128, 20, 3.0
PROMPT = "red circle with blue background"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = StableDiffusionXLPipeline.from_pretrained(nano.path())
    base.set_progress_bar_config(disable=True)
    result = {
        "command": f"python benchmarks/nano.py --threads {options.threads} --rounds {options.rounds}",
        "date": date.today().isoformat(),
        "machine": {"processor": _processor(), "threads": options.threads, "load_before": os.getloadavg()[0]},
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "load_s": _rates(
            lambda: StableDiffusionXLPipeline.from_pretrained(nano.path()), 1, options.rounds, inverse=True
        ),
        "pictures_per_s": {n: _rates(lambda n=n: _sample(base, n), n, options.rounds) for n in (1, 16)},
        "training_samples_per_s": {n: _rates(_training_pass(base, n), n, options.rounds) for n in (16, 32)},
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def _sample(base: StableDiffusionXLPipeline, count: int) -> None:
    base([PROMPT] * count, height=SIDE, width=SIDE, num_inference_steps=STEPS, guidance_scale=GUIDANCE)


def _training_pass(base: StableDiffusionXLPipeline, count: int) -> Callable[[], None]:
    """One step of an adapter's training but for the optimiser: the base's part and that of a small adapter."""
    unet = base.unet.requires_grad_(False)
    channels = list(unet.config["block_out_channels"])
    adapter = T2IAdapter(
        in_channels=3, channels=[*channels, channels[-1]], downscale_factor=16, adapter_type="full_adapter_xl"
    )
    with torch.no_grad():
        states, _, pooled, _ = base.encode_prompt(
            PROMPT, num_images_per_prompt=count, do_classifier_free_guidance=False
        )
    conditions = {"text_embeds": pooled, "time_ids": torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * count)}
    latents, picture = torch.randn(count, 4, SIDE // 8, SIDE // 8), torch.rand(count, 3, SIDE, SIDE)
    timesteps = torch.randint(0, 1000, (count,))

    def step() -> None:
        predicted = unet(
            latents,
            timesteps,
            states,
            added_cond_kwargs=conditions,
            down_intrablock_additional_residuals=list(adapter(picture)),
        ).sample
        (predicted - latents).square().mean().backward()

    return step


def _rates(work: Callable[[], Any], count: int, rounds: int, inverse: bool = False) -> dict[str, Any]:
    """Items per second, or seconds per item, of each round; the first one warms up."""
    work()
    values = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
        values.append(round(seconds / count if inverse else count / seconds, 3))
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if (info.exists())
        else []
    )
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
