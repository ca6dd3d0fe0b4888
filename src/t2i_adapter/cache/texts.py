"""The text states of captions in the cache: whether to store them, how they are encoded, how they are read."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from t2i_adapter.cache.context import PrepareContext, in_batches, run_ahead
from t2i_adapter.cache.records import TEXT_VERSION, pack_text, text_key, tokens_of_tags, unpack_text
from t2i_adapter.cache.shards import Shards
from t2i_adapter.config.tree import DataOptions
from t2i_adapter.devices import cores_of, release, sharing_cores
from t2i_adapter.errors import UserError, flag
from t2i_adapter.files import fingerprint, show_bytes
from t2i_adapter.models.encoders import TextEncoder
from t2i_adapter.types import CHUNK, CHUNK_TOKENS, TextRecord, count_chunks, text_length

TEXT_BATCH = 32
MAX_AUTO_BYTES = 16 * 2**30
"""`text_cache auto` stores text states up to this size: 54,000 captions of SDXL."""


@dataclass(frozen=True)
class Texts:
    """Reads the text states in the cache by caption. max_tokens: tokens of a caption that its record covers."""

    shards: Shards
    fingerprint: str
    max_tokens: int = CHUNK_TOKENS

    def get(self, caption: str) -> TextRecord | None:
        """None if the caption has no record. Raises UserError if its file is damaged."""
        record = self.shards.get(text_key(caption, self.fingerprint))
        return None if record is None else unpack_text(record, text_length(self.max_tokens))

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


def open_texts(context: PrepareContext, max_tokens: int = CHUNK_TOKENS) -> Texts:
    """Opens the folder of states by the base's text encoders in the context's dtype, of up to `max_tokens` tokens a
    caption."""
    base, dtype = context.base, context.dtype
    # Captions of one chunk have the folder that they had before there was an option: caches stay valid.
    longer = {"max_tokens": max_tokens} if max_tokens > CHUNK_TOKENS else {}
    made_by = fingerprint(weights=base.text_fingerprint, dtype=dtype, version=TEXT_VERSION, **longer)
    about = {"base": base.name, "arithmetic": str(dtype).removeprefix("torch."), **longer}
    return Texts(context.open_shards("texts", made_by, about), made_by, max_tokens)


def choose_captions(
    captions: Iterable[str], options: DataOptions, each: int, parts: int = 1
) -> tuple[list[str] | None, str]:
    """The distinct captions to store, or None if captions are encoded when they are drawn; and a line for the log.

    Args:
        captions: read only as far as needed for the decision.
        each: bytes of one caption's states, at most.
        parts: the captions are one of so many parts of the dataset's.

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
        if is_auto and len(distinct) * each * parts > MAX_AUTO_BYTES:
            of_part = f" in one of {parts} parts" if parts > 1 else ""
            return None, (
                f"captions: encoded when drawn, because more than {len(distinct) - 1:,} captions{of_part} at "
                f"{show_bytes(each)} would take over {show_bytes(MAX_AUTO_BYTES // parts)} of disk; the text encoders "
                "stay loaded"
            )
    most = "up to " if options.max_tokens > CHUNK_TOKENS else ""
    size = show_bytes(len(distinct) * each)
    return list(distinct), f"captions: {len(distinct):,} distinct, {most}{size} of states on disk"


def build_texts(captions: Iterator[str], texts: Texts, context: PrepareContext, total: int) -> None:
    """Encodes the captions, about `total`, and appends their records."""
    first = next(captions, None)
    if first is None:
        return
    captions = itertools.chain([first], captions)
    encoder = context.base.text_encoder(context.device, context.dtype)
    batches = in_batches(context.bar(captions, total, "encoding captions"), TEXT_BATCH)
    threads = cores_of(context.device)
    with texts.shards.writer() as writer, sharing_cores(threads) as pool:
        for batch, states, pooled in run_ahead(pool, partial(_encoded, encoder, texts.max_tokens), batches, threads):
            for caption, state, vector in zip(batch, states, pooled, strict=True):
                tokens, name = encoder.count_tokens(caption), f"caption {caption!r}"
                own = state[: CHUNK * count_chunks(tokens, texts.max_tokens)]  # without the repetitions
                writer.add(text_key(caption, texts.fingerprint), pack_text(own, vector, tokens=tokens, name=name))
    del encoder
    release(context.device)


def _encoded(
    encoder: TextEncoder, max_tokens: int, captions: Sequence[str]
) -> tuple[Sequence[str], np.ndarray, np.ndarray]:
    """The captions with their states (N,L,D) and pooled (N,P), float32."""
    states, pooled = (part.float().cpu().numpy() for part in encoder.encode(captions, max_tokens))
    return captions, states, pooled


def warn_of_long(texts: Texts, captions: Sequence[str]) -> Iterator[str]:
    """A line for the log if some captions are cut off."""
    tokens = tokens_of_tags(texts.shards.tags[texts.shards.find(texts.keys(captions))])
    places = np.flatnonzero(tokens > texts.max_tokens)
    if len(places):
        longest = captions[int(places[np.argmax(tokens[places])])]
        yield long_captions(len(places), len(captions), longest, int(tokens.max()), texts.max_tokens)


def long_captions(count: int, total: int, longest: str, tokens: int, max_tokens: int) -> str:
    """The line about captions that are cut off."""
    return (
        f"captions: {count:,} of {total:,} have more than {max_tokens} tokens (--data.max_tokens); the rest is cut "
        f"off. The longest has {tokens}: {json.dumps(longest[:60] + '...', ensure_ascii=False)}"
    )
