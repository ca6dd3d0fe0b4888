"""Completes a batch on the device: encodes the pictures and captions that are not in the cache."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from t2i_adapter.cache.records import check_moments, check_states
from t2i_adapter.cache.texts import TEXT_BATCH, long_captions
from t2i_adapter.models.base import Base
from t2i_adapter.models.encoders import LatentEncoder, TextEncoder, encode_pixels
from t2i_adapter.types import CHUNK_TOKENS, Batch, PartialBatch

TEXT_STATE_BYTES = 256 * 2**20
"""Text states that stay on the device, the last used ones: 850 captions of SDXL."""


class Encoders:
    """The VAE's encoder and the text encoders on the device. Each is loaded when the first batch needs it."""

    def __init__(
        self,
        base: Base,
        device: torch.device | str,
        dtype: torch.dtype,
        *,
        max_tokens: int = CHUNK_TOKENS,
        keep: int = TEXT_STATE_BYTES,
    ) -> None:
        """dtype: of the text encoders; the VAE runs in float32. max_tokens: tokens of a caption that are encoded. keep:
        bytes of text states that stay on the device."""
        self._base, self._device, self._dtype = base, device, dtype
        self._max_tokens, self._keep = max_tokens, keep
        self._texts: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        self._has_warned = False
        self._unchecked = {"moments", "states"}

    @cached_property
    def _vae(self) -> LatentEncoder:
        return self._base.latent_encoder(self._device)

    @cached_property
    def _text(self) -> TextEncoder:
        return self._base.text_encoder(self._device, self._dtype)

    def complete(self, partial: PartialBatch) -> Batch:
        """The complete batch, in float32, of a partial batch whose tensors are on the device.

        Encoded numbers are rounded to float16 like cached ones, so that the cache does not change the run. Raises
        UserError if an encoder returns NaN or inf for all samples of the first batch that it encodes: it is damaged. A
        single sample like this is left to the step, which finds it in the loss.
        """
        if partial.moments is not None:
            moments = partial.moments
        else:
            assert partial.pixels is not None
            moments = encode_pixels(self._vae, partial.pixels)
            if self._is_first("moments") and not _has_finite(moments):
                check_moments(moments.cpu().numpy(), partial.keys)
        if partial.text is not None and partial.pooled is not None:
            text, pooled = partial.text, partial.pooled
        else:
            text, pooled = self.states(partial.captions)
            if self._is_first("states") and not _has_finite(text, pooled):
                check_states(text.cpu().numpy(), pooled.cpu().numpy(), partial.captions)
        return Batch(
            moments=moments.float(),
            condition=partial.condition.float().div_(255),
            text=text.float(),
            pooled=pooled.float(),
            time_ids=partial.time_ids,
            timesteps=partial.timesteps,
            noise=partial.noise,
            latent_noise=partial.latent_noise,
            keys=partial.keys,
            weights=partial.weights,
        )

    def _is_first(self, what: str) -> bool:
        """True once for each of "moments" and "states". Later batches are not checked: the host would have to wait for
        the device."""
        is_first = what in self._unchecked
        self._unchecked.discard(what)
        return is_first

    def states(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """N captions -> states (N,L,D) and pooled (N,P), float16, on the device."""
        here = {caption: self._texts[caption] for caption in captions if caption in self._texts}
        new = [caption for caption in dict.fromkeys(captions) if caption not in here]
        for first in range(0, len(new), TEXT_BATCH):
            some = new[first : first + TEXT_BATCH]
            states, pooled = (part.float().half() for part in self._text.encode(some, self._max_tokens))
            here.update(zip(some, zip(states, pooled, strict=True), strict=True))
            self._warn_of_long(some)
        self._keep_used(here)
        return torch.stack([here[c][0] for c in captions]), torch.stack([here[c][1] for c in captions])

    def _keep_used(self, used: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Stores the states for later batches and drops those that were used longest ago."""
        for caption, parts in used.items():
            kept = self._texts.get(caption) or (parts[0].clone(), parts[1].clone())  # frees the batch's tensor
            self._texts[caption] = kept
            self._texts.move_to_end(caption)
        each = sum(part.nbytes for part in next(iter(used.values()))) if used else 1
        while len(self._texts) * each > self._keep and self._texts:
            self._texts.popitem(last=False)

    def _warn_of_long(self, captions: Sequence[str]) -> None:
        """Warns once a run: the number of long captions is known only with a cache."""
        if self._has_warned:
            return
        for caption in captions:
            tokens = self._text.count_tokens(caption)
            if tokens > self._max_tokens:
                self._has_warned = True
                line = long_captions(1, len(captions), caption, tokens, self._max_tokens)
                print(line, file=sys.stderr, flush=True)
                return


def _has_finite(*parts: Tensor) -> bool:
    """Whether all parts, each (B,...), are finite for at least one of the B samples."""
    finite = [part.flatten(1).isfinite().all(dim=1) for part in parts]
    return bool(torch.stack(finite).all(dim=0).any())
