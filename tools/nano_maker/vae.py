"""The VAE of nano and its training: 8x reduction, 4 latent channels, nearly no noise in the posterior."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from nano_maker import checkpoint, pictures
from nano_maker.run import TrainingStage, checkpoint_file, device, rank, world
from t2i_adapter.data import shapes
from t2i_adapter.training.ema import Ema

REDUCTION = 8
_BATCH = 16
_RATE = 1.5e-3
_DECODER_RATE = 5e-4
_NOISE = 0.05  # standard deviation, on latents of about 1: sampled latents are not more precise than that
_PULL = 1e-3  # weight of the mean square of the latents, which keeps their scale constant
_SMALL_UNTIL = 0.85  # share of the time at half the native side, a quarter of the cost
_CROP_SHARE = 0.7  # of these pictures: crops of the native picture at the edge of a shape; the others are scaled scenes
_SCENES_SEED = 101  # differs from the seeds of the other stages and from the default of make-data


def build() -> AutoencoderKL:
    """Returns an untrained VAE. One normalisation group: many would remove the mean colour of a flat picture."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 4,  # pyright: ignore[reportArgumentType]
        block_out_channels=(16, 32, 64, 64),  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        sample_size=pictures.NATIVE,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


class ColorProbe(nn.Module):
    """Predicts the mean colour of each 8 x 8 patch from the latents by a linear map; used in training only.

    Its loss keeps colour linear in the latents, so that the UNet learns more easily to set colours by words.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Conv2d(4, 3, 1)

    def forward(self, latents: Tensor) -> Tensor:
        """(B,4,h,w) -> (B,3,h,w)."""
        return self.read(latents)


def train(work: Path, minutes: float, seed: int, emoji: np.ndarray | None = None) -> None:
    """Trains the VAE for `minutes`, resuming from its checkpoint. `emoji`: (N,n,n,4) uint8, mixed with the scenes."""
    torch.manual_seed(seed)
    vae = _to_device(build()).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    ema = Ema(vae, 1 - 1 / 500)
    modules = {"vae": vae, "ema": ema.network, "probe": ColorProbe().to(device())}
    stage = TrainingStage(work, "vae", minutes, _RATE, modules, trained=["vae", "probe"])
    torch.manual_seed(seed + 1000 * (rank() + 1))
    for step in stage:
        size = pictures.NATIVE // 2 if stage.progress < _SMALL_UNTIL else pictures.NATIVE
        count = _BATCH if size < pictures.NATIVE else _BATCH // 2
        x = to_tensor(_batch(seed, step, size, count, emoji)).to(device(), memory_format=torch.channels_last)
        stage.update(_loss(vae, modules["probe"], x))
        ema.update(vae, step)


def train_decoder(work: Path, minutes: float, seed: int, emoji: np.ndarray | None = None) -> None:
    """Trains the decoder alone on whole native pictures, resuming from its checkpoint; the UNet stays valid."""
    torch.manual_seed(seed)
    vae = finish(work).to(memory_format=torch.channels_last).requires_grad_(False)  # pyright: ignore[reportCallIssue]
    vae.decoder.requires_grad_(True)
    ema = Ema(vae, 1 - 1 / 300)
    modules = {"vae": vae, "ema": ema.network}
    stage = TrainingStage(work, "decoder", minutes, _DECODER_RATE, modules, trained=["vae"])
    torch.manual_seed(seed + 1000 * (rank() + 1))
    for step in stage:
        batch = _batch(seed + 1, step, pictures.NATIVE, _BATCH // 2, emoji)
        stage.update(_loss(vae, None, to_tensor(batch).to(device(), memory_format=torch.channels_last)))
        ema.update(vae, step)


def sharpest(work: Path) -> AutoencoderKL:
    """Returns the finished VAE, with the decoder of `train_decoder` if that has run."""
    vae = finish(work)
    if (file := checkpoint_file(work, "decoder")).exists():
        checkpoint.load(file, {"ema": vae})
    return vae


def finish(work: Path) -> AutoencoderKL:
    """Returns the EMA weights of the stage `vae` with latent channels of mean 0 and deviation 1; saves them once.

    The shift and scale go into the two 1x1 convolutions beside the latents, so that decoded pictures do not change.
    The posterior's deviation becomes the constant that the decoder was trained with.
    """
    vae, file = build(), checkpoint_file(work, "base_vae")
    if file.exists():
        checkpoint.load(file, {"vae": vae})
        return _to_device(vae)
    progress = checkpoint.load(checkpoint_file(work, "vae"), {"ema": vae})
    scenes = (shapes.sample_scene(_SCENES_SEED, i) for i in range(512))
    images = np.stack([pictures.scene_picture(s, pictures.whole(pictures.NATIVE), pictures.NATIVE) for s in scenes])
    _normalise(vae, images)
    checkpoint.save(file, {"vae": vae}, None, {"of_step": progress["step"]})
    return _to_device(vae)


def _to_device(vae: AutoencoderKL) -> AutoencoderKL:
    vae.to(device())  # pyright: ignore[reportArgumentType]
    return vae.eval()


@torch.no_grad()
def _normalise(vae: AutoencoderKL, images: np.ndarray) -> None:
    """Changes the VAE in place, by the statistics of the latents of (N,H,W,3) uint8."""
    z = torch.cat([vae.encode(x).latent_dist.mean for x in to_tensor(images).split(64)])  # pyright: ignore[reportAttributeAccessIssue]
    mean, deviation = z.mean(dim=(0, 2, 3)), z.std(dim=(0, 2, 3))
    into, out = vae.quant_conv, vae.post_quant_conv
    assert into is not None and into.bias is not None and out is not None and out.bias is not None
    into.weight[:4] /= deviation.view(-1, 1, 1, 1)
    into.bias[:4] = (into.bias[:4] - mean) / deviation
    into.weight[4:] = 0
    into.bias[4:] = 2 * math.log(_NOISE / deviation.mean())
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= deviation.view(1, -1, 1, 1)


def _loss(vae: AutoencoderKL, probe: nn.Module | None, x: Tensor) -> Tensor:
    """x (B,3,H,W) in [-1,1]. Sums L1 and square error of the pixels and L1 of the 8x-pooled colours. With a probe, the
    encoder learns too: adds the probe's L1 and the mean square of the latents."""
    with torch.autocast(x.device.type, torch.bfloat16):
        z = vae.encode(x).latent_dist.mean.float()  # pyright: ignore[reportAttributeAccessIssue]
        y = vae.decode(z + _NOISE * torch.randn_like(z)).sample.float()  # pyright: ignore[reportAttributeAccessIssue]
    pooled = F.avg_pool2d(x, REDUCTION)
    pixels = (y - x).abs().mean() + (y - x).square().mean()
    colors = (F.avg_pool2d(y, REDUCTION) - pooled).abs().mean()
    if probe is None:
        return pixels + colors
    return pixels + colors + 0.3 * (probe(z) - pooled).abs().mean() + _PULL * z.square().mean()


def _batch(seed: int, step: int, size: int, count: int, emoji: np.ndarray | None) -> np.ndarray:
    """Returns this process's share of the batch of (seed, step): (n,size,size,3) uint8."""
    rng = np.random.default_rng([seed, step, rank()])
    return np.stack([_picture(rng, step * _BATCH + i, size, emoji) for i in range(rank(), count, world())])


def _picture(rng: np.random.Generator, index: int, size: int, emoji: np.ndarray | None) -> np.ndarray:
    view = pictures.sample_view(rng, size)
    if emoji is not None and rng.random() < 0.15:
        color = list(shapes.COLORS)[rng.integers(len(shapes.COLORS))]
        return pictures.emoji_picture(emoji[rng.integers(len(emoji))], color, view, size)
    scene = shapes.sample_scene(_SCENES_SEED, index)
    if size < pictures.NATIVE and rng.random() < _CROP_SHARE:
        view = _edge_view(rng, scene, size)
    return pictures.scene_picture(scene, view, size)


def _edge_view(rng: np.random.Generator, scene: shapes.Scene, size: int) -> pictures.View:
    """Returns a crop of `size` px of the native picture, around a point near the edge of one of the shapes."""
    shape = scene.shapes[rng.integers(len(scene.shapes))]
    angle = rng.uniform(0, 2 * np.pi)
    x, y = np.asarray(shape.center) + 0.8 * shape.radius * np.asarray([np.cos(angle), np.sin(angle)])
    left, top = (int(np.clip(c * pictures.NATIVE - size / 2, 0, pictures.NATIVE - size)) for c in (x, y))
    return pictures.View(pictures.NATIVE, pictures.NATIVE, top, left)


def to_tensor(images: np.ndarray) -> Tensor:
    """(B,H,W,3) uint8 -> (B,3,H,W) float32 in [-1,1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """Returns the PSNR of decode(encode(images)), (B,) decibels, for images (B,H,W,3) uint8."""
    x = to_tensor(images).to(vae.device, vae.dtype)
    y = vae.decode(vae.encode(x).latent_dist.mean).sample  # pyright: ignore[reportAttributeAccessIssue]
    error = ((y.clamp(-1, 1) - x).float() * 127.5).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(255**2 / error)).cpu().numpy()
