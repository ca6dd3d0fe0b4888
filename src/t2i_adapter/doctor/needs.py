"""Predicts what a training run over the dataset takes: disk from the sizes of its records, time and memory by a test.

The test encodes a few rows with the base on this machine.
"""

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
from t2i_adapter.devices import choose_device, peak_bytes, release, reset_peak
from t2i_adapter.doctor.scan import Scan
from t2i_adapter.models.base import Base
from t2i_adapter.models.encoders import LatentEncoder, TextEncoder, encode_pixels
from t2i_adapter.types import CHUNK, CHUNK_TOKENS, count_chunks, text_widths

MAX_SECONDS = 30.0
"""After so long no further item is encoded."""


@dataclass(frozen=True)
class Measured:
    """Time and memory of encoding on this machine.

    Attributes:
        device: the device that encoded, such as "cpu" or "cuda".
        picture_seconds: the VAE's time for one crop.
        caption_seconds: the text encoders' time for one caption.
        peak_bytes: peak memory of the GPU, or on the CPU of the whole process.
    """

    device: str
    picture_seconds: float
    caption_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Needs:
    """What a run over all readable rows takes.

    Attributes:
        picture_bytes: size of the pictures' records in the cache; 0 if there is no cache.
        caption_bytes: size of the captions' records; 0 if captions are encoded in each step.
        captions_why: a sentence that explains whether captions are cached.
        crops: crops that the VAE encodes.
        captions: captions that the text encoders encode.
        measured: None if nothing was encoded.
    """

    picture_bytes: int
    caption_bytes: int
    captions_why: str
    crops: int
    captions: int
    measured: Measured | None

    @property
    def seconds(self) -> float | None:
        """Seconds to encode the dataset with an empty cache, without reading and cropping; None if not measured."""
        if self.measured is None:
            return None
        return self.crops * self.measured.picture_seconds + self.captions * self.measured.caption_seconds


def predict_needs(scan: Scan, base: Base, options: DataOptions, views: int, measured: Measured | None) -> Needs:
    """Predicts for all readable rows. views: crops that are cached of each picture."""
    _, first = np.unique(scan.rows["digest"], return_index=True)
    distinct = scan.rows[first]
    distinct = distinct[distinct["is_read"]]
    count = len(scan.captions)
    cached, why = choose_captions(map(str, range(count)), options, caption_bytes(base, options.max_tokens))
    tokens, numbers = np.unique(np.minimum(scan.caption_tokens, options.max_tokens), return_counts=True)
    sizes = [caption_record_bytes(base, count_chunks(int(one), options.max_tokens)) for one in tokens]
    return Needs(
        picture_bytes=int(distinct["bytes"].sum()) if options.cache == "disk" else 0,
        caption_bytes=0 if cached is None else int(np.dot(sizes, numbers)),
        captions_why=why,
        crops=len(distinct) * views,
        captions=count,
        measured=measured,
    )


def caption_record_bytes(base: Base, chunks: int = 1) -> int:
    """Bytes of the record of a caption of so many chunks in the cache, with its entry in the index."""
    width, pooled = text_widths(base.unet_config)
    states = np.zeros((chunks * CHUNK, width), np.float16)
    tokens = chunks * CHUNK_TOKENS
    return stored_bytes(pack_text(states, np.zeros(pooled, np.float16), tokens=tokens, name="caption"))


def time_encoders(base: Base, crops: Sequence[np.ndarray], captions: Sequence[str], max_tokens: int) -> Measured:
    """Encodes crops, each (3,H,W) uint8, and captions, on the GPU if there is one. It needs at least one of each."""
    device = choose_device()
    reset_peak(device)
    picture_seconds = _time_pictures(base.latent_encoder(device), crops)
    release(device)
    caption_seconds = _time_captions(base.text_encoder(device, torch.float32), captions, max_tokens)
    release(device)
    peak = peak_bytes(device)
    return Measured(device, picture_seconds, caption_seconds, _peak_memory() if peak is None else peak)


def _time_pictures(vae: LatentEncoder, crops: Sequence[np.ndarray]) -> float:
    return _seconds_each(crops, lambda crop: encode_pixels(vae, torch.from_numpy(crop)[None].to(vae.device)).cpu())


def _time_captions(text: TextEncoder, captions: Sequence[str], max_tokens: int) -> float:
    return _seconds_each(captions, lambda caption: text.encode([caption], max_tokens)[0].cpu())


def _seconds_each(items: Sequence[np.ndarray] | Sequence[str], encode: Callable[..., object]) -> float:
    encode(items[0])  # warm-up
    start, done = time.monotonic(), 0
    for item in items:
        encode(item)
        done += 1
        if time.monotonic() - start > MAX_SECONDS:
            break
    return (time.monotonic() - start) / done


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
