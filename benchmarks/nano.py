"""Measures the speed of the embedded base: sampling, and forward and backward of an adapter's training step.

    python benchmarks/nano.py [--threads CORES] [--rounds 5]

Measured, as the median and the range over the rounds after one round of warm-up:
  pictures_per_s          20 steps, guidance 3, at batch 1 and 16, with decoding
  training_samples_per_s  forward and backward of the frozen UNet and an adapter, at batch 16 and 32
  load_s                  StableDiffusionXLPipeline.from_pretrained
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import make_parser, write_result
from diffusers import StableDiffusionXLPipeline, T2IAdapter

from t2i_adapter.models import nano

SIDE, STEPS, GUIDANCE = 128, 20, 3.0
PROMPT = "red circle with blue background"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = StableDiffusionXLPipeline.from_pretrained(nano.path())
    base.set_progress_bar_config(disable=True)
    result = {
        "command": f"python benchmarks/nano.py --threads {options.threads} --rounds {options.rounds}",
        "load_s": _rates(
            lambda: StableDiffusionXLPipeline.from_pretrained(nano.path()), 1, options.rounds, inverse=True
        ),
        "pictures_per_s": {n: _rates(lambda n=n: _sample(base, n), n, options.rounds) for n in (1, 16)},
        "training_samples_per_s": {n: _rates(_training_pass(base, n), n, options.rounds) for n in (16, 32)},
    }
    write_result("nano", result, options.out, threads=options.threads)
    for name in ("load_s", "pictures_per_s", "training_samples_per_s"):
        print(name, result[name])


def _sample(base: StableDiffusionXLPipeline, count: int) -> None:
    base([PROMPT] * count, height=SIDE, width=SIDE, num_inference_steps=STEPS, guidance_scale=GUIDANCE)


def _training_pass(base: StableDiffusionXLPipeline, count: int) -> Callable[[], None]:
    """Forward and backward of a training step without the optimiser: the base and a small adapter."""
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
    """Items a second, or with `inverse` seconds an item: median and range over the rounds, after one of warm-up."""
    work()
    values = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
        values.append(round(seconds / count if inverse else count / seconds, 3))
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


if __name__ == "__main__":
    main()
