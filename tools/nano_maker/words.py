"""The base's vocabulary: a byte-level BPE in CLIP's form, in which each word of its domain is one token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from transformers import CLIPTokenizer

from t2i_adapter.data import emoji, shapes

MAX_TOKENS = 77  # as SDXL's
START, END = "<|startoftext|>", "<|endoftext|>"
_SUFFIX = "</w>"
#: words of people that the captions do not use, so that a prompt of theirs is not spelled out in bytes
_EXTRA = """
picture image drawing photo icon simple flat big tiny huge bright pastel pattern patterned stripes dots flowers polka
dotted striped floral plain background under above below left right top bottom middle centre center near next to
and with without of in on over behind front the a an it its is are two three one four many no not very emoji"""


def domain_words(icons: Iterable[emoji.Icon]) -> list[str]:
    """Every word that a caption of the project can hold, sorted."""
    words = set(_EXTRA.split()) | set(shapes.COLORS) | set(shapes.KINDS) | set(shapes.PATTERNS)
    for name in shapes.SPACED.values():
        words.update(name.split())
    scenes = (shapes.sample_scene(0, i) for i in range(2000))  # enough to meet every turn of phrase
    words.update(word.strip(",") for scene in scenes for word in scene.caption.split())
    words.update(word for icon in icons for word in icon.words.split() if word.isalpha())
    return sorted(words)


def tokenizers(words: list[str]) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """SDXL's pair: the first pads with the end token, the second with "!" (id 0)."""
    vocabulary, merges = _byte_pairs(words)
    first, second = (_tokenizer(vocabulary, merges, pad) for pad in (END, "!"))
    return first, second


def _tokenizer(vocabulary: dict[str, int], merges: Any, pad: str) -> CLIPTokenizer:
    """merges: [(first, second)]."""
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=MAX_TOKENS)
    # Other names for these arguments are ignored in silence, and leave two tokens.
    assert len(tokenizer) == len(vocabulary), (len(tokenizer), len(vocabulary))
    return tokenizer


def _byte_pairs(words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges in CLIP's order: bytes, bytes that end a word, merges, the two specials."""
    alphabet = _bytes_in_order()
    merges = _merges(words)
    tokens = [*alphabet, *(letter + _SUFFIX for letter in alphabet), *("".join(pair) for pair in merges), START, END]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges


def _merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte pair encoding of ASCII words until each is one token; of equally frequent pairs the first by the alphabet.

    The trainer of `tokenizers` takes such ties in the order of a hash map, which differs from process to process:
    text encoders trained in one would be read in another with some words exchanged.
    """
    spelled = [[*word[:-1], word[-1] + _SUFFIX] for word in sorted(set(words))]
    merges = []
    while pairs := Counter(pair for pieces in spelled for pair in pairwise(pieces)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        # A word of one piece has no pairs: it is done.
        spelled = [_merge(pieces, best) for pieces in spelled if len(pieces) > 1]
    return merges


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """The pieces with each occurrence of the pair made one."""
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
    """The 256 characters that stand for the bytes, "!" first: CLIP's ids 0 to 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(b) for b in printable]
    return letters + [chr(256 + n) for n in range(256 - len(letters))]
