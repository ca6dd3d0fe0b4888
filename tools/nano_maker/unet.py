"""The UNet of nano and its training: SDXL's blocks in small, epsilon prediction, cached latents and text states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor, nn

from nano_maker.cache import Samples
from nano_maker.pictures import NATIVE
from nano_maker.run import TrainingStage, device, rank, world
from nano_maker.text import POOLED, WIDTHS, TextModels
from nano_maker.vae import REDUCTION
from t2i_adapter.training.ema import Ema
from t2i_adapter.training.muon import Muon

_CHANNELS = (48, 96, 128)
_GROUPS = 4
_TIME_WIDTH = 32  # embedding width of each of the six time ids
_BATCH = 64
_RATE = 1e-3
_DROPPED = (
    0.10  # share of captions: half become zeros, as in SDXL's pipeline, half the encoded "", as in training scripts
)
_NOISE_WEIGHT = 0.6
_TIME_POWER = 0.6  # t = 1000 u^0.6: two thirds of the timesteps are above 500, where content and layout are decided
_EMA_DECAY = 1 - 1 / 500
_IDENTITY = 4  # latent channels that the initial weights pass through


def build() -> UNet2DConditionModel:
    """Returns a UNet that starts as the identity. Few groups: many would remove the mean colour of a flat area."""
    unet = UNet2DConditionModel(
        sample_size=NATIVE // REDUCTION,
        in_channels=4,
        out_channels=4,
        block_out_channels=_CHANNELS,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),  # pyright: ignore[reportArgumentType]
        attention_head_dim=(1, 3, 4),  # pyright: ignore[reportArgumentType]
        cross_attention_dim=sum(WIDTHS),
        addition_embed_type="text_time",
        addition_time_embed_dim=_TIME_WIDTH,
        projection_class_embeddings_input_dim=6 * _TIME_WIDTH + POOLED,
        use_linear_projection=True,
        norm_num_groups=_GROUPS,
    )
    _pass_input_through(unet)
    return unet


def scheduler() -> EulerDiscreteScheduler:
    """Returns SDXL's scheduler."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
    )


@torch.no_grad()
def _pass_input_through(unet: UNet2DConditionModel) -> None:
    """Makes the initial UNet the identity: at high noise the input is nearly the noise to predict.

    There, an error of 1 % in the predicted noise is an error of 15 % in the picture, and a small network
    needs long to learn the identity that precisely. Each latent channel passes twice,
    as x and as -x, from conv_in over the last skip to conv_out: silu(x) - silu(-x) = x.
    """
    last: Any = unet.up_blocks[-1].resnets[-1]  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
    skip = unet.config["block_out_channels"][0]  # first channel of the skip in that block's input
    for k in range(_IDENTITY):
        for row, sign in ((k, 1.0), (k + _IDENTITY, -1.0)):
            unet.conv_in.weight[row].zero_()
            unet.conv_in.weight[row, k, 1, 1] = sign
            unet.conv_in.bias[row] = 0  # pyright: ignore[reportOptionalSubscript]
            last.conv_shortcut.weight[row].zero_()
            last.conv_shortcut.weight[row, skip + row] = 1
            last.conv_shortcut.bias[row] = 0
            last.conv2.weight[row].zero_()
            last.conv2.bias[row] = 0
            unet.conv_out.weight[k, row] = 0
            unet.conv_out.weight[k, row, 1, 1] = sign
    unet.conv_out.weight[:, 2 * _IDENTITY :] *= 0.1


def train(work: Path, minutes: float, seed: int, samples: Samples, text: TextModels) -> None:
    """Trains the UNet for `minutes` on cached samples, resuming from its checkpoint. The text encoders are frozen."""
    torch.manual_seed(seed)
    unet = build()
    unet.to(device())  # pyright: ignore[reportArgumentType]
    ema = Ema(unet, _EMA_DECAY)
    modules = {"unet": unet, "ema": ema.network}
    stage = TrainingStage(work, "unet", minutes, _RATE, modules, trained=["unet"], optimizer=Muon)
    with torch.no_grad():
        empty = text.encode([""])
    sigmas = noise_levels().to(device())
    for step in stage:
        rng = np.random.default_rng([seed, step, rank()])
        batch = samples.take(rng.integers(len(samples), size=_BATCH // world()), device())
        _drop_captions(batch, empty, rng)
        stage.update(_loss(unet, batch, sigmas, rng))
        ema.update(unet, step)


def noise_levels() -> Tensor:
    """Returns sigma by timestep, (1000,), of x = x0 + sigma * noise and the scheduler above."""
    alphas = scheduler().alphas_cumprod
    return ((1 - alphas) / alphas).sqrt()


def _drop_captions(batch: dict[str, Tensor], empty: tuple[Tensor, Tensor], rng: np.random.Generator) -> None:
    """Replaces some captions by the empty one in place: classifier-free guidance predicts without a caption too."""
    draw = rng.random(len(batch["states"]))
    for i in np.flatnonzero(draw < _DROPPED):
        states, pooled = (value[0] for value in empty)
        is_zero = draw[i] < _DROPPED / 2
        batch["states"][i] = 0 if is_zero else states
        batch["pooled"][i] = 0 if is_zero else pooled


def _loss(unet: nn.Module, batch: dict[str, Tensor], sigmas: Tensor, rng: np.random.Generator) -> Tensor:
    """Weighted square error of the noise, with timesteps t = T u^_TIME_POWER; u is stratified over the batch.

    The weight (1 + sigma^2)^_NOISE_WEIGHT grows with the noise, because colours are decided at high noise. The
    exponent 1 would be the loss of v-prediction.
    """
    x0 = batch["latents"]
    B = len(x0)
    spread = (torch.from_numpy(rng.permutation(B)) + torch.from_numpy(rng.random(B))) / B
    t = (spread**_TIME_POWER * len(sigmas)).long().to(x0.device)
    noise = torch.from_numpy(rng.standard_normal(x0.shape, np.float32)).to(x0.device)
    sigma = sigmas[t].view(-1, 1, 1, 1)
    x = (x0 + sigma * noise) / (1 + sigma**2).sqrt()
    conditions = {"text_embeds": batch["pooled"], "time_ids": batch["time_ids"]}
    predicted = unet(x, t, batch["states"], added_cond_kwargs=conditions).sample
    weight = (1 + sigmas[t] ** 2) ** _NOISE_WEIGHT
    return (weight * (predicted - noise).square().mean(dim=(1, 2, 3))).mean()
