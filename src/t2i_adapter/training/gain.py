"""Measures on fixed pairs and noise how much the adapter lowers the loss: with a pair's own condition, with another's,
and without the adapter.

The base is frozen, so what a condition changes in the loss is the adapter's work alone. Letters: N pairs, T noise
levels (`BANDS`), B pairs of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t2i_adapter.batches.choices import DrawnSample
from t2i_adapter.batches.encoders import Encoders
from t2i_adapter.batches.order import LOOK_STREAM
from t2i_adapter.batches.packing import pack, unpack
from t2i_adapter.cache.dataset import PairDataset
from t2i_adapter.cache.records import add_prefix
from t2i_adapter.devices import in_float64
from t2i_adapter.training.data import to_device
from t2i_adapter.training.step import FrozenModel, draw_losses
from t2i_adapter.types import Batch

BANDS = (187, 437, 687, 937)
"""The noise levels that are measured: the middles of the four quarters of 1,000 timesteps, moved a half step up.
Quarters of another number of timesteps are scaled."""


class Gain:
    """The losses of a dataset's pairs, each at T timesteps with noise of its own, which never change.

    Each sample takes its first caption and its view 0. All samples have one size.
    """

    def __init__(
        self,
        dataset: PairDataset,
        frozen: FrozenModel,
        encoders: Encoders,
        device: torch.device,
        *,
        caption_prefix: str = "",
        most_samples: int = 16,
        has_captions: bool = True,
    ) -> None:
        """most_samples: the largest number of noise samples that the UNet computes at a time. has_captions: False
        measures with the empty caption."""
        self._dataset, self._frozen, self._encoders, self._device = dataset, frozen, encoders, device
        self._prefix, self._has_captions = caption_prefix, has_captions
        self.timesteps = tuple(t * frozen.schedule.num_timesteps // 1000 for t in BANDS)
        self._pairs = max(1, most_samples // len(BANDS))
        self.others = _others([dataset.fetch(number, 0, "look").condition for number in range(len(dataset))])

    def __len__(self) -> int:
        return len(self._dataset)

    def right(self, adapter: Any) -> np.ndarray:
        """(N,T) losses with each pair's own condition."""
        return self._losses(adapter, range(len(self)))

    def other(self, adapter: Any) -> np.ndarray:
        """(N,T) losses with the condition of another pair. Not if all conditions are equal (`others` is None)."""
        assert self.others is not None
        return self._losses(adapter, self.others)

    def none(self, adapter: Any) -> np.ndarray:
        """(N,T) losses without an adapter; `adapter` says only which features there would be."""

        def no_features(condition: Tensor) -> list[Tensor]:
            return [torch.zeros_like(feature) for feature in adapter(condition)]

        return self._losses(no_features, range(len(self)))

    @torch.no_grad()
    def _losses(self, adapter: Callable[[Tensor], Sequence[Tensor]], conditions: Sequence[int]) -> np.ndarray:
        """(N,T); conditions: for each pair the number of the pair whose condition it gets."""
        rows = [draw_losses(adapter, self._frozen, batch) for batch in self._batches(conditions)]
        return in_float64(torch.cat(rows)).cpu().numpy()

    def _batches(self, conditions: Sequence[int]) -> Iterator[Batch]:
        for first in range(0, len(self), self._pairs):
            some = range(first, min(first + self._pairs, len(self)))
            batch = self._batch([self._sample(number) for number in some])
            if list(conditions[some.start : some.stop]) != list(some):
                lent = self._batch([self._sample(conditions[number]) for number in some])
                batch = replace(batch, condition=lent.condition)
            yield batch

    def _batch(self, samples: list[DrawnSample]) -> Batch:
        partial = unpack(pack(samples, pin=False), {}, self._dataset.key, pin=False)
        return self._encoders.complete(to_device(partial, self._device))

    def _sample(self, number: int) -> DrawnSample:
        """The pair with its T noise samples, a function of its number."""
        record = self._dataset.fetch(number, 0, "look")
        height, width = record.condition.shape[-2:]
        generator = np.random.Generator(np.random.PCG64([LOOK_STREAM, number]))
        shape = (2, len(BANDS), 4, height // 8, width // 8)
        noise, latent_noise = generator.standard_normal(shape, dtype=np.float32)
        captions = self._dataset.captions(number) if self._has_captions else ("",)
        caption = add_prefix(captions[0], self._prefix)
        return DrawnSample(
            number=number,
            record=record,
            text=self._dataset.text(caption),
            caption=caption,
            time_ids=record.geometry.time_ids(),
            timesteps=self.timesteps,
            noise=noise,
            latent_noise=latent_noise,
            bad=(),
        )


def _others(conditions: Sequence[np.ndarray]) -> list[int] | None:
    """For each of N conditions the number of the next one that differs from it; None if all are equal.

    The pairs were chosen at random, so the next one is as good as any.
    """
    count, found = len(conditions), []
    for number, own in enumerate(conditions):
        following = ((number + step) % count for step in range(1, count))
        other = next((n for n in following if not np.array_equal(conditions[n], own)), None)
        if other is None:
            return None
        found.append(other)
    return found
