"""The loss of a micro-batch. Nothing here is random: noise and timesteps are in the batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from t2i_adapter.diffusion import objective
from t2i_adapter.diffusion.schedule import NoiseSchedule
from t2i_adapter.models.encoders import LatentScale
from t2i_adapter.models.family import added_conditions
from t2i_adapter.types import Batch


class FrozenModel(NamedTuple):
    """The base as training uses it: nothing in it is trained."""

    unet: Any
    schedule: NoiseSchedule
    latent_scale: LatentScale
    dtype: torch.dtype


def batch_losses(adapter: Any, frozen: FrozenModel, batch: Batch, *, min_snr_gamma: float | None = None) -> Tensor:
    """Each sample's loss, (B,) float32: the mean over its K noise samples. Arguments as of `draw_losses`."""
    return draw_losses(adapter, frozen, batch, min_snr_gamma=min_snr_gamma).mean(1)


def draw_losses(adapter: Any, frozen: FrozenModel, batch: Batch, *, min_snr_gamma: float | None = None) -> Tensor:
    """The loss of each of a sample's K noise samples, (B,K) float32.

    adapter: condition (B,C,H,W) -> four features; it may run under autocast and be wrapped in DDP. If the batch has
    weights (B,n), they are its second argument (`models.joint.JointAdapter`).
    """
    latents = frozen.latent_scale.sample(each_draw(batch.moments, batch), batch.latent_noise)
    noisy = objective.add_noise(latents, batch.noise, batch.timesteps, frozen.schedule)
    target = objective.target(latents, batch.noise, batch.timesteps, frozen.schedule)
    prediction = predict(adapter, frozen, noisy, batch)
    weight = objective.weights(batch.timesteps, frozen.schedule, min_snr_gamma)
    return objective.losses(prediction, target, weight).view(len(batch), batch.draws)


def each_draw(rows: Tensor, batch: Batch) -> Tensor:
    """Repeats each sample's row, (B,...), for its K noise samples, (B K,...)."""
    return rows.repeat_interleave(batch.draws, 0) if batch.draws > 1 else rows


def predict(adapter: Any, frozen: FrozenModel, noisy: Tensor, batch: Batch) -> Tensor:
    """The UNet's prediction (B K,4,h,w) for the noisy latents, with the adapter's features added inside it.

    The features are computed once a sample, whatever K is.
    """
    dtype = frozen.dtype
    inputs = (batch.condition,) if batch.weights is None else (batch.condition, batch.weights)
    features = [each_draw(feature.to(dtype), batch) for feature in adapter(*inputs)]
    return frozen.unet(
        noisy.to(dtype),
        batch.timesteps,
        encoder_hidden_states=each_draw(batch.text.to(dtype), batch),
        added_cond_kwargs=added_conditions(each_draw(batch.pooled.to(dtype), batch), each_draw(batch.time_ids, batch)),
        down_intrablock_additional_residuals=features,
        return_dict=False,
    )[0]
