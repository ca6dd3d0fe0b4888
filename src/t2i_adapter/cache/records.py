"""How the moments of a picture, its condition and the states of a caption are laid out as records of a shard.

Also: the keys by which records are found, and how many bytes a record takes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import lz4.block
import numpy as np

from t2i_adapter.cache.shard_file import INDEX, Record, pack
from t2i_adapter.errors import UserError, flag
from t2i_adapter.types import CHUNK, CHUNK_TOKENS, Geometry, ImageRecord, TextRecord, text_widths

if TYPE_CHECKING:
    from t2i_adapter.models.base import Base

TEXT_VERSION = 2
"""Raise it if the numbers of a text record or their layout change: then older records are not used any more."""

_VAE = "the VAE", f"Its weights are damaged or it overflows: name another with {flag('base.vae')}."
_TEXT = (
    "the text encoders",
    f"Their weights are damaged, or they overflow in fp16: name another base with {flag('base.name')}, or use "
    f"{flag('train.mixed_precision')} bf16.",
)
"""What encodes, and the advice if its result is NaN or inf."""

_SPECIAL_TOKENS = 2
"""Start and end, which the tag of a text record counts."""

MAX_PACKED = 0.9
"""LZ4 is used if it reaches this share of the size. Otherwise the bytes are stored as they are and read without a
copy."""


def add_prefix(caption: str, prefix: str) -> str:
    """The caption as the text encoders read it: the empty caption gets no prefix."""
    return prefix + caption if caption else ""


def text_key(caption: str, text_fingerprint: str) -> bytes:
    """Key (32 bytes) of a caption's record."""
    return hashlib.sha256(f"{text_fingerprint}\0{caption}".encode()).digest()


def view_keys(digests: np.ndarray, view: int) -> np.ndarray:
    """Keys (N,32) of one view's image records, from the digests (N,32) uint8 of the pictures.

    The view replaces the last byte: the other 31 bytes of a sha256 distinguish pictures as well.
    """
    keys = digests.copy()
    keys[:, -1] = view
    return keys


def pack_image(moments: np.ndarray, condition: np.ndarray, geometry: Geometry, *, name: str) -> Record:
    """moments (8,h,w) float, condition (C,H,W) u8. `name` is for messages. Raises UserError of kind "nan"."""
    return image_record(moments, pack_condition(condition), geometry, name=name)


def image_record(moments: np.ndarray, condition: PackedCondition, geometry: Geometry, *, name: str) -> Record:
    """`pack_image` for a condition that is packed already. The tag is the crop's size (`size_of_tag`)."""
    height, width = geometry.target
    facts = {"geometry": asdict(geometry), "condition": condition.packing}
    return Record(
        {"moments": to_half(moments, name, _VAE), "condition": condition.stored}, facts, tag=height << 16 | width
    )


def unpack_image(record: Record) -> ImageRecord:
    facts = record.facts["geometry"]
    pairs = {name: tuple(value) for name, value in facts.items() if name != "flipped"}
    condition = unpack_condition(record.arrays["condition"], record.facts["condition"])
    return ImageRecord(record.arrays["moments"], condition, Geometry(**pairs, flipped=facts["flipped"]))


def size_of_tag(tag: int) -> tuple[int, int]:
    """(height, width) in pixels of an image record's crop."""
    return tag >> 16, tag & 0xFFFF


class PackedCondition(NamedTuple):
    """Bytes (n,) u8, and what `unpack_condition` needs to read them."""

    stored: np.ndarray
    packing: dict[str, Any]


def pack_condition(condition: np.ndarray) -> PackedCondition:
    """Packs a condition (C,H,W) u8 without loss.

    The packing is fast to read: three equal channels are stored as one, two values as bits, and the bytes are
    compressed by LZ4 if that makes them smaller.
    """
    channels, height, width = condition.shape
    is_grey = channels == 3 and all(np.array_equal(condition[0], other) for other in condition[1:])
    plane = np.ascontiguousarray(condition[:1] if is_grey else condition)
    low, high = int(plane.min()), int(plane.max())
    levels = [low, high] if ((plane == low) | (plane == high)).all() else None
    plain = np.packbits(plane == high) if levels and low < high else plane.reshape(-1)
    packed = np.frombuffer(lz4.block.compress(plain, store_size=False), np.uint8)
    is_packed = packed.nbytes < MAX_PACKED * plain.nbytes
    packing = {
        "shape": [len(plane), height, width],
        "channels": channels,
        "levels": levels,
        "unpacked_bytes": plain.nbytes if is_packed else None,
    }
    return PackedCondition(packed if is_packed else plain, packing)


def unpack_condition(stored: np.ndarray, packing: Mapping[str, Any]) -> np.ndarray:
    """(C,H,W) u8, read-only. Three equal channels share one channel's memory."""
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
    """states (77 n,D) of a caption's n chunks and pooled (P,), float. The tag holds the caption's number of tokens
    (`tokens_of_tags`).

    `name` is for messages. Raises UserError of kind "nan".
    """
    arrays = {"states": to_half(states, name, _TEXT), "pooled": to_half(pooled, name, _TEXT)}
    return Record(arrays, tag=tokens + _SPECIAL_TOKENS)


def unpack_text(record: Record, length: int = CHUNK) -> TextRecord:
    """The states in the record, repeated to `length` positions (`types.text_length`)."""
    states = record.arrays["states"]
    repeats = length // len(states)
    return TextRecord(np.tile(states, (repeats, 1)) if repeats > 1 else states, record.arrays["pooled"])


def tokens_of_tags(tags: np.ndarray) -> np.ndarray:
    """Number of tokens of each caption, start and end excluded, from the tags of text records."""
    return tags - _SPECIAL_TOKENS


def to_half(values: np.ndarray, name: str, encoder: tuple[str, str]) -> np.ndarray:
    """The values in float16, which keeps 11 bits. Raises UserError if one is NaN, inf or beyond float16's range.

    encoder: what made them, and what to do about it (_VAE, _TEXT).
    """
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        what, advice = encoder
        raise UserError(f"{name}: {what} returned NaN, inf or numbers beyond 65504. {advice}", kind="nan")
    return half


def check_moments(moments: np.ndarray, names: Sequence[str]) -> None:
    """Raises UserError that names the first picture whose moments, of (B,8,h,w), are NaN or inf."""
    for values, name in zip(moments, names, strict=True):
        to_half(values, name, _VAE)


def check_states(states: np.ndarray, pooled: np.ndarray, captions: Sequence[str]) -> None:
    """Raises UserError that names the first caption whose states (N,L,D) or pooled (N,P) are NaN or inf."""
    for state, vector, caption in zip(states, pooled, captions, strict=True):
        for values in (state, vector):
            to_half(values, f"caption {caption!r}", _TEXT)


def picture_bytes(resolution: int, channels: int = 0) -> int:
    """Bytes of one crop of `resolution` squared pixels: moments, and a condition of `channels` before it is packed."""
    return 2 * 8 * (resolution // 8) ** 2 + channels * resolution**2


def caption_bytes(base: Base, max_tokens: int = CHUNK_TOKENS) -> int:
    """Bytes of the states and the pooled vector (P,), in float16, of a caption that fills the chunks of `max_tokens`
    tokens. A shorter caption has fewer chunks."""
    text, pooled = text_widths(base.unet_config)
    return 2 * (max_tokens // CHUNK_TOKENS * CHUNK * text + pooled)


def stored_bytes(record: Record) -> int:
    """Bytes that a record takes on the disk, its entry in the index included."""
    return sum(map(len, pack(record))) + INDEX.itemsize
