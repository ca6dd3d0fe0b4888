"""The small VAE: 8x reduction, 4 channels, a nearly deterministic autoencoder."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from nano_maker import checkpoint, pictures
from nano_maker.run import PairTransform, averaged, device, follow, rank, world
from t2i_adapter.data import shapes

REDUCTION = 8
_BATCH = 16
_RATE = 1.5e-3
_DECODER_RATE = 5e-4
_NOISE = 0.05  # on latents of about unit size: the decoder must not need more digits than sampling gives
_PULL = 1e-3  # weight of the mean square of the latents: keeps their scale from drifting
_SMALL_UNTIL = 0.85  # of the time at half the native size, a quarter of the cost: whole scenes small, or cut out
_CUT_SHARE = 0.7  # of these, cut out of the native size across the edge of a shape: flat colour teaches nothing
_SCENES_SEED = 101  # apart from the seeds of the other stages and of make-data's default


def build() -> AutoencoderKL:
    """One normalisation group: with many, each norms the mean colour of a flat picture away."""
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
    """Reads the mean colour of each 8 x 8 patch off the latents linearly; trained along, thrown away.

    It keeps colour a linear matter in the latents, which is what the UNet has to steer by words.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Conv2d(4, 3, 1)

    def forward(self, latents: Tensor) -> Tensor:
        """(B,4,h,w) -> (B,3,h,w)."""
        return self.read(latents)


def train(work: Path, minutes: float, seed: int, emoji: np.ndarray | None = None) -> None:
    """Train within `minutes`; resumes from work/vae. `emoji`: (N,n,n,4) uint8, drawn in among the scenes."""
    torch.manual_seed(seed)
    vae = _to_device(build()).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    modules = {"vae": vae, "average": averaged(vae), "probe": ColorProbe().to(device())}
    stage = PairTransform(work / "vae", minutes, _RATE, modules, trained=["vae", "probe"])
    torch.manual_seed(seed + 1000 * (rank() + 1))
    for step in stage:
        size = pictures.NATIVE // 2 if stage.progress < _SMALL_UNTIL else pictures.NATIVE
        count = _BATCH if size < pictures.NATIVE else _BATCH // 2
        x = to_tensor(_batch(seed, step, size, count, emoji)).to(device(), memory_format=torch.channels_last)
        stage.update(_loss(vae, modules["probe"], x))
        follow(modules["average"], vae, step, horizon=500)


def train_decoder(work: Path, minutes: float, seed: int, emoji: np.ndarray | None = None) -> None:
    """Train the decoder alone, on whole native pictures, resuming from work/decoder: the UNet's latents stay valid."""
    torch.manual_seed(seed)
    vae = finish(work).to(memory_format=torch.channels_last).requires_grad_(False)  # pyright: ignore[reportCallIssue]
    vae.decoder.requires_grad_(True)
    modules = {"vae": vae, "average": averaged(vae)}
    stage = PairTransform(work / "decoder", minutes, _DECODER_RATE, modules, trained=["vae"])
    torch.manual_seed(seed + 1000 * (rank() + 1))
    for step in stage:
        batch = _batch(seed + 1, step, pictures.NATIVE, _BATCH // 2, emoji)
        stage.update(_loss(vae, None, to_tensor(batch).to(device(), memory_format=torch.channels_last)))
        follow(modules["average"], vae, step, horizon=300)


def sharpest(work: Path) -> AutoencoderKL:
    """The finished VAE, with the decoder of `train_decoder` where that has run."""
    vae = finish(work)
    if checkpoint.exists(work / "decoder"):
        checkpoint.load(work / "decoder", {"average": vae})
    return vae


def finish(work: Path) -> AutoencoderKL:
    """The averaged weights of work/vae, each latent channel brought to mean 0 and deviation 1; kept in work/base_vae.

    The shift and scale go into the two 1x1 convolutions beside the latents, so the decoded picture stays the same;
    the posterior's deviation becomes the constant that the decoder was trained with.
    """
    vae, folder = build(), work / "base_vae"
    if checkpoint.exists(folder):
        checkpoint.load(folder, {"vae": vae})
        return _to_device(vae)
    checkpoint.load(work / "vae", {"average": vae})
    scenes = (shapes.sample_scene(_SCENES_SEED, i) for i in range(512))
    images = np.stack([pictures.scene_picture(s, pictures.whole(pictures.NATIVE), pictures.NATIVE) for s in scenes])
    _normalise(vae, images)
    checkpoint.save(folder, {"vae": vae}, None, {"of_step": checkpoint.state(work / "vae")["step"]})
    return _to_device(vae)


def _to_device(vae: AutoencoderKL) -> AutoencoderKL:
    vae.to(device())  # pyright: ignore[reportArgumentType]
    return vae.eval()


@torch.no_grad()
def _normalise(vae: AutoencoderKL, images: np.ndarray) -> None:
    """In place, by the statistics of (N,H,W,3) uint8."""
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
    """x (B,3,H,W) in [-1,1]. L1 and square error of the pixels, L1 of 8x-pooled colour, and, where the
    encoder learns too, the probe and the pull to 0."""
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
    """(count,size,size,3) uint8, this process's share of the batch of (seed, step)."""
    rng = np.random.default_rng([seed, step, rank()])
    return np.stack([_picture(rng, step * _BATCH + i, size, emoji) for i in range(rank(), count, world())])


def _picture(rng: np.random.Generator, index: int, size: int, emoji: np.ndarray | None) -> np.ndarray:
    view = pictures.sample_view(rng, size)
    if emoji is not None and rng.random() < 0.15:
        color = list(shapes.COLORS)[rng.integers(len(shapes.COLORS))]
        return pictures.emoji_picture(emoji[rng.integers(len(emoji))], color, view, size)
    scene = shapes.sample_scene(_SCENES_SEED, index)
    if size < pictures.NATIVE and rng.random() < _CUT_SHARE:
        view = _edge_view(rng, scene, size)
    return pictures.scene_picture(scene, view, size)


def _edge_view(rng: np.random.Generator, scene: shapes.Scene, size: int) -> pictures.View:
    """A cut of `size` px out of the native picture, around a point at the rim of one of the shapes."""
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
    """(B,) decibels of decode(encode) against (B,H,W,3) uint8, over the range 0 to 255."""
    x = to_tensor(images).to(vae.device, vae.dtype)
    y = vae.decode(vae.encode(x).latent_dist.mean).sample  # pyright: ignore[reportAttributeAccessIssue]
    error = ((y.clamp(-1, 1) - x).float() * 127.5).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(255**2 / error)).cpu().numpy()
