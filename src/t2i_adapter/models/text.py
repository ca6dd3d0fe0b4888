"""Captions to the states SDXL attends to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor

_TOKENIZING = Lock()
"""A tokenizer keeps the padding and truncation of a call in itself, so that threads take turns."""


@dataclass
class TextEncoder:
    """SDXL's two tokenizers and text encoders as one function. L = 77 tokens, D text width, P pooled width."""

    tokenizers: tuple[Any, Any]
    encoders: tuple[Any, Any]
    device: torch.device
    max_tokens: int = 77

    def count_tokens(self, caption: str) -> int:
        """Tokens of a caption, start and end included; what lies beyond `max_tokens` is not seen by the model."""
        return count_tokens(self.tokenizers[0], caption)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """N captions -> states (N,L,D) and pooled (N,P), in the encoders' dtype.

        The states are both encoders' last-but-one hidden layers side by side, the pooled vector is the second
        encoder's projection of its end token (SDXL report, 2307.01952, section 2.1).
        """
        hidden, pooled = [], None
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            output = encoder(self._ids(tokenizer, captions).to(self.device), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled = output[0]
        assert pooled is not None
        return torch.cat(hidden, dim=-1), pooled

    def _ids(self, tokenizer: Any, captions: Sequence[str]) -> Tensor:
        length = self.max_tokens
        with _TOKENIZING:
            found = tokenizer(
                list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
        return found.input_ids


def count_tokens(tokenizer: Any, caption: str) -> int:
    """Tokens of a caption, start and end included."""
    with _TOKENIZING:
        return len(tokenizer(caption, truncation=False, verbose=False).input_ids)
