"""What a run over the data would take: disk by the sizes of its records, time and memory by doing a little of it."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from t2i_adapter.cache.records import caption_bytes, pack_text, stored_bytes
from t2i_adapter.cache.texts import choose_captions
from t2i_adapter.config.tree import DataOptions
from t2i_adapter.devices import release
from t2i_adapter.doctor.scan import Scan
from t2i_adapter.models.base import Base
from t2i_adapter.models.encoders import LatentEncoder, TextEncoder, encode_pixels
from t2i_adapter.types import TOKENS, text_widths

MOST_SECONDS = 30.0
"""What timing one encoder may take; no further picture is begun after it."""


@dataclass(frozen=True)
class Measured:
    """Encoding as it went on this machine.

    Attributes:
        device: where it ran.
        picture_seconds: for one crop, by the VAE.
        caption_seconds: for one caption, by both text encoders.
        peak_bytes: most memory that was in use: the device's, or on the CPU this whole process's.
    """

    device: str
    picture_seconds: float
    caption_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Needs:
    """What a run takes, and how it is known.

    Attributes:
        picture_bytes: of the cache's records of pictures, 0 where none are kept.
        caption_bytes: of captions' states, 0 where they are encoded as they come.
        captions_why: whether captions are kept, in words.
        crops: how many the VAE must encode.
        measured: None where nothing was encoded.
    """

    picture_bytes: int
    caption_bytes: int
    captions_why: str
    crops: int
    captions: int
    measured: Measured | None

    @property
    def seconds(self) -> float | None:
        """To prepare the data, of which nothing is there yet; without reading and cutting pictures."""
        if self.measured is None:
            return None
        return self.crops * self.measured.picture_seconds + self.captions * self.measured.caption_seconds


def find_needs(scan: Scan, base: Base, options: DataOptions, views: int, measured: Measured | None) -> Needs:
    """Of all rows that can be read. `views` crops are kept of each picture."""
    _, first = np.unique(scan.rows["digest"], return_index=True)
    distinct = scan.rows[first]
    distinct = distinct[distinct["is_read"]]
    count = len(scan.captions)
    kept, why = choose_captions(map(str, range(count)), options, caption_bytes(base))
    is_kept = options.cache == "disk"
    return Needs(
        picture_bytes=int(distinct["bytes"].sum()) if is_kept else 0,
        caption_bytes=0 if kept is None else count * caption_record_bytes(base),
        captions_why=why,
        crops=len(distinct) * views,
        captions=count,
        measured=measured,
    )


def caption_record_bytes(base: Base) -> int:
    """What the cache keeps of one caption, its entry in the index included."""
    text, pooled = text_widths(base.unet_config)
    states = np.zeros((TOKENS, text), np.float16)
    return stored_bytes(pack_text(states, np.zeros(pooled, np.float16), tokens=TOKENS, name="caption"))


def measure(base: Base, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> Measured:
    """Encodes a few crops, each (3,H,W) uint8, and captions, on the GPU where there is one. At least one of each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    picture_seconds = _time_pictures(base.latent_encoder(device), pictures)
    release(device)
    caption_seconds = _time_captions(base.text_encoder(device, torch.float32), captions)
    release(device)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _peak_memory()
    return Measured(device, picture_seconds, caption_seconds, peak)


def _time_pictures(vae: LatentEncoder, pictures: Sequence[np.ndarray]) -> float:
    return _each(pictures, lambda crop: encode_pixels(vae, torch.from_numpy(crop)[None].to(vae.device)).cpu())


def _time_captions(text: TextEncoder, captions: Sequence[str]) -> float:
    return _each(captions, lambda caption: text.encode([caption])[0].cpu())


def _each(items: Sequence[np.ndarray] | Sequence[str], do: Callable[..., object]) -> float:
    """Seconds for one."""
    do(items[0])  # warms up
    start, done = time.monotonic(), 0
    for item in items:
        do(item)
        done += 1
        if time.monotonic() - start > MOST_SECONDS:
            break
    return (time.monotonic() - start) / done


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
