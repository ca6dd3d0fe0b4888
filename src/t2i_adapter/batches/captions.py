"""What a sample is told at a draw: one of its captions, or none, prefixed, its tags shuffled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from t2i_adapter.cache.dataset import prefixed
from t2i_adapter.config.tree import DataOptions


def told(captions: Sequence[str], options: DataOptions, *, pick: float, drop: float, tags: int) -> str:
    """The caption of one draw; "" where it is dropped.

    Args:
        captions: the sample's, one or more.
        pick: in [0,1), which of them.
        drop: in [0,1), below `options.proportion_empty_prompts` the caption is dropped.
        tags: seed of the tags' order.
    """
    if drop < options.proportion_empty_prompts:
        return ""
    caption = captions[int(pick * len(captions))]
    if options.shuffle_tags:
        caption = shuffled(caption, options.keep_tags, tags)
    return prefixed(caption, options.caption_prefix)


def shuffled(caption: str, keep: int, seed: int) -> str:
    """The tags between a caption's commas in another order, the first `keep` in their place."""
    tags = [tag for tag in map(str.strip, caption.split(",")) if tag]
    rest = np.random.default_rng(seed).permutation(len(tags[keep:]))
    return ", ".join([*tags[:keep], *(tags[keep + index] for index in rest)])
