"""What is kept of a picture and of a caption, and how it lies in a shard."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from t2i_adapter.cache.shards import Record
from t2i_adapter.errors import UserError
from t2i_adapter.types import Geometry

IMAGE_VERSION = 1
TEXT_VERSION = 1
"""Raised when the numbers that a stage computes change, so that older records are not taken for its own."""


@dataclass(frozen=True)
class ImageRecord:
    """The facts of one training pair.

    Attributes:
        key: names the row for people.
        moments: (8,h,w) float16, mean and standard deviation of the VAE's posterior, before scaling.
        condition: (C,H,W) uint8.
        geometry: where the crop lies on the original picture.
        captions: keys of the pair's captions in the text records, one or more.
    """

    key: str
    moments: np.ndarray
    condition: np.ndarray
    geometry: Geometry
    captions: tuple[str, ...]


@dataclass(frozen=True)
class TextRecord:
    """The facts of one caption: states (L,D) float16 and pooled (P,) float16."""

    states: np.ndarray
    pooled: np.ndarray


def fingerprint(**parts: Any) -> str:
    """A short name for a folder of records that were made alike: sha256 over the named parts."""
    text = "\n".join(f"{name}={parts[name]}" for name in sorted(parts))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def text_key(caption: str, text_fingerprint: str) -> str:
    return hashlib.sha256(f"{text_fingerprint}\0{caption}".encode()).hexdigest()


def pack_image(moments: np.ndarray, condition: np.ndarray, geometry: Geometry, *, name: str) -> Record:
    """The condition is kept lossless, compressed. `name` is for messages. Raises UserError on overflow."""
    packed = np.frombuffer(zlib.compress(np.ascontiguousarray(condition).tobytes(), 1), np.uint8)
    facts = {"geometry": asdict(geometry), "condition_shape": list(condition.shape)}
    return Record({"moments": to_half(moments, name), "condition": packed}, facts)


def unpack_image(record: Record, key: str, captions: tuple[str, ...]) -> ImageRecord:
    facts = record.facts
    condition = np.frombuffer(zlib.decompress(record.arrays["condition"].data), np.uint8)
    geometry = Geometry(**{name: (pair[0], pair[1]) for name, pair in facts["geometry"].items()})
    moments = record.arrays["moments"]
    return ImageRecord(key, moments, condition.reshape(facts["condition_shape"]), geometry, captions)


def pack_text(states: np.ndarray, pooled: np.ndarray, *, name: str) -> Record:
    """`name` is for messages. Raises UserError on overflow."""
    return Record({"states": to_half(states, name), "pooled": to_half(pooled, name)})


def unpack_text(record: Record) -> TextRecord:
    return TextRecord(record.arrays["states"], record.arrays["pooled"])


def to_half(values: np.ndarray, name: str) -> np.ndarray:
    """float16: the same values to 11 bits. Sound encoders stay far inside its range."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise UserError(
            f"{name}: its encoder gave numbers that are not finite or beyond 65504. The base's weights are damaged, or "
            "they overflow in fp16: take another --mixed_precision or another VAE."
        )
    return half
