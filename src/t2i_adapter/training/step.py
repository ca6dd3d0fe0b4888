"""One micro-step: a batch in, each sample's loss out. It draws nothing: all chance travels in the batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from t2i_adapter.diffusion import objective
from t2i_adapter.diffusion.schedule import NoiseSchedule
from t2i_adapter.models.latents import LatentScale
from t2i_adapter.types import Batch


class Frozen(NamedTuple):
    """The part of the model that does not learn."""

    unet: Any
    schedule: NoiseSchedule
    latent_scale: LatentScale
    dtype: torch.dtype


def batch_losses(adapter: Any, frozen: Frozen, batch: Batch, *, min_snr_gamma: float | None = None) -> Tensor:
    """Each sample's loss, (B,) float32.

    adapter: condition (B,C,H,W) -> four features; it may run under autocast and be wrapped for several processes.
    """
    latents = frozen.latent_scale.sample(batch.moments, batch.latent_noise)
    noisy = objective.add_noise(latents, batch.noise, batch.timesteps, frozen.schedule)
    goal = objective.target(latents, batch.noise, batch.timesteps, frozen.schedule)
    prediction = predict(adapter, frozen, noisy, batch)
    weight = objective.weights(batch.timesteps, frozen.schedule, min_snr_gamma)
    return objective.losses(prediction, goal, weight)


def predict(adapter: Any, frozen: Frozen, noisy: Tensor, batch: Batch) -> Tensor:
    """The UNet's answer (B,4,h,w) to the noisy latents, the adapter's features added inside it."""
    dtype = frozen.dtype
    features = [feature.to(dtype) for feature in adapter(batch.condition)]
    return frozen.unet(
        noisy.to(dtype),
        batch.timesteps,
        encoder_hidden_states=batch.text.to(dtype),
        added_cond_kwargs={"text_embeds": batch.pooled.to(dtype), "time_ids": batch.time_ids},
        down_intrablock_additional_residuals=features,
        return_dict=False,
    )[0]
