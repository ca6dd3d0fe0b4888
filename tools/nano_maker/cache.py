"""Training samples for the UNet: latents, text states and time ids, computed once, in shards on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from nano_maker import pictures
from nano_maker.run import rank, world
from nano_maker.text import TextModels
from nano_maker.vae import to_tensor

SHARD = 2048
_CHUNK = 64  # samples encoded at a time


@dataclass(frozen=True)
class Drawn:
    """One training sample before encoding."""

    image: np.ndarray  # (H,W,3) uint8
    caption: str
    time_ids: tuple[int, ...]


class Samples:
    """All shards in a folder, read through memory maps that the processes share."""

    FIELDS = ("latents", "states", "pooled", "time_ids")

    def __init__(self, folder: Path) -> None:
        shards = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.endswith(".new"))
        self.columns = {f: [np.load(shard / f"{f}.npy", mmap_mode="r") for shard in shards] for f in self.FIELDS}

    def __len__(self) -> int:
        return SHARD * len(self.columns["latents"])

    def take(self, indices: np.ndarray, device: torch.device) -> dict[str, Tensor]:
        """{field: (B, ...)} float32."""
        return {
            field: torch.from_numpy(np.stack([shards[i // SHARD][i % SHARD] for i in indices])).float().to(device)
            for field, shards in self.columns.items()
        }


def build(folder: Path, count: int, draw: Callable[[int], Drawn], vae: AutoencoderKL, text: TextModels) -> None:
    """Make the shards that are missing for `count` samples, this process's share of them."""
    for number in range(rank(), -(-count // SHARD), world()):
        shard = folder / f"{number:04d}"
        if shard.exists():
            continue
        fresh = folder / f"{number:04d}.new"
        fresh.mkdir(parents=True, exist_ok=True)
        for field, values in _encode(number, draw, vae, text).items():
            np.save(fresh / f"{field}.npy", values)
        fresh.rename(shard)
        print(f"cache: shard {number} of {SHARD} samples", flush=True)


@torch.no_grad()
def _encode(number: int, draw: Callable[[int], Drawn], vae: AutoencoderKL, text: TextModels) -> dict[str, np.ndarray]:
    """{field: (SHARD, ...)} of one shard; half precision is finer than the noise that the VAE was trained with."""
    chunks: dict[str, list[np.ndarray]] = {field: [] for field in Samples.FIELDS}
    for start in range(number * SHARD, (number + 1) * SHARD, _CHUNK):
        drawn = [draw(i) for i in range(start, start + _CHUNK)]
        images = to_tensor(np.stack([d.image for d in drawn])).to(vae.device)
        latents = vae.encode(images).latent_dist.mean  # pyright: ignore[reportAttributeAccessIssue]
        states, pooled = text.encode([d.caption for d in drawn])
        chunks["latents"].append((latents * vae.config["scaling_factor"]).half().cpu().numpy())
        chunks["states"].append(states.half().cpu().numpy())
        chunks["pooled"].append(pooled.half().cpu().numpy())
        chunks["time_ids"].append(np.asarray([d.time_ids for d in drawn], np.float32))
    return {field: np.concatenate(parts) for field, parts in chunks.items()}


def native_time_ids() -> tuple[int, ...]:
    """(6,): what the pipelines pass when nothing is said."""
    return pictures.whole(pictures.NATIVE).time_ids(pictures.NATIVE)
