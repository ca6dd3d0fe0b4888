"""The text states of captions in the cache: whether to store them, how they are encoded, how they are read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from t2i_adapter.cache.context import PrepareContext, in_batches, open_folder, run_ahead
from t2i_adapter.cache.records import TEXT_VERSION, pack_text, text_key, unpack_text
from t2i_adapter.cache.shards import Shards, ShardWriter
from t2i_adapter.config.tree import DataOptions
from t2i_adapter.devices import cores_of, release, sharing_cores
from t2i_adapter.errors import UserError, flag
from t2i_adapter.files import fingerprint, show_bytes
from t2i_adapter.models.base import Base
from t2i_adapter.models.encoders import TextEncoder
from t2i_adapter.types import TOKENS, TextRecord

TEXT_BATCH = 32
MAX_AUTO_BYTES = 16 * 2**30
"""`text_cache auto` stores text states up to this size: 54,000 captions of SDXL."""


@dataclass(frozen=True)
class Texts:
    """Reads the text states in the cache by caption."""

    shards: Shards
    fingerprint: str

    def get(self, caption: str) -> TextRecord | None:
        """None if the caption has no record. Raises UserError if its file is damaged."""
        record = self.shards.get(text_key(caption, self.fingerprint))
        return None if record is None else unpack_text(record)

    def keys(self, captions: Iterable[str]) -> np.ndarray:
        """(N,32) uint8."""
        joined = b"".join(text_key(caption, self.fingerprint) for caption in captions)
        return np.frombuffer(joined, np.uint8).reshape(-1, 32)


@dataclass(frozen=True)
class CaptionTable:
    """Every sample's captions, as indices into the distinct captions, so that a draw need not read the source.

    Attributes:
        distinct: captions as in the source, without the prefix.
        numbers: (M,) int32, the captions of all samples one after another.
        ends: (N,) int64, where each sample's captions end in `numbers`.
    """

    distinct: tuple[str, ...]
    numbers: np.ndarray
    ends: np.ndarray

    def of(self, sample: int) -> tuple[str, ...]:
        start = self.ends[sample - 1] if sample else 0
        return tuple(self.distinct[number] for number in self.numbers[start : self.ends[sample]])


def open_texts(root: Path, base: Base, dtype: torch.dtype) -> Texts:
    """Opens the folder of states made by this base's text encoders in this dtype."""
    made_by = fingerprint(weights=base.text_fingerprint, dtype=dtype, version=TEXT_VERSION)
    folder = open_folder(root, "texts", made_by, {"base": base.name, "arithmetic": str(dtype).removeprefix("torch.")})
    return Texts(Shards(folder), made_by)


def choose_captions(captions: Iterable[str], options: DataOptions, each: int) -> tuple[list[str] | None, str]:
    """The distinct captions to store, or None if captions are encoded when they are drawn; and a line for the log.

    Args:
        captions: read only as far as needed for the decision.
        each: bytes of one caption's states.

    Raises UserError if the options contradict each other.
    """
    if options.text_cache == "live":
        return None, "captions: encoded when drawn (--data.text_cache live)"
    if options.shuffle_tags:
        if options.text_cache == "disk":
            raise UserError(
                "disk: shuffled tags make a new caption at nearly every draw, which is never in the cache. Use live or "
                f"auto, or switch off {flag('data.shuffle_tags')}.",
                option="data.text_cache",
            )
        return None, "captions: encoded when drawn, because their tags are shuffled; the text encoders stay loaded"
    is_auto = options.text_cache == "auto"
    if is_auto and options.cache == "none":
        return None, "captions: encoded when drawn, like the pictures (--data.cache none)"
    distinct: dict[str, None] = {}
    for caption in captions:
        distinct[caption] = None
        if is_auto and len(distinct) * each > MAX_AUTO_BYTES:
            return None, (
                f"captions: encoded when drawn, because more than {len(distinct) - 1:,} captions at {show_bytes(each)} "
                f"would take over {show_bytes(MAX_AUTO_BYTES)} of disk; the text encoders stay loaded"
            )
    return list(distinct), f"captions: {len(distinct):,} distinct, {show_bytes(len(distinct) * each)} of states on disk"


def build_texts(captions: Sequence[str], texts: Texts, context: PrepareContext) -> None:
    """Encodes the captions and appends their records."""
    encoder = context.base.text_encoder(context.device, context.dtype)
    batches = in_batches(context.bar(captions, len(captions), "encoding captions"), TEXT_BATCH)
    threads = cores_of(context.device)
    with ShardWriter(texts.shards.folder) as writer, sharing_cores(threads) as pool:
        for batch, states, pooled in run_ahead(pool, partial(_encoded, encoder), batches, threads):
            for caption, state, vector in zip(batch, states, pooled, strict=True):
                tokens, name = encoder.count_tokens(caption), f"caption {caption!r}"
                writer.add(text_key(caption, texts.fingerprint), pack_text(state, vector, tokens=tokens, name=name))
    del encoder
    release(context.device)


def _encoded(encoder: TextEncoder, captions: Sequence[str]) -> tuple[Sequence[str], np.ndarray, np.ndarray]:
    """The captions with their states (N,L,D) and pooled (N,P), float32."""
    states, pooled = (part.float().cpu().numpy() for part in encoder.encode(captions))
    return captions, states, pooled


def warn_of_long(texts: Texts, captions: Sequence[str]) -> Iterator[str]:
    """A line for the log if some captions are cut off at 77 tokens."""
    tokens = texts.shards.tags[texts.shards.find(texts.keys(captions))]
    places = np.flatnonzero(tokens > TOKENS)
    if len(places):
        longest = captions[int(places[np.argmax(tokens[places])])]
        yield long_captions(len(places), len(captions), longest, int(tokens.max()))


def long_captions(count: int, total: int, longest: str, tokens: int) -> str:
    """The line about captions that are cut off."""
    return (
        f"captions: {count:,} of {total:,} have more than {TOKENS} tokens; the rest is cut off. The longest has "
        f"{tokens}: {json.dumps(longest[:60] + '...', ensure_ascii=False)}"
    )
