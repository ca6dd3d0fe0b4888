"""Captions' states: whether they are kept on disk or encoded as they come, and how they are made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from t2i_adapter.cache.layout import open_folder
from t2i_adapter.cache.progress import PrepareContext, bar, batched, run_ahead
from t2i_adapter.cache.records import TEXT_VERSION, pack_text, text_key, unpack_text
from t2i_adapter.cache.shards import Shards, ShardWriter
from t2i_adapter.config.tree import DataOptions
from t2i_adapter.devices import cores_of, release, sharing_cores
from t2i_adapter.errors import UserError
from t2i_adapter.files import fingerprint, show_bytes
from t2i_adapter.models.base import Base
from t2i_adapter.models.encoders import TextEncoder
from t2i_adapter.types import TOKENS, TextRecord, text_widths

TEXT_BATCH = 32
MOST_KEPT_BYTES = 16 * 2**30
"""`text_cache auto` keeps captions' states on disk up to this size, 54,000 captions of an SDXL."""


@dataclass(frozen=True)
class Texts:
    """The captions whose states are on disk."""

    shards: Shards
    fingerprint: str

    def get(self, caption: str) -> TextRecord | None:
        """None where it is not there. Raises UserError where its file is damaged."""
        record = self.shards.get(text_key(caption, self.fingerprint))
        return None if record is None else unpack_text(record)

    def keys(self, captions: Iterable[str]) -> np.ndarray:
        """(N,32) uint8."""
        joined = b"".join(text_key(caption, self.fingerprint) for caption in captions)
        return np.frombuffer(joined, np.uint8).reshape(-1, 32)


@dataclass(frozen=True)
class CaptionTable:
    """Every sample's captions as numbers into the distinct ones, so that a draw need not ask the source.

    Attributes:
        distinct: as the source has them.
        numbers: (M,) int32, of all samples one after another.
        ends: (N,) int64, where each sample's end in `numbers`.
    """

    distinct: tuple[str, ...]
    numbers: np.ndarray
    ends: np.ndarray

    def of(self, sample: int) -> tuple[str, ...]:
        start = self.ends[sample - 1] if sample else 0
        return tuple(self.distinct[number] for number in self.numbers[start : self.ends[sample]])


def open_texts(root: Path, base: Base, dtype: torch.dtype) -> Texts:
    """The folder of states made by this base's text encoders in this arithmetic."""
    made_by = fingerprint(weights=base.text_fingerprint, dtype=dtype, version=TEXT_VERSION)
    folder = open_folder(root, "texts", made_by, {"base": base.name, "arithmetic": str(dtype).removeprefix("torch.")})
    return Texts(Shards(folder), made_by)


def caption_bytes(base: Base) -> int:
    """What one caption's states take: 77 x D and P numbers of 2 bytes."""
    text, pooled = text_widths(base.unet_config)
    return 2 * (TOKENS * text + pooled)


def choose_captions(captions: Iterable[str], options: DataOptions, each: int) -> tuple[list[str] | None, str]:
    """The distinct captions to keep on disk, or None where they are encoded as they come; and why, in one line.

    Args:
        captions: read no further than the answer needs.
        each: bytes that one caption's states take.

    Raises UserError where the options contradict each other.
    """
    if options.text_cache == "live":
        return None, "captions: encoded as they come (--data.text_cache live)"
    if options.shuffle_tags:
        if options.text_cache == "disk":
            raise UserError(
                "--data.text_cache disk: shuffled tags make a new caption at nearly every draw, and none would be "
                "found again. Take live or auto, or leave out --data.shuffle_tags."
            )
        return None, "captions: encoded as they come, for their tags are shuffled; the text encoders stay loaded"
    is_auto = options.text_cache == "auto"
    if is_auto and options.cache == "none":
        return None, "captions: encoded as they come, as pictures are (--data.cache none)"
    distinct: dict[str, None] = {}
    for caption in captions:
        distinct[caption] = None
        if is_auto and len(distinct) * each > MOST_KEPT_BYTES:
            return None, (
                f"captions: encoded as they come, for more than {len(distinct) - 1:,} at {show_bytes(each)} each would "
                f"take over {show_bytes(MOST_KEPT_BYTES)}; the text encoders stay loaded"
            )
    return list(distinct), f"captions: {len(distinct):,} distinct, {show_bytes(len(distinct) * each)} of states on disk"


def build_texts(captions: Sequence[str], texts: Texts, machine: PrepareContext) -> None:
    """Encodes the captions and appends their records."""
    encoder = machine.base.text_encoder(machine.device, machine.dtype)
    waiting = batched(bar(captions, len(captions), "encoding captions", machine.show), TEXT_BATCH)
    lanes = cores_of(machine.device)
    with ShardWriter(texts.shards.folder) as writer, sharing_cores(lanes) as encoding:
        for batch, states, pooled in run_ahead(encoding, partial(_encoded, encoder), waiting, lanes):
            for caption, state, pool in zip(batch, states, pooled, strict=True):
                tokens, name = encoder.count_tokens(caption), f"caption {caption!r}"
                writer.add(text_key(caption, texts.fingerprint), pack_text(state, pool, tokens=tokens, name=name))
    del encoder
    release(machine.device)


def _encoded(encoder: TextEncoder, captions: Sequence[str]) -> tuple[Sequence[str], np.ndarray, np.ndarray]:
    """The captions with their states (N,L,D) and pooled (N,P), float32."""
    states, pooled = (part.float().cpu().numpy() for part in encoder.encode(captions))
    return captions, states, pooled


def tell_long(texts: Texts, captions: Sequence[str]) -> Iterator[str]:
    """A line about the captions whose end the model does not see, where there are any."""
    tokens = texts.shards.tags[texts.shards.find(texts.keys(captions))]
    places = np.flatnonzero(tokens > TOKENS)
    if len(places):
        longest = captions[int(places[np.argmax(tokens[places])])]
        yield long_captions(len(places), len(captions), longest, int(tokens.max()))


def long_captions(count: int, of: int, example: str, tokens: int) -> str:
    """What a person should know of captions that are too long."""
    return (
        f"captions: {count:,} of {of:,} have more than {TOKENS} tokens, and what lies beyond is not seen. The longest "
        f"has {tokens}: {json.dumps(example[:60] + '...', ensure_ascii=False)}"
    )
