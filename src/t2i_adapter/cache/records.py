"""What is kept of a picture and of a caption, and how it lies in a shard."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import lz4.block
import numpy as np

from t2i_adapter.cache.shards import Record
from t2i_adapter.errors import UserError
from t2i_adapter.types import Geometry, ImageRecord, TextRecord

TEXT_VERSION = 2
"""Raised when the numbers that a stage computes, or the way they lie in a record, change, so that older records are not
taken for its own."""

WORTH_PACKING = 0.9  # of its size, or it is kept as it is and read without a copy


def text_key(caption: str, text_fingerprint: str) -> bytes:
    """32 bytes that name a caption's record."""
    return hashlib.sha256(f"{text_fingerprint}\0{caption}".encode()).digest()


def view_keys(digests: np.ndarray, view: int) -> np.ndarray:
    """Keys (N,32) of one view's image records, from the pictures' digests (N,32) uint8: the view takes the place of
    the last byte, and 31 bytes of a sha256 tell pictures apart as well as 32 do."""
    keys = digests.copy()
    keys[:, -1] = view
    return keys


def pack_image(moments: np.ndarray, condition: np.ndarray, geometry: Geometry, *, name: str) -> Record:
    """moments (8,h,w) float, condition (C,H,W) u8. `name` is for messages. Raises UserError on overflow."""
    return image_record(moments, pack_condition(condition), geometry, name=name)


def image_record(moments: np.ndarray, condition: PackedCondition, geometry: Geometry, *, name: str) -> Record:
    """As `pack_image`, of a condition that is packed already. The tag is the crop's size (`size_of_tag`)."""
    height, width = geometry.target
    facts = {"geometry": asdict(geometry), "condition": condition.packing}
    return Record({"moments": to_half(moments, name), "condition": condition.stored}, facts, tag=height << 16 | width)


def unpack_image(record: Record, key: str) -> ImageRecord:
    facts = record.facts["geometry"]
    pairs = {name: tuple(value) for name, value in facts.items() if name != "flipped"}
    condition = unpack_condition(record.arrays["condition"], record.facts["condition"])
    return ImageRecord(key, record.arrays["moments"], condition, Geometry(**pairs, flipped=facts["flipped"]))


def size_of_tag(tag: int) -> tuple[int, int]:
    """(height, width) in pixels of an image record's crop."""
    return tag >> 16, tag & 0xFFFF


class PackedCondition(NamedTuple):
    """Bytes (n,) u8, and what `unpack_condition` must know of them."""

    stored: np.ndarray
    packing: dict[str, Any]


def pack_condition(condition: np.ndarray) -> PackedCondition:
    """Of a condition (C,H,W) u8, lossless.

    Made to be read fast: what is grey in three channels is kept as one, what has two values as bits, and the rest goes
    through LZ4 where that makes it smaller.
    """
    channels, height, width = condition.shape
    is_grey = channels == 3 and all(np.array_equal(condition[0], other) for other in condition[1:])
    plane = np.ascontiguousarray(condition[:1] if is_grey else condition)
    low, high = int(plane.min()), int(plane.max())
    levels = [low, high] if ((plane == low) | (plane == high)).all() else None
    plain = np.packbits(plane == high) if levels and low < high else plane.reshape(-1)
    packed = np.frombuffer(lz4.block.compress(plain, store_size=False), np.uint8)
    is_packed = packed.nbytes < WORTH_PACKING * plain.nbytes
    packing = {
        "shape": [len(plane), height, width],
        "channels": channels,
        "levels": levels,
        "unpacked_bytes": plain.nbytes if is_packed else None,
    }
    return PackedCondition(packed if is_packed else plain, packing)


def unpack_condition(stored: np.ndarray, packing: Mapping[str, Any]) -> np.ndarray:
    """(C,H,W) u8, read-only. Three equal channels are one in memory."""
    if packing["unpacked_bytes"] is not None:
        plain = lz4.block.decompress(stored, uncompressed_size=packing["unpacked_bytes"])
        stored = np.frombuffer(plain, np.uint8)
    shape, levels = packing["shape"], packing["levels"]
    if levels and levels[0] < levels[1]:
        stored = np.unpackbits(stored, count=shape[0] * shape[1] * shape[2])
        stored *= np.uint8(levels[1] - levels[0])
        stored += np.uint8(levels[0])
    plane = stored.reshape(shape)
    return np.broadcast_to(plane, (packing["channels"], *shape[1:]))


def pack_text(states: np.ndarray, pooled: np.ndarray, *, tokens: int, name: str) -> Record:
    """states (L,D) and pooled (P,), float. The tag is the caption's number of tokens, start and end included.

    `name` is for messages. Raises UserError on overflow.
    """
    return Record({"states": to_half(states, name), "pooled": to_half(pooled, name)}, tag=tokens)


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
