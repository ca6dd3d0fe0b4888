"""Generates pictures with the adapter as it is during training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from t2i_adapter.devices import release
from t2i_adapter.generation.generate import TextStates, generate
from t2i_adapter.generation.options import SamplingOptions
from t2i_adapter.models.base import Base
from t2i_adapter.training.step import FrozenModel


class Pictures:
    """The base's pipeline around the UNet that trains, built when the first picture is generated."""

    def __init__(self, base: Base, frozen: FrozenModel, device: torch.device) -> None:
        self._base, self._frozen, self._device = base, frozen, device
        self._pipeline: Any = None

    def generate(
        self,
        adapter: Any,
        texts: TextStates,
        conditions: Sequence[Image.Image] | None,
        seeds: Sequence[int],
        *,
        side: int,
        sampling: SamplingOptions,
    ) -> list[Image.Image]:
        """N square pictures of `side` pixels with the present weights of `adapter`; without conditions, with the base
        alone. Arguments as of `generation.generate.generate`."""
        try:
            pipeline = self._with(adapter)
            return generate(pipeline, texts, conditions, seeds, size=(side, side), sampling=sampling)
        finally:
            # The VAE leaves the device until the next pictures; the UNet stays, since training uses it.
            if self._pipeline is not None:
                self._pipeline.vae.to("cpu")
            release(self._device)

    def _with(self, adapter: Any) -> Any:
        """The pipeline with an adapter of its own in the base's dtype and with the present weights."""
        if self._pipeline is None:
            # Not a deepcopy: accelerate has wrapped the trained adapter's forward, which returns float32.
            own = type(adapter).from_config(adapter.config).eval()
            self._pipeline = self._base.pipeline(
                own, self._device, self._frozen.dtype, unet=self._frozen.unet, with_text=False
            )
        self._pipeline.vae.to(self._device)
        self._pipeline.adapter.load_state_dict(adapter.state_dict())
        return self._pipeline


def text_states(
    prompts: Sequence[str], records: dict[str, tuple[torch.Tensor, torch.Tensor]], *, zeros: bool, repeat: int = 1
) -> TextStates:
    """States of each prompt, repeated `repeat` times. records: caption -> (states (L,D), pooled (P,)).

    zeros: the unconditional states of guidance are zeros, as in SDXL; otherwise those of the empty caption.
    """
    chosen = [records[prompt] for prompt in prompts for _ in range(repeat)]
    states, pooled = torch.stack([c[0] for c in chosen]), torch.stack([c[1] for c in chosen])
    empty_states, empty_pooled = records[""]
    negative = torch.zeros_like(states) if zeros else empty_states.expand_as(states)
    negative_pooled = torch.zeros_like(pooled) if zeros else empty_pooled.expand_as(pooled)
    return TextStates(states, pooled, negative, negative_pooled)
