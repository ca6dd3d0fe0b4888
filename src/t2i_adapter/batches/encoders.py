"""Encodes on the device what no cache holds, and completes a batch with it."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from t2i_adapter.cache.texts import TEXT_BATCH, long_captions
from t2i_adapter.models.base import Base
from t2i_adapter.models.encoders import LatentEncoder, TextEncoder, encode_pixels
from t2i_adapter.types import TOKENS, Batch, PartialBatch

KEPT_TEXT_BYTES = 256 * 2**20
"""Of captions' states on the device, the last used: 850 captions of an SDXL."""


class Encoders:
    """What encodes on the device what no cache holds. Each encoder is loaded when the first batch needs it."""

    def __init__(self, base: Base, device: torch.device | str, dtype: torch.dtype, keep: int = KEPT_TEXT_BYTES) -> None:
        """dtype: arithmetic of the text encoders; the VAE runs in float32. keep: bytes of states that are kept."""
        self._base, self._device, self._dtype, self._keep = base, device, dtype, keep
        self._texts: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        self._told_of_long = False

    @cached_property
    def _vae(self) -> LatentEncoder:
        return self._base.latent_encoder(self._device)

    @cached_property
    def _text(self) -> TextEncoder:
        return self._base.text_encoder(self._device, self._dtype)

    def complete(self, draft: PartialBatch) -> Batch:
        """The batch of a draft whose tensors are on the device: what is missing encoded, everything in float32.

        Encoded numbers are rounded as stored ones are, so that a cache changes nothing.
        """
        if draft.moments is not None:
            moments = draft.moments
        else:
            assert draft.pixels is not None
            moments = encode_pixels(self._vae, draft.pixels)
        if draft.text is not None and draft.pooled is not None:
            text, pooled = draft.text, draft.pooled
        else:
            text, pooled = self.states(draft.captions)
        return Batch(
            moments=moments.float(),
            condition=draft.condition.float().div_(255),
            text=text.float(),
            pooled=pooled.float(),
            time_ids=draft.time_ids,
            timesteps=draft.timesteps,
            noise=draft.noise,
            latent_noise=draft.latent_noise,
            keys=draft.keys,
        )

    def states(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """N captions -> states (N,L,D) and pooled (N,P), float16, on the device; those used last are kept."""
        here = {caption: self._texts[caption] for caption in captions if caption in self._texts}
        new = [caption for caption in dict.fromkeys(captions) if caption not in here]
        for first in range(0, len(new), TEXT_BATCH):
            some = new[first : first + TEXT_BATCH]
            states, pooled = (part.float().half() for part in self._text.encode(some))
            here.update(zip(some, zip(states, pooled, strict=True), strict=True))
            self._tell_of_long(some)
        self._keep_used(here)
        return torch.stack([here[c][0] for c in captions]), torch.stack([here[c][1] for c in captions])

    def _keep_used(self, used: dict[str, tuple[Tensor, Tensor]]) -> None:
        for caption, parts in used.items():
            kept = self._texts.get(caption) or (parts[0].clone(), parts[1].clone())  # not the whole batch's memory
            self._texts[caption] = kept
            self._texts.move_to_end(caption)
        each = sum(part.nbytes for part in next(iter(used.values()))) if used else 1
        while len(self._texts) * each > self._keep and self._texts:
            self._texts.popitem(last=False)

    def _tell_of_long(self, captions: Sequence[str]) -> None:
        """One line a run: how many there are is known only of captions that are on disk."""
        if self._told_of_long:
            return
        for caption in captions:
            tokens = self._text.count_tokens(caption)
            if tokens > TOKENS:
                self._told_of_long = True
                print(long_captions(1, len(captions), caption, tokens), file=sys.stderr, flush=True)
                return
