"""The base's tokenizers: a byte-level BPE in CLIP's format in which each word of the captions is one token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from transformers import CLIPTokenizer

from t2i_adapter.data import emoji, shapes
from t2i_adapter.types import CHUNK

START, END = "<|startoftext|>", "<|endoftext|>"
_SUFFIX = "</w>"
_EXTRA = """
picture image drawing photo icon simple flat big tiny huge bright pastel pattern patterned stripes dots flowers polka
dotted striped floral plain background under above below left right top bottom middle centre center near next to
and with without of in on over behind front the a an it its is are two three one four many no not very emoji"""
"""Words that users write and captions do not contain; without these tokens each would become many bytes."""


def domain_words(icons: Iterable[emoji.Icon]) -> list[str]:
    """Returns every word that a caption of the project can contain, sorted."""
    words = set(_EXTRA.split()) | set(shapes.COLORS) | set(shapes.KINDS) | set(shapes.PATTERNS)
    for name in shapes.SPACED.values():
        words.update(name.split())
    scenes = (shapes.sample_scene(0, i) for i in range(2000))  # enough to contain every form of a caption
    words.update(word.strip(",") for scene in scenes for word in scene.caption.split())
    words.update(word for icon in icons for word in icon.words.split() if word.isalpha())
    return sorted(words)


def tokenizers(words: list[str]) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """Returns the two tokenizers. As in SDXL, the first pads with the end token, the second with "!" (id 0)."""
    vocabulary, merges = _byte_pairs(words)
    first, second = (_tokenizer(vocabulary, merges, pad) for pad in (END, "!"))
    return first, second


def _tokenizer(vocabulary: dict[str, int], merges: Any, pad: str) -> CLIPTokenizer:
    """merges: [(first, second)]."""
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=CHUNK)
    # CLIPTokenizer ignores unknown arguments without an error and would then have two tokens.
    assert len(tokenizer) == len(vocabulary), (len(tokenizer), len(vocabulary))
    return tokenizer


def _byte_pairs(words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns vocabulary and merges in CLIP's order: bytes, bytes that end a word, merges, the two special tokens."""
    alphabet = _bytes_in_order()
    merges = _merges(words)
    tokens = [*alphabet, *(letter + _SUFFIX for letter in alphabet), *("".join(pair) for pair in merges), START, END]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges


def _merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte pair encoding of ASCII words until each is one token; among equally frequent pairs the alphabet decides.

    The trainer of `tokenizers` breaks such ties in the order of a hash map, which differs between processes. Text
    encoders trained in one process would then get the ids of other words in the next.
    """
    spelled = [[*word[:-1], word[-1] + _SUFFIX] for word in sorted(set(words))]
    merges = []
    while pairs := Counter(pair for pieces in spelled for pair in pairwise(pieces)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        # A word of one piece has no pairs and is finished.
        spelled = [_merge(pieces, best) for pieces in spelled if len(pieces) > 1]
    return merges


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """Returns the pieces with each occurrence of the pair joined."""
    if pair[0] not in pieces:
        return pieces
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def _bytes_in_order() -> list[str]:
    """Returns the 256 characters that stand for the bytes, "!" first: CLIP's ids 0 to 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(b) for b in printable]
    return letters + [chr(256 + n) for n in range(256 - len(letters))]
