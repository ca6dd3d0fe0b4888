"""Cache of the UNet's training samples: latents, text states and time ids, in shards of numpy files."""

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
from t2i_adapter.files import move_atomic

SHARD = 2048
_CHUNK = 64  # samples encoded at a time


@dataclass(frozen=True)
class Picture:
    """One training sample before it is encoded."""

    image: np.ndarray  # (H,W,3) uint8
    caption: str
    time_ids: tuple[int, ...]


class Samples:
    """The samples of all shards of a folder, as memory maps that the processes share."""

    FIELDS = ("latents", "states", "pooled", "time_ids")

    def __init__(self, folder: Path) -> None:
        shards = sorted(p for p in folder.iterdir() if p.is_dir() and p.suffix != ".tmp")
        self.columns = {f: [np.load(shard / f"{f}.npy", mmap_mode="r") for shard in shards] for f in self.FIELDS}

    def __len__(self) -> int:
        return SHARD * len(self.columns["latents"])

    def take(self, indices: np.ndarray, device: torch.device) -> dict[str, Tensor]:
        """Returns {field: (B, ...)} float32 of the samples at `indices`."""
        return {
            field: torch.from_numpy(np.stack([shards[i // SHARD][i % SHARD] for i in indices])).float().to(device)
            for field, shards in self.columns.items()
        }


def build(folder: Path, count: int, picture: Callable[[int], Picture], vae: AutoencoderKL, text: TextModels) -> None:
    """Writes this process's share of the missing shards of `count` samples. picture(i) returns sample i."""
    for number in range(rank(), -(-count // SHARD), world()):
        shard = folder / f"{number:04d}"
        if shard.exists():
            continue
        temporary = shard.with_suffix(".tmp")
        temporary.mkdir(parents=True, exist_ok=True)
        for field, values in _encode(number, picture, vae, text).items():
            np.save(temporary / f"{field}.npy", values)
        move_atomic(temporary, shard)
        print(f"cache: shard {number} of {SHARD} samples", flush=True)


@torch.no_grad()
def _encode(
    number: int, picture: Callable[[int], Picture], vae: AutoencoderKL, text: TextModels
) -> dict[str, np.ndarray]:
    """Returns {field: (SHARD, ...)} of one shard. The rounding of float16 is below the noise that the VAE learned."""
    chunks: dict[str, list[np.ndarray]] = {field: [] for field in Samples.FIELDS}
    for start in range(number * SHARD, (number + 1) * SHARD, _CHUNK):
        batch = [picture(i) for i in range(start, start + _CHUNK)]
        images = to_tensor(np.stack([p.image for p in batch])).to(vae.device)
        latents = vae.encode(images).latent_dist.mean  # pyright: ignore[reportAttributeAccessIssue]
        states, pooled = text.encode([p.caption for p in batch])
        chunks["latents"].append((latents * vae.config["scaling_factor"]).half().cpu().numpy())
        chunks["states"].append(states.half().cpu().numpy())
        chunks["pooled"].append(pooled.half().cpu().numpy())
        chunks["time_ids"].append(np.asarray([p.time_ids for p in batch], np.float32))
    return {field: np.concatenate(parts) for field, parts in chunks.items()}


def native_time_ids() -> tuple[int, ...]:
    """Returns the six time ids that the pipelines pass by default."""
    return pictures.whole(pictures.NATIVE).time_ids(pictures.NATIVE)
