"""The UNet: SDXL's blocks in small, epsilon prediction, trained on cached latents and text states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor, nn

from nano_maker.cache import Samples
from nano_maker.pictures import NATIVE
from nano_maker.run import PairTransform, averaged, device, follow, rank, world
from nano_maker.text import POOLED, WIDTHS, TextModels
from nano_maker.vae import REDUCTION
from t2i_adapter.training.muon import Muon

_CHANNELS = (48, 96, 128)
_GROUPS = 4
_TIME_WIDTH = 32  # per number of the six time ids
_BATCH = 64
_RATE = 1e-3
_DROPPED = 0.10  # captions: half become zeros, as SDXL's pipeline passes; half the encoded "", as training scripts do
_NOISE_WEIGHT = 0.6
_TIME_POWER = 0.6  # t = 1000 u^0.6: two thirds of the draws above 500, where it is decided what is drawn, and where
_HORIZON = 500  # steps of averaging
_IDENTITY = 4  # latent channels that pass through


def build() -> UNet2DConditionModel:
    """Few groups: with as many groups as channels, each norm would take the mean colour of a flat area away."""
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
    """SDXL's own settings."""
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
    """Start as the identity: at high noise the input is nearly the noise that is asked for.

    There, an error of 1 % in the predicted noise is one of 15 % in the picture, and a small network
    needs long to find the identity to that precision by itself. Each latent channel travels twice,
    as x and as -x, from conv_in over the last skip to conv_out: silu(x) - silu(-x) = x.
    """
    last: Any = unet.up_blocks[-1].resnets[-1]  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
    skip = unet.config["block_out_channels"][0]  # where the skip begins in that block's input
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
    """Train within `minutes` on samples whose text is frozen; resumes from work/unet."""
    torch.manual_seed(seed)
    unet = build()
    unet.to(device())  # pyright: ignore[reportArgumentType]
    modules = {"unet": unet, "average": averaged(unet)}
    stage = PairTransform(work / "unet", minutes, _RATE, modules, trained=["unet"], optimizer=Muon)
    with torch.no_grad():
        empty = text.encode([""])
    sigmas = noise_levels().to(device())
    for step in stage:
        rng = np.random.default_rng([seed, step, rank()])
        batch = samples.take(rng.integers(len(samples), size=_BATCH // world()), device())
        _drop_captions(batch, empty, rng)
        stage.update(_loss(unet, batch, sigmas, rng))
        follow(modules["average"], unet, step, horizon=_HORIZON)


def noise_levels() -> Tensor:
    """(1000,): sigma by timestep, x = x0 + sigma * noise, of the scheduler above."""
    alphas = scheduler().alphas_cumprod
    return ((1 - alphas) / alphas).sqrt()


def _drop_captions(batch: dict[str, Tensor], empty: tuple[Tensor, Tensor], rng: np.random.Generator) -> None:
    """Replace some captions, in place: classifier-free guidance needs to know what no caption looks like."""
    draw = rng.random(len(batch["states"]))
    for i in np.flatnonzero(draw < _DROPPED):
        states, pooled = (value[0] for value in empty)
        is_zero = draw[i] < _DROPPED / 2
        batch["states"][i] = 0 if is_zero else states
        batch["pooled"][i] = 0 if is_zero else pooled


def _loss(unet: nn.Module, batch: dict[str, Tensor], sigmas: Tensor, rng: np.random.Generator) -> Tensor:
    """Weighted square error of the noise. The draws of u, and so of t, are spread evenly over the batch.

    The weight grows with the noise: colour is decided where an error of the noise counts most in the
    picture. (1 + sigma^2) would be the loss of v-prediction; the exponent _NOISE_WEIGHT tempers it.
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
