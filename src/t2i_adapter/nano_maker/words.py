"""The base's vocabulary: a byte-level BPE in CLIP's form, in which each word of its domain is one token."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from ..sources import emoji, shapes

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
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=_SUFFIX))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2**16,  # no bound: merging ends when every word is whole
        min_frequency=1,
        initial_alphabet=alphabet,
        end_of_word_suffix=_SUFFIX,
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    rows = json.loads(tokenizer.to_str())["model"]["merges"]
    merges = [(first, second) for first, second in rows]
    tokens = [*alphabet, *(letter + _SUFFIX for letter in alphabet), *("".join(pair) for pair in merges), START, END]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges


def _bytes_in_order() -> list[str]:
    """The 256 characters that stand for the bytes, "!" first: CLIP's ids 0 to 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(b) for b in printable]
    return letters + [chr(256 + n) for n in range(256 - len(letters))]
